"""A matrix as iterative solvers see it: products with a few columns, one pass over it for each."""

from collections.abc import Iterable
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

# Elements of A for both products at once: they fit the nearer caches, so that A is read from memory
# once, not twice. A third less time from a side of 1024 on, nothing lost below.
TILE = 1 << 19
# Rows that are turned to float64 at once: the copy stays in the nearest cache.
DOUBLED = 128
# Elements that are on a GPU, where few large products are best: a gibibyte.
DOUBLED_ON_GPU = 1 << 27


@runtime_checkable
class Products(Protocol):
    """An (m, n) matrix A, or a stack of them, wherever they lie. `dtype` is that of products but
    `image`'s."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def device(self) -> torch.device: ...

    def step(
        self, x: Float[Tensor, "*b n w"]
    ) -> tuple[Float[Tensor, "*b m w"], Float[Tensor, "*b n w"]]:
        """A x and A^T A x."""
        ...

    def image(self, x: Float[Tensor, "*b n w"]) -> Float[Tensor, "*b m w"]:
        """A x in float64."""
        ...

    def pulled(self, u: Float[Tensor, "m w"]) -> Float[Tensor, "n w"]:
        """A^T u."""
        ...


class Dense:
    """A matrix in memory, or a stack of them; its products in `dtype`."""

    def __init__(self, matrix: Float[Tensor, "*b m n"], dtype: torch.dtype) -> None:
        self._original = matrix
        self._a = matrix.to(dtype).contiguous()
        self.dtype, self.device = dtype, matrix.device

    @property
    def shape(self) -> tuple[int, ...]:
        """(m, n), after the size of a stack."""
        return tuple(self._a.shape)

    def step(
        self, x: Float[Tensor, "*b n w"]
    ) -> tuple[Float[Tensor, "*b m w"], Float[Tensor, "*b n w"]]:
        """A x and A^T A x, A read once."""
        # Tiles are for a CPU's caches; elsewhere few large products are best.
        rows = max(1, TILE // x.shape[-2]) if x.device.type == "cpu" else self.shape[-2]
        if rows >= self.shape[-2]:
            y = self._a @ x
            return y, (y.mT @ self._a).mT
        return step(self._a.split(rows, dim=-2), x)

    def image(self, x: Float[Tensor, "*b n w"]) -> Float[Tensor, "*b m w"]:
        """A x in float64, without a copy of A in it."""
        a = self._original
        return image([a] if a.dtype == torch.float64 else doubled_tiles(a), x)

    def pulled(self, u: Float[Tensor, "m w"]) -> Float[Tensor, "n w"]:
        """A^T u."""
        return self._a.mT @ u


def doubled_tiles(a: Float[Tensor, "*b m n"]) -> tuple[Tensor, ...]:
    """Rows of A that are turned to float64 together."""
    m = a.shape[-2]
    on_gpu = max(1, DOUBLED_ON_GPU * m // max(1, a.numel()))
    return a.split(DOUBLED if a.device.type == "cpu" else on_gpu, dim=-2)


def step(
    tiles: Iterable[Float[Tensor, "*b _ n"]], x: Float[Tensor, "*b n w"]
) -> tuple[Float[Tensor, "*b m w"], Float[Tensor, "*b n w"]]:
    """A x and A^T A x of the matrix whose rows the tiles are."""
    parts, turned = list[Tensor](), x.new_zeros(x.mT.shape)
    for rows in tiles:
        parts.append(rows @ x)
        if x.dim() == 2:
            turned.addmm_(parts[-1].T, rows)
        else:
            turned += parts[-1].mT @ rows
    return torch.cat(parts, dim=-2) if len(parts) > 1 else parts[0], turned.mT


def image(
    tiles: Iterable[Float[Tensor, "*b _ n"]], x: Float[Tensor, "*b n w"]
) -> Float[Tensor, "*b m w"]:
    """A x in float64, of the matrix whose rows the tiles are."""
    turned = x.double().mT
    return torch.cat([turned @ rows.double().mT for rows in tiles], dim=-1).mT
