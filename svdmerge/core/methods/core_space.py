"""Core Space: TIES on small cores, in bases that low-rank differences share (arXiv 2509.17786)."""

from collections.abc import Iterator, Sequence

from jaxtyping import Float
from torch import Tensor

from svdmerge.core.components import RankOneComponents
from svdmerge.core.methods.knots import common_basis
from svdmerge.core.methods.ties import ties
from svdmerge.core.svd import factors


def core_space(
    parts: Sequence[RankOneComponents], *, weights: Sequence[float], density: float, scale: float
) -> RankOneComponents:
    """Merged factors of one matrix: U M V^T, M the TIES merge of the cores U^T D_i V.

    U and V span the columns and rows of all differences, so a core holds its D_i whole, in at most
    (N k) x (N k) numbers.

    Reference: arXiv 2509.17786. Deviation: the bases are the singular vectors of the differences
    side by side and stacked, not of their LoRA factors B and A, which a difference fixes only up to
    an invertible matrix between them; the spans are the same.
    """
    sources = [p.scaled(w) for p, w in zip(parts, weights, strict=True)]
    u, v = common_basis(sources), common_basis([_transposed(c) for c in sources])

    def cores() -> Iterator[tuple[Float[Tensor, "k l"], float]]:
        return ((((u.T @ c.u) * c.s) @ (c.vh @ v), 1.0) for c in sources)

    inner = factors(ties(cores, density=density, scale=scale))
    return RankOneComponents(u=u @ inner.u, s=inner.s, vh=inner.vh @ v.T)


def _transposed(c: RankOneComponents) -> RankOneComponents:
    return RankOneComponents(u=c.vh.T, s=c.s, vh=c.u.T)
