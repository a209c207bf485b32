"""How much two differences point the same way: principal angles of their leading subspaces."""

import torch
from jaxtyping import Float
from torch import Tensor


def principal_cosines(
    a: Float[Tensor, "m i"], b: Float[Tensor, "m j"]
) -> Float[Tensor, " min(i,j)"]:
    """Cosines of the principal angles between two spans of orthonormal columns, descending.

    Reference: Bjorck, Golub 1973, algorithm 1.
    """
    s = torch.linalg.svdvals(a.to(torch.float64).T @ b.to(torch.float64))
    return s.clamp(max=1.0)  # rounding can leave 1 + 1e-16


def overlap(a: Float[Tensor, "m i"], b: Float[Tensor, "m j"]) -> float:
    """Mean squared cosine of the principal angles: 1 for the same span, about max(i, j)/m for
    random ones; 0 where a span is empty."""
    cosines = principal_cosines(a, b)
    return float(cosines.square().mean()) if len(cosines) else 0.0
