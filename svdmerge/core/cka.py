"""How alike two representations of the same samples are, up to rotation and scale."""

import torch
from jaxtyping import Float
from torch import Tensor


def linear_cka(x: Float[Tensor, "b i"], y: Float[Tensor, "b j"]) -> float:
    """Linear centred kernel alignment: 1 for the same up to rotation and scale, 0 for unrelated.

    Of few samples for the dimensions it is biased upwards: compare with a floor of equal sizes.
    0 where a side is constant.

    Reference: arXiv 1905.00414, section 3, equation of linear CKA.
    """
    a, b = (z.to(torch.float64) - z.to(torch.float64).mean(dim=0) for z in (x, y))
    # Squared Frobenius norms of (features x features) products: no (b, b) kernel is formed.
    shared = (a.T @ b).square().sum()
    own = (a.T @ a).norm() * (b.T @ b).norm()
    return float(shared / own) if float(own) > 0 else 0.0
