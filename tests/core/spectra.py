"""Matrices whose singular value decomposition is known, for every kind of spectrum."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Planted:
    """A matrix (m, n) made of u (m, r), s (r,), vh (r, n)."""

    matrix: Tensor
    u: Tensor
    s: Tensor
    vh: Tensor


def orthonormal(rows: int, columns: int, *, seed: int) -> Tensor:
    """Random orthonormal columns."""
    generator = torch.Generator().manual_seed(seed)
    random = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    return torch.linalg.qr(random).Q


def planted(s: Tensor, *, m: int, n: int, seed: int = 0) -> Planted:
    """A matrix with these singular values and random directions."""
    r = min(m, n)
    values = torch.zeros(r, dtype=torch.float64)
    values[: len(s)] = s.double()
    u, vh = orthonormal(m, r, seed=seed), orthonormal(n, r, seed=seed + 1).T
    return Planted(matrix=(u * values) @ vh, u=u, s=values, vh=vh)


def _ranks(r: int) -> Tensor:
    return torch.arange(1, r + 1, dtype=torch.float64)


SHAPES = [(40, 30), (30, 40), (24, 24), (1, 17), (23, 1), (1, 1), (64, 3)]

SPECTRA = {
    "low-rank": lambda r: torch.linspace(5, 1, max(1, r // 6)),
    "power-law": lambda r: 3.0 / _ranks(r),
    "repeated": lambda r: torch.cat([torch.full(((r + 1) // 2,), 2.0), torch.ones(r // 2)]),
    "zero": lambda r: torch.zeros(r),
    "rank-deficient": lambda r: 0.7 ** _ranks(r)[: max(1, r - 2)],
    "ill-conditioned": lambda r: 10.0 ** torch.linspace(0, -8, r, dtype=torch.float64),
    "flat": lambda r: torch.ones(r),
    "one-large": lambda r: torch.cat([torch.tensor([1e6]), torch.ones(r - 1)]),
    "tiny": lambda r: 1e-30 / _ranks(r),
    "huge": lambda r: 1e30 / _ranks(r),
}
