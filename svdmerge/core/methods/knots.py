"""KnOTS: TIES in the left basis that low-rank differences share (arXiv 2410.19735)."""

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from svdmerge.core.components import RankOneComponents
from svdmerge.core.methods.ties import ties
from svdmerge.core.svd import factors

# Directions below this share of the largest are what float32 weights leave of a low-rank change,
# as the reference code drops singular values below 1e-5.
ROUNDING = 1e-5


def knots(
    parts: Sequence[RankOneComponents], *, weights: Sequence[float], density: float, scale: float
) -> RankOneComponents:
    """Merged factors of one matrix: U times the TIES merge of the sources' right factors.

    [D_1 ... D_N] = U diag(s) [V_1 ... V_N], and what is merged are diag(s) V_i = U^T D_i. Never
    forms a D_i: with k components of each source it takes O((m + n) (N k)^2).

    Reference: arXiv 2410.19735, KnOTS-TIES. The trimming of TIES is per matrix.
    """
    sources = [p.scaled(w) for p, w in zip(parts, weights, strict=True)]
    u = common_basis(sources)

    def right_factors() -> Iterator[tuple[Float[Tensor, "k n"], float]]:
        return ((((u.T @ c.u) * c.s) @ c.vh, 1.0) for c in sources)

    inner = factors(ties(right_factors, density=density, scale=scale))
    return RankOneComponents(u=u @ inner.u, s=inner.s, vh=inner.vh)


def common_basis(sources: Sequence[RankOneComponents]) -> Float[Tensor, "m k"]:
    """The left singular vectors of the sources' differences side by side, [D_1 ... D_N]."""
    # Of D_i = U_i S_i V_i only the product with any orthonormal rows' factor counts: with
    # V_i^T = Q R it is U_i S_i R^T, k columns instead of n.
    narrow = [(c.u * c.s) @ torch.linalg.qr(c.vh.T).R.T for c in sources]
    u, s, _ = torch.linalg.svd(torch.cat(narrow, dim=1), full_matrices=False)
    return u[:, s > ROUNDING * s[:1]]
