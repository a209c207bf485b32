"""A matrix without components already taken from it."""

from jaxtyping import Float
from torch import Tensor

from svdmerge.core.products import Products


class Deflated:
    """B = A (I - V V^T), or (I - U U^T) A (I - V V^T) where U is given; never formed.

    For any V of k columns no singular value of A after the k-th is above ||A (I - V V^T)||. With U
    what V's errors leave of the components taken does not show among small values.
    """

    def __init__(
        self, a: Products, v: Float[Tensor, "*b n k"], u: Float[Tensor, "m k"] | None = None
    ) -> None:
        self.a, self.v = a, v.to(a.dtype)
        # Nothing to take off costs no pass over A.
        self.u = None if u is None or u.shape[-1] == 0 else u.to(a.dtype)
        # A^T U: what A^T gives for the part of y along U, which is then taken off afterwards.
        self._pulled = None if self.u is None else a.pulled(self.u)

    def step(
        self, x: Float[Tensor, "*b n w"]
    ) -> tuple[Float[Tensor, "*b m w"], Float[Tensor, "*b n w"]]:
        """B x and B^T B x, for x orthogonal to V."""
        y, z = self.a.step(x)
        if self.u is not None and self._pulled is not None:
            along = self.u.T @ y
            y, z = y - self.u @ along, z - self._pulled @ along
        return y, without(z, self.v)


def without(x: Float[Tensor, "*b n w"], directions: Float[Tensor, "*c n k"]) -> Tensor:
    """x less its part along orthonormal directions."""
    return x if directions.shape[-1] == 0 else x - directions @ (directions.mT @ x)
