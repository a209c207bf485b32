"""Task arithmetic: the scaled sum of differences (arXiv 2212.04089)."""

from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor


def task_arithmetic(
    deltas: Iterable[tuple[Float[Tensor, "m n"], float]], *, scale: float
) -> Float[Tensor, "m n"]:
    """scale * sum of weight * delta in float64, in the order given, one delta in memory.

    `scale` is the paper's lambda, which it chooses on held-out data (0.3 to 0.4 for eight models).
    """
    total: Tensor | None = None
    for delta, weight in deltas:
        term = delta.to(torch.float64) * weight
        total = term if total is None else total.add_(term)
    if total is None:
        raise ValueError("a sum of no sources")
    return total * scale
