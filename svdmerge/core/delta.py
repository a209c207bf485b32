"""The difference of a source's matrix to the base's."""

import torch
from jaxtyping import Float
from torch import Tensor

# Differences are taken in float64: exact for float16, bfloat16 and float32 inputs of like exponent,
# and what the exact solver needs. Half precision never reaches an SVD.
DTYPE = torch.float64


def delta(source: Float[Tensor, "m n"], *, base: Float[Tensor, "m n"]) -> Float[Tensor, "m n"]:
    """source - base in float64."""
    return source.to(DTYPE) - base.to(DTYPE)


def all_finite(tensor: Tensor) -> bool:
    """Whether no element is NaN or infinite."""
    # A sum is NaN or infinite if a term is; the slower check is for sums that overflow.
    return bool(torch.isfinite(tensor.sum())) or bool(torch.isfinite(tensor).all())
