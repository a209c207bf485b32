"""Plain averaging of differences: what every method does with vectors, and a method of its own."""

from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor


def average(
    deltas: Iterable[tuple[Float[Tensor, "1 n"], float]], *, num_sources: int, scale: float
) -> Float[Tensor, "1 n"]:
    """scale / N * sum of weight * delta in float64, in the order given, one delta in memory."""
    total: Tensor | None = None
    for delta, weight in deltas:
        term = delta.to(torch.float64) * weight
        total = term if total is None else total.add_(term)
    if total is None:
        raise ValueError("average of no sources")
    return total * (scale / num_sources)
