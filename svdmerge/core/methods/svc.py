"""SVC: AXIS with singular values calibrated against over-counting (arXiv 2602.05536)."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from svdmerge.core.components import RankOneComponents
from svdmerge.core.methods.axis import axis

# A source's response along a direction below this share of the merged one is rounding of the
# float32 in which components are stored; divided by, it would count as any number of copies.
ROUNDING = 1e-6


def svc(
    parts: Sequence[RankOneComponents],
    *,
    weights: Sequence[float],
    num_sources: int,
    scale: float,
) -> RankOneComponents:
    """Merged factors as AXIS's, each singular value over the times that its direction was counted.

    With the merged D = U diag(s) Vh, direction r and source i's kept part D_i, the responses are
    a = u_r^T D and a_i = u_r^T D_i, the counting is c_i = <a, a_i> / ||a_i||^2, and s_r is
    multiplied by N / sum_i max(1, c_i): an own direction of one source stays, one that all N share
    is divided by N. Values are sorted again, for the largest are those most calibrated.

    Reference: arXiv 2602.05536, column space, with alpha = 1, its setting for merges that are sums
    (1 / N is for means). A source without a response, or of which nothing is kept, counts as alpha.
    """
    merged = axis(parts, weights=weights, scale=1.0)
    counted = torch.full_like(merged.s, num_sources - len(parts))
    for part, weight in zip(parts, weights, strict=True):
        counted += _times_counted(merged, part.scaled(weight)).clamp(min=1.0)
    s = merged.s * (num_sources / counted) * scale
    order = s.argsort(descending=True, stable=True)
    return RankOneComponents(u=merged.u[:, order], s=s[order], vh=merged.vh[order])


def _times_counted(merged: RankOneComponents, part: RankOneComponents) -> Float[Tensor, " k"]:
    """How often each merged direction holds a source's response along it; 0 where it has none."""
    response = ((merged.u.T @ part.u) * part.s) @ part.vh
    # a = s_r v_r, for the merged factors are an SVD.
    inner = (response * merged.vh).sum(dim=1) * merged.s
    size = torch.linalg.vector_norm(response, dim=1)
    return torch.where(size > ROUNDING * merged.s, inner / size.square(), 0.0)
