"""A matrix as iterative solvers see it: products with a few columns, one pass over it for each."""

from collections.abc import Iterable
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

# Rows of A for both products at once: of 2048 columns they fit the nearer caches, so that A is
# read from memory once, not twice. A third less time from a side of 1024 on, nothing lost below.
TILE = 512
# Rows that are turned to float64 at once: the copy stays in the nearest cache.
DOUBLED = 128


@runtime_checkable
class Products(Protocol):
    """An (m, n) matrix A, wherever it lies. `dtype` is that of products but `image`'s."""

    @property
    def shape(self) -> tuple[int, int]: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def device(self) -> torch.device: ...

    def step(self, x: Float[Tensor, "n b"]) -> tuple[Float[Tensor, "m b"], Float[Tensor, "n b"]]:
        """A x and A^T A x."""
        ...

    def image(self, x: Float[Tensor, "n b"]) -> Float[Tensor, "m b"]:
        """A x in float64."""
        ...

    def pulled(self, u: Float[Tensor, "m b"]) -> Float[Tensor, "n b"]:
        """A^T u."""
        ...


class Dense:
    """A matrix in memory; its products in `dtype`."""

    def __init__(self, matrix: Float[Tensor, "m n"], dtype: torch.dtype) -> None:
        self._original = matrix
        self._a = matrix.to(dtype).contiguous()
        self.dtype, self.device = dtype, matrix.device

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n)."""
        m, n = self._a.shape
        return m, n

    def step(self, x: Float[Tensor, "n b"]) -> tuple[Float[Tensor, "m b"], Float[Tensor, "n b"]]:
        """A x and A^T A x, A read once."""
        return step(self._a.split(TILE), x)

    def image(self, x: Float[Tensor, "n b"]) -> Float[Tensor, "m b"]:
        """A x in float64, without a copy of A in it."""
        return image(self._original.split(DOUBLED), x)

    def pulled(self, u: Float[Tensor, "m b"]) -> Float[Tensor, "n b"]:
        """A^T u."""
        return self._a.T @ u


def step(
    tiles: Iterable[Float[Tensor, "_ n"]], x: Float[Tensor, "n b"]
) -> tuple[Float[Tensor, "m b"], Float[Tensor, "n b"]]:
    """A x and A^T A x of the matrix whose rows the tiles are."""
    parts, turned = list[Tensor](), x.new_zeros(x.shape[1], x.shape[0])
    for rows in tiles:
        parts.append(rows @ x)
        turned.addmm_(parts[-1].T, rows)
    return torch.cat(parts), turned.T


def image(tiles: Iterable[Float[Tensor, "_ n"]], x: Float[Tensor, "n b"]) -> Float[Tensor, "m b"]:
    """A x in float64, of the matrix whose rows the tiles are."""
    turned = x.double().T
    return torch.cat([turned @ rows.double().T for rows in tiles], dim=1).T
