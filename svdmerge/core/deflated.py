"""A matrix without components already taken from it, and products in one pass over it."""

import torch
from jaxtyping import Float
from torch import Tensor

# Rows of A for both products at once: of 2048 columns they fit the nearer caches, so that A is
# read from memory once, not twice. A third less time from a side of 1024 on, nothing lost below.
TILE = 512
# Rows that are turned to float64 at once: the copy stays in the nearest cache.
DOUBLED = 128


class Deflated:
    """B = A (I - V V^T), or (I - U U^T) A (I - V V^T) where U is given; never formed.

    For any V of k columns no singular value of A after the k-th is above ||A (I - V V^T)||. With U
    what V's errors leave of the components taken does not show among small values.
    """

    def __init__(
        self, a: Float[Tensor, "m n"], v: Float[Tensor, "n k"],
        u: Float[Tensor, "m k"] | None = None,
    ) -> None:  # fmt: skip
        self.a, self.v = a, v.to(a.dtype)
        self.u = a.new_zeros(a.shape[0], 0) if u is None else u.to(a.dtype)
        # A^T U: what A^T gives for the part of y along U, which is then taken off afterwards.
        self._pulled = a.T @ self.u

    def step(self, x: Float[Tensor, "n b"]) -> tuple[Float[Tensor, "m b"], Float[Tensor, "n b"]]:
        """B x and B^T B x, for x orthogonal to V."""
        y = self.a.new_empty(self.a.shape[0], x.shape[1])
        turned = self.a.new_zeros(x.shape[1], self.a.shape[1])
        for start in range(0, self.a.shape[0], TILE):
            rows, part = self.a[start : start + TILE], y[start : start + TILE]
            torch.mm(rows, x, out=part)
            turned.addmm_(part.T, rows)
        z = turned.T
        if self.u.shape[1] > 0:
            along = self.u.T @ y
            y, z = y - self.u @ along, z - self._pulled @ along
        return y, without(z, self.v)


def without(x: Float[Tensor, "n b"], directions: Float[Tensor, "n k"]) -> Float[Tensor, "n b"]:
    """x less its part along orthonormal directions."""
    return x if directions.shape[1] == 0 else x - directions @ (directions.T @ x)


def image(a: Float[Tensor, "m n"], x: Float[Tensor, "n b"]) -> Float[Tensor, "m b"]:
    """A x in float64, without a copy of A in it."""
    turned = x.double().T
    return torch.cat([turned @ rows.double().T for rows in a.split(DOUBLED)], dim=1).T
