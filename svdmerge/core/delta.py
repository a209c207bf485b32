"""The difference of a source's matrix to the base's."""

import torch
from jaxtyping import Float
from torch import Tensor

# Differences are taken in float64: exact for float16, bfloat16 and float32 inputs of like exponent,
# and what the exact solver needs. Half precision never reaches an SVD.
DTYPE = torch.float64


def delta(
    source: Float[Tensor, "m n"], *, base: Float[Tensor, "m n"], dtype: torch.dtype = DTYPE
) -> Float[Tensor, "m n"]:
    """source - base in `dtype`: for float32 as if rounded from float64, for a single rounding is
    all that a difference of narrower or equal numbers takes."""
    wide = torch.promote_types(torch.promote_types(source.dtype, base.dtype), dtype)
    return (source.to(wide) - base.to(wide)).to(dtype)


def all_finite(tensor: Tensor) -> bool:
    """Whether no element is NaN or infinite."""
    # A sum is NaN or infinite if a term is; the slower check is for sums that overflow.
    return bool(torch.isfinite(tensor.sum())) or bool(torch.isfinite(tensor).all())
