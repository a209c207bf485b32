"""A matrix without components already taken from it, and both its products in one pass over it."""

import torch
from jaxtyping import Float
from torch import Tensor

from svdmerge.core.components import RankOneComponents

# Rows of A for both products at once: of 2048 columns they fit the nearer caches, so that A is
# read from memory once, not twice. A third less time from a side of 1024 on, nothing lost below.
TILE = 512


class Deflated:
    """B = (I - U U^T) A (I - V V^T) with U and V of components `known`, never formed."""

    def __init__(self, a: Float[Tensor, "m n"], known: RankOneComponents) -> None:
        here = known.to(a.dtype)
        self.a, self.u, self.v = a, here.u, here.vh.T
        # A^T U: what A^T gives for the part of y along U, which is then taken off afterwards.
        self._pulled = a.T @ here.u if len(known) else a.new_zeros(a.shape[1], 0)

    def step(self, x: Float[Tensor, "n b"]) -> tuple[Float[Tensor, "m b"], Float[Tensor, "n b"]]:
        """B x and B^T B x, for x orthogonal to V."""
        y = self.a.new_empty(self.a.shape[0], x.shape[1])
        turned = self.a.new_zeros(x.shape[1], self.a.shape[1])
        for start in range(0, self.a.shape[0], TILE):
            rows, part = self.a[start : start + TILE], y[start : start + TILE]
            torch.mm(rows, x, out=part)
            turned.addmm_(part.T, rows)
        z = turned.T
        if self.u.shape[1] == 0:
            return y, z
        along = self.u.T @ y
        return y - self.u @ along, without(z - self._pulled @ along, self.v)


def without(x: Float[Tensor, "n b"], directions: Float[Tensor, "n k"]) -> Float[Tensor, "n b"]:
    """x less its part along orthonormal directions."""
    return x if directions.shape[1] == 0 else x - directions @ (directions.T @ x)
