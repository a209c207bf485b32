"""Iso-C: the summed difference with an isotropic spectrum (arXiv 2502.04959)."""

import torch
from jaxtyping import Float
from torch import Tensor

from svdmerge.core.components import RankOneComponents
from svdmerge.core.svd import exact

# Directions below this share of the largest are rounding of float32 weights, not of the change.
ROUNDING = 1e-5


def iso_c(summed: Float[Tensor, "m n"]) -> RankOneComponents:
    """The SVD of the sum of differences, every singular value set to the mean of all r.

    Deviation: where the sum has no full rank, as that of low-rank changes, the directions of its
    null space stay at zero, for rounding alone chooses them; they count in the mean, as published.
    """
    found = exact(summed)
    rank = int((found.s > ROUNDING * found.s[:1]).sum())
    kept = found.slice(0, rank)
    return RankOneComponents(u=kept.u, s=torch.ones_like(kept.s) * found.s.mean(), vh=kept.vh)
