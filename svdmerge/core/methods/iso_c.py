"""Iso-C: the summed difference with an isotropic spectrum (arXiv 2502.04959)."""

import torch
from jaxtyping import Float
from torch import Tensor

from svdmerge.core.components import RankOneComponents
from svdmerge.core.svd import exact


def iso_c(summed: Float[Tensor, "m n"]) -> RankOneComponents:
    """The SVD of the sum of differences, every singular value set to the mean of all r.

    Deviation: where the sum has no full rank, directions of its null space, which any solver may
    choose as it likes, stay at zero; the zeros count in the mean, as published.
    """
    found = exact(summed)
    rank = int((found.s > 0).sum())
    kept = found.slice(0, rank)
    return RankOneComponents(u=kept.u, s=torch.ones_like(kept.s) * found.s.mean(), vh=kept.vh)
