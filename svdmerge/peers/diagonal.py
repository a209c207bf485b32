"""Weights whose change is diagonal between frozen directions, and the spaces that are just that."""

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from svdmerge.core.components import RankOneComponents, none
from svdmerge.core.factored import complete
from svdmerge.core.svd import exact, seed_of
from svdmerge.peers.space import Weights, WeightSpace, taken

Shift = Callable[[Tensor, Tensor], Tensor]
"""(s, d) -> how far the diagonal moves from where it started; zero at d = 0."""


def free(s: Tensor, d: Tensor) -> Tensor:
    """s + d takes the place of s."""
    del s
    return d


def rectified(s: Tensor, d: Tensor) -> Tensor:
    """relu(s + d) takes the place of relu(s)."""
    return torch.relu(s + d) - torch.relu(s)


class DiagonalSpace(WeightSpace):
    """W = start + U diag(shift(s, d)) Vh of some matrices; d trains, from zero.

    So the start is exact whatever the factors' rounding, and weight decay pulls back to it. What
    `start` holds beside the matrices, as averaged vectors, is passed on as it is.
    """

    def __init__(
        self, start: Weights, *, directions: Mapping[str, RankOneComponents], shift: Shift = free
    ) -> None:
        tuned = taken(directions, weights=start, what="tuned directions")
        self._start = taken(start, weights=start, what="start")
        self._shift = shift
        self._factors: dict[str, RankOneComponents] = {}
        self._changes: dict[str, nn.Parameter] = {}
        for name, given in directions.items():
            weight = tuned[name]
            self._factors[name] = RankOneComponents(
                u=given.u.to(weight), s=given.s.to(weight), vh=given.vh.to(weight)
            )
            self._changes[name] = nn.Parameter(torch.zeros_like(self._factors[name].s))

    def values(self) -> list[nn.Parameter]:
        """The diagonals' changes."""
        return list(self._changes.values())

    def weights(self) -> dict[str, Tensor]:
        """The start, changed."""
        changed: dict[str, Tensor] = {}
        for name, change in self._changes.items():
            c, start = self._factors[name], self._start[name]
            moved = (c.u * self._shift(c.s, change)) @ c.vh
            # Kernels are decomposed as (outputs, the rest).
            changed[name] = start + moved.reshape(start.shape)
        return self._start | changed

    def frozen(self) -> Iterable[Tensor]:
        """Start and factors: the same for any number of sources they were merged from."""
        yield from self._start.values()
        for c in self._factors.values():
            yield from (c.u, c.s, c.vh)


def sigma_merged(
    merged: Weights, *, factors: Mapping[str, RankOneComponents], num_values: int
) -> DiagonalSpace:
    """The leading `num_values` singular values of each merged difference: AXIS's second stage.

    `merged` are the weights merged already, W_0 + U diag(s) Vh, and averaged vectors. A single
    source's factors make it the sigma-tuned single source. Matrices of fewer factors train those;
    `with_null_space` fills them up as published.

    Reference: AXIS, arXiv 2508.19353; theirs runs 10 epochs of AdamW at 0.1 with a cosine.
    """
    return DiagonalSpace(
        merged, directions={n: c.slice(0, num_values) for n, c in factors.items() if len(c)}
    )


def with_null_space(
    factors: Mapping[str, RankOneComponents], *, num_values: int, seed: int
) -> dict[str, RankOneComponents]:
    """Factors of at least `num_values` directions: behind the given, seeded ones of s = 0."""
    return {
        name: complete(c, num_values=num_values, seed=_seed(name, c, seed=seed))
        if len(c) < num_values
        else c
        for name, c in factors.items()
    }


def random_factors(
    start: Weights, *, names: Iterable[str], num_values: int, seed: int
) -> DiagonalSpace:
    """The control: seeded random orthonormal directions in place of merged factors, s = 0.

    Trains as many values in as many matrices, so that what is better than this is due to where the
    directions point.
    """
    matrices = taken(names, weights=start, what="random directions")
    empty = {name: none(*weight.flatten(1).shape) for name, weight in matrices.items()}
    return DiagonalSpace(start, directions=with_null_space(empty, num_values=num_values, seed=seed))


def sigma_w0(base: Weights, *, names: Iterable[str], num_values: int) -> DiagonalSpace:
    """The leading `num_values` singular values of the base's own matrices: no source at all.

    Deviation: SVDiff trains all singular values of all layers, here the leading ones of the
    matrices named, to train as many values as the others. relu(s + d) is SVDiff's; SVFT's diagonal
    variant has none, and the leading values stay far from zero anyway.

    Reference: SVDiff, arXiv 2303.11305; SVFT, arXiv 2405.19597.
    """
    start = taken(names, weights=base, what="tuned matrices")
    directions = {n: exact(w.flatten(1)).slice(0, num_values) for n, w in start.items()}
    return DiagonalSpace(start, directions=directions, shift=rectified)


def _seed(name: str, c: RankOneComponents, *, seed: int) -> int:
    """Of one matrix: no two matrices of a shape share their random directions."""
    return seed_of(name, m=c.u.shape[0], n=c.vh.shape[1], block=0) ^ seed
