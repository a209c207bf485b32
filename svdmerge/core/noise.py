"""Where the noise of a difference begins: singular values up to there say nothing."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from svdmerge.core.components import RankOneComponents
from svdmerge.core.products import doubled_tiles

# Of rows' and of columns' norms, the quantile that stands for all: a few outlying rows, whose own
# direction a singular value is for, must not hide the rest.
QUANTILE = 0.95


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SquaredNorms:
    """Of the rows and columns of a matrix, or a stack of them, in float64."""

    rows: Float[Tensor, "*b m"]
    columns: Float[Tensor, "*b n"]


def squared_norms(tiles: Iterable[Float[Tensor, "*b _ n"]], *, n: int) -> SquaredNorms:
    """Of the matrix whose rows the tiles are; float64 only by tiles, which stay in the cache."""
    rows, columns = list[Tensor](), torch.zeros(n, dtype=torch.float64)
    for tile in tiles:
        squares = tile.double() ** 2
        rows.append(squares.sum(dim=-1))
        columns = columns.to(squares.device) + squares.sum(dim=-2)
    return SquaredNorms(rows=torch.cat(rows, dim=-1), columns=columns)


def _quantile(x: Float[Tensor, " n"]) -> float:
    """The smallest value that QUANTILE of all do not exceed; squares less rounding are not below
    zero."""
    return max(0.0, float(x.kthvalue(math.ceil(QUANTILE * len(x))).values))


def noise_edge(delta: Float[Tensor, "m n"], *, leading: RankOneComponents) -> float:
    """The edge of a difference's noise, by its rows' and columns' norms: see `edge_of`."""
    return edge_of(squared_norms(doubled_tiles(delta), n=delta.shape[1]), leading=leading)


def edge_of(norms: SquaredNorms, *, leading: RankOneComponents) -> float:
    """The largest singular value that noise of the size found in an (m, n) difference would have,
    once those of its `leading` components that stand above it are taken off.

    Independent entries of standard deviation sd end at sd sqrt(n) + sd sqrt(m), the edge of the
    Marchenko-Pastur law (Bai, Yin 1988): a row's norm and a column's. Rounding noise is not of one
    size, for it follows the weights': then the edge is that of the largest norms (Bandeira, van
    Handel 2016), by quantile. On independent entries this lies about a twentieth above the edge.
    What is not taken off counts as noise here, so that a smooth power law without any has an edge
    too, in its tail: of exponent 0.7 and rank 400 near the 35th component.
    """
    c = leading.to(torch.float64)
    if norms.rows.numel() == 0 or norms.columns.numel() == 0:
        return 0.0
    # The rest's squared norms, not formed: components are orthogonal to each other and to it.
    rows, columns = norms.rows, norms.columns
    taken = 0
    while True:
        edge = sum(_quantile(x) ** 0.5 for x in (rows, columns))
        above = c.slice(taken, max(taken, int((c.s > edge).sum())))
        if len(above) == 0:
            return edge
        rows = rows - ((above.u * above.s) ** 2).sum(dim=1)
        columns = columns - ((above.vh.T * above.s) ** 2).sum(dim=1)
        taken += len(above)
