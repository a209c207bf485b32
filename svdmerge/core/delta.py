"""The difference of a source's matrix to the base's."""

import torch
from jaxtyping import Float
from torch import Tensor

# Differences are taken in float64: exact for float16, bfloat16 and float32 inputs of like exponent,
# and what the exact solver needs. Half precision never reaches an SVD.
DTYPE = torch.float64


def delta(
    source: Float[Tensor, "*b m n"], *, base: Float[Tensor, "*b m n"], dtype: torch.dtype = DTYPE,
    buffers: Float[Tensor, "2 m n"] | None = None,
) -> Float[Tensor, "*b m n"]:  # fmt: skip
    """source - base in `dtype`: for float32 as if rounded from float64, for a single rounding is
    all that a difference of narrower or equal numbers takes.

    `buffers` of that dtype are written to, the first of them the outcome: fresh memory for every
    tile of a large matrix would take as long as multiplying it.
    """
    wide = torch.promote_types(torch.promote_types(source.dtype, base.dtype), dtype)
    if buffers is None or wide != buffers.dtype:
        return (source.to(wide) - base).to(dtype)
    return buffers[0].copy_(source).sub_(buffers[1].copy_(base))


def all_finite(tensor: Tensor) -> bool:
    """Whether no element is NaN or infinite."""
    # A sum is NaN or infinite if a term is; the slower check is for sums that overflow.
    return bool(torch.isfinite(tensor.sum())) or bool(torch.isfinite(tensor).all())
