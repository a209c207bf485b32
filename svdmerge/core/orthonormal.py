"""Orthonormal columns of the same span, a stack of matrices at once."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

# Of eps in float64 and the squared norm, added to a Gram matrix so that columns which depend on
# each other do not stop its factorisation.
SHIFT = 16.0


class Factors(NamedTuple):
    """x = q r, q's columns orthonormal."""

    q: Float[Tensor, "*b n w"]
    r: Float[Tensor, "*b w w"]


def orthonormal(x: Float[Tensor, "*b n w"], *, passes: int = 2) -> Factors:
    """Householder's QR on a CPU; elsewhere few large products, where it would be many small
    kernels. For `passes` see `cholesky_qr`."""
    if x.device.type == "cpu":
        return Factors(*torch.linalg.qr(x))
    return cholesky_qr(x, passes=passes)


def cholesky_qr(x: Float[Tensor, "*b n w"], *, passes: int = 2) -> Factors:
    """CholeskyQR, twice, in float64: as exact as Householder's for any x that float32 can tell from
    a singular one. A column that depends on those before it comes back as zero, or of rounding.

    One of the passes leaves an error of the squared condition: enough where another follows.

    Reference: CholeskyQR2, Fukaya, Nakatsukasa, Yanagisawa, Yamamoto 2014; the shift, Fukaya and
    others, arXiv 1809.11085.
    """
    identity = torch.eye(x.shape[-1], dtype=torch.float64, device=x.device)
    q, r = x.to(torch.float64), identity
    eps = torch.finfo(torch.float64).eps
    for _ in range(passes):
        gram = q.mT @ q
        shift = SHIFT * eps * gram.diagonal(dim1=-2, dim2=-1).sum(dim=-1).clamp(min=eps**4)
        upper = torch.linalg.cholesky_ex(gram + shift[..., None, None] * identity, upper=True).L
        # A small inverse and a large product, for solving with few right sides is slow on a GPU.
        q = q @ torch.linalg.solve_triangular(upper, identity.expand_as(upper), upper=True)
        r = upper @ r
    return Factors(q.to(x.dtype), r.to(x.dtype))
