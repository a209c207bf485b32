"""TIES: trim, elect a sign per entry, average what agrees (arXiv 2306.01708)."""

import math
from collections.abc import Callable, Iterable

import torch
from jaxtyping import Float
from torch import Tensor


def ties(
    deltas: Callable[[], Iterable[tuple[Float[Tensor, "m n"], float]]],
    *,
    density: float,
    scale: float,
) -> Float[Tensor, "m n"]:
    """scale * the mean, over the sources that agree with the elected sign, of trimmed differences.

    `deltas` gives the differences and weights anew at each call, in a fixed order: signs take one
    pass and means another, so that memory does not grow with the number of sources.

    Reference: arXiv 2306.01708, algorithm 1. Deviations: entries are trimmed per matrix, not over
    the whole model, as matrices are merged apart from each other. An entry whose sum is exactly
    zero elects no sign and stays the base's.
    """
    signs = _sum(_trimmed(deltas(), density)).sign_()
    total, agreeing = torch.zeros_like(signs), torch.zeros_like(signs)
    for delta in _trimmed(deltas(), density):
        agrees = (delta * signs) > 0  # a trimmed entry, and one without a sign, agrees with none
        total += torch.where(agrees, delta, 0.0)
        agreeing += agrees
    return total / agreeing.clamp_(min=1) * scale


def trim(delta: Float[Tensor, "m n"], *, density: float) -> Float[Tensor, "m n"]:
    """The floor(density * numel) entries of largest magnitude, at least one; the rest zero.

    Entries that tie with the smallest one kept are kept too: which of them come first is no
    property of the source.
    """
    if delta.numel() == 0:
        return delta
    size = delta.abs()
    # 1e-9 as for budgets: 0.29 * 100 = 28.999999999999996 is 29.
    kept = max(1, math.floor(density * delta.numel() + 1e-9))
    threshold = size.flatten().kthvalue(delta.numel() - kept + 1).values
    return torch.where(size >= threshold, delta, 0.0)


def _trimmed(deltas: Iterable[tuple[Tensor, float]], density: float) -> Iterable[Tensor]:
    return (trim(d.to(torch.float64), density=density) * weight for d, weight in deltas)


def _sum(terms: Iterable[Tensor]) -> Tensor:
    total: Tensor | None = None
    for term in terms:
        total = term if total is None else total.add_(term)
    if total is None:
        raise ValueError("signs of no sources")
    return total
