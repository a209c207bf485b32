"""DARE: drop entries at random, rescale the rest, and add (arXiv 2311.03099)."""

import hashlib
from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor

from svdmerge.core.methods.task_arithmetic import task_arithmetic


def dare(
    deltas: Iterable[tuple[Float[Tensor, "m n"], float]],
    *,
    seeds: Iterable[int],
    density: float,
    scale: float,
) -> Float[Tensor, "m n"]:
    """scale * sum of weight * delta, each entry of each delta kept with probability `density`.

    Kept entries are divided by `density`, so that each difference keeps its mean (the paper's
    1 / (1 - p), p the probability to drop).
    """
    dropped = (
        (drop(delta.to(torch.float64), seed=seed, density=density), weight)
        for (delta, weight), seed in zip(deltas, seeds, strict=True)
    )
    return task_arithmetic(dropped, scale=scale)


def drop(delta: Float[Tensor, "m n"], *, seed: int, density: float) -> Float[Tensor, "m n"]:
    """The entries that the seed keeps, divided by `density`; the rest zero."""
    generator = torch.Generator().manual_seed(seed)
    keep = torch.rand(delta.shape, generator=generator, dtype=torch.float64) < density
    return torch.where(keep, delta / density, 0.0)


def seed_of(parameter: str, *, content: str) -> int:
    """What a source's dropped entries follow from: the parameter, and sha256 of its bytes there.

    So neither the order of sources nor the worker changes a bit; copies of a source drop alike.
    """
    text = f"{parameter}\0{content}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
