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


def orthonormal(x: Float[Tensor, "*b n w"]) -> Factors:
    """Householder's QR on a CPU; elsewhere few large products, where it would be many small
    kernels."""
    return Factors(*torch.linalg.qr(x)) if x.device.type == "cpu" else cholesky_qr(x)


def cholesky_qr(x: Float[Tensor, "*b n w"]) -> Factors:
    """CholeskyQR, twice, in float64: as exact as Householder's for any x that float32 can tell from
    a singular one. A column that depends on those before it comes back as zero, or of rounding.

    Reference: CholeskyQR2, Fukaya, Nakatsukasa, Yanagisawa, Yamamoto 2014; the shift, Fukaya and
    others, arXiv 1809.11085.
    """
    q, r = x.to(torch.float64), torch.eye(x.shape[-1], dtype=torch.float64, device=x.device)
    eps = torch.finfo(torch.float64).eps
    for _ in range(2):
        gram = q.mT @ q
        shift = SHIFT * eps * gram.diagonal(dim1=-2, dim2=-1).sum(dim=-1).clamp(min=eps**4)
        gram = gram + shift[..., None, None] * torch.eye(x.shape[-1]).to(gram)
        upper = torch.linalg.cholesky_ex(gram, upper=True).L
        q = torch.linalg.solve_triangular(upper, q, upper=True, left=False)
        r = upper @ r
    return Factors(q.to(x.dtype), r.to(x.dtype))
