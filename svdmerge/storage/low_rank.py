"""A tensor's difference as an adapter's file holds it: in factors, read when they are needed."""

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from svdmerge.errors import ContentError
from svdmerge.storage.checkpoint import TensorRef

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class Stack:
    """Which matrix of how many experts, whose factors lie in one another: A is
    (experts * rank, n), B (m, rank * experts), the experts of its columns counted first."""

    experts: int
    expert: int | None
    """Which one; None if the base's tensor is a stack as well."""
    first: int
    """Its first row of that expert's."""
    rows: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LowRank:
    """A tensor's difference: scale * up @ down, or scale * up where there is no down."""

    tensor: str
    """The base's tensor."""
    up: TensorRef
    """B, (m, rank), of kernels (m, rank, 1, 1); without `down` the difference itself."""
    down: TensorRef | None
    """A, (rank, n), of kernels (rank, in, h, w)."""
    scale: float
    """Strength without `alpha`, else what alpha is multiplied by."""
    alpha: TensorRef | None = None
    """A stored scalar that multiplies the scale."""
    transposed: bool = False
    """Whether the base stores this layer as (in, out)."""
    stack: Stack | None = None
    """Set if the factors are those of a stack of experts."""

    @property
    def rank(self) -> int:
        """Components at most."""
        rank = self.down.shape[0] if self.down else 1
        return rank // self.stack.experts if self.stack else rank

    @property
    def nbytes(self) -> int:
        """What is read for a matrix."""
        alpha = self.alpha.nbytes if self.alpha else 0
        down = self.down.nbytes if self.down else 0
        if self.stack is None:
            return self.up.nbytes + down + alpha
        up = self.up.nbytes // self.up.shape[0] * self.stack.rows
        return (up + down) // self.stack.experts + alpha

    def read(self, matrix: int = 0) -> "tuple[torch.Tensor, torch.Tensor, str]":
        """Up (m, rank), with all scales in it, and down (rank, n), in float64 and as the base
        stores the matrix, (1, n) if it is a vector; and sha256 of all that they depend on.

        `matrix` says which, where the base's tensor is a stack.

        Raises:
            ContentError: NaN or Inf in a factor.
        """
        import torch

        digest = hashlib.sha256(f"{self.scale!r} {self.transposed}".encode())
        up, down = self._factors(matrix)
        alpha = None if self.alpha is None else _values(self.alpha)
        for values in (up, down, alpha):
            if values is not None:
                digest.update(values.contiguous().numpy().tobytes())
        scale = self.scale * (1.0 if alpha is None else float(alpha))
        if down is None:
            one = torch.full((1, 1), scale, dtype=up.dtype)
            return one, up.reshape(1, -1), digest.hexdigest()
        up = scale * up
        pair = (down.T, up.T) if self.transposed else (up, down)
        return *pair, digest.hexdigest()

    def read_dense(self, *, start: int, count: int) -> "tuple[torch.Tensor, str]":
        """So many elements of the difference from one on, flat, in whole matrices; and sha256 as
        `read` gives it, of all of them."""
        import torch

        first, last = 0, 1
        if self.stack is not None and self.stack.expert is None and self.down is not None:
            size = self.up.shape[0] * self.down.shape[1]
            first, last = start // size, (start + count) // size
        read = [self.read(matrix) for matrix in range(first, last)]
        digests = [digest for _, _, digest in read]
        whole = (
            digests[0] if len(read) == 1 else hashlib.sha256(" ".join(digests).encode()).hexdigest()
        )
        return torch.cat([(up @ down).reshape(-1) for up, down, _ in read]), whole

    def _factors(self, matrix: int) -> "tuple[torch.Tensor, torch.Tensor | None]":
        if self.down is None:
            return _values(self.up), None
        if self.stack is None:
            up = _values(self.up).reshape(self.up.shape[:2])
            return up, _values(self.down).reshape(self.rank, -1)
        expert = matrix if self.stack.expert is None else self.stack.expert
        columns, size = self.up.shape[1], self.rank * self.down.shape[1]
        first, rows = self.stack.first * columns, self.stack.rows * columns
        up = _kept(self.up, first, rows).reshape(self.stack.rows, self.rank, self.stack.experts)
        down = _values(self.down, start=expert * size, count=size)
        return up[:, :, expert], down.reshape(self.rank, -1)


def _values(ref: TensorRef, *, start: int = 0, count: int | None = None) -> "torch.Tensor":
    """So many elements of a factor, flat and in float64."""
    import torch

    values = ref.decode(ref.read_bytes(start=start, count=count), start=start).to(torch.float64)
    if not torch.isfinite(values).all():
        raise ContentError(
            f"{ref.folder.uri}/{ref.file}: {ref.name} holds NaN or Inf",
            "Nothing of this unit was published.",
            "Remove or repair the adapter.",
        )
    return values


@lru_cache(maxsize=4)
def _kept(ref: TensorRef, start: int, count: int) -> "torch.Tensor":
    """As `_values`, for what every expert takes columns of: gate's, up's and down's in turn."""
    return _values(ref, start=start, count=count)
