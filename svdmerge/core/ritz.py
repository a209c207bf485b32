"""The leading eigenpairs of Lanczos' projected matrices, a stack at once: on a CPU by LAPACK,
elsewhere by few products, for a GPU's eigensolvers take milliseconds for each matrix."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from svdmerge.core.orthonormal import cholesky_qr

# Columns beside those wanted, so that these stand apart from what the subspace lacks.
EXTRA = 16
# Products between orthogonalisations, and how often: of a power law of exponent 0.6 and 48 wanted
# values each product leaves 0.69 of what the subspace lacks, 24 of them 1e-4. Four in a row leave
# enough of float64.
APPLIED, ROUNDS = 4, 6


class Pairs(NamedTuple):
    """Of each matrix the leading approximations to eigenpairs of B^T B, descending."""

    vectors: Float[Tensor, "b s w"]
    """In terms of the basis."""
    values: Float[np.ndarray, "b w"]
    residuals: Float[np.ndarray, "b w"]
    """||B^T B v - value v||."""


def leading_pairs(gram: Float[Tensor, "b s s"], coupling: Float[Tensor, "b w w"]) -> Pairs:
    """As many as a block is wide. B^T B takes the basis to itself times `gram`, and the last block
    of it besides to the next one times `coupling`."""
    # The subspace is exact to eps of the largest value, which is all that float32 products are.
    few_products = gram.device.type != "cpu" and gram.dtype == torch.float32
    return by_subspace(gram, coupling) if few_products else by_eigh(gram, coupling)


def by_eigh(gram: Float[Tensor, "b s s"], coupling: Float[Tensor, "b w w"]) -> Pairs:
    """By LAPACK's eigensolver, or the device's."""
    width = coupling.shape[-1]
    values, vectors = torch.linalg.eigh(gram)
    vectors = vectors[:, :, -width:]
    residuals = torch.linalg.vector_norm(coupling @ vectors[:, -width:], dim=1)
    # What is decided from few numbers is decided on the host, in one transfer.
    told = torch.stack([values[:, -width:], residuals], dim=1).flip(2).cpu().numpy()
    told = told.astype(np.float64)
    return Pairs(vectors=vectors.flip(2), values=told[:, 0], residuals=told[:, 1])


def by_subspace(gram: Float[Tensor, "b s s"], coupling: Float[Tensor, "b w w"]) -> Pairs:
    """By subspace iteration in float64 and Rayleigh-Ritz. What it has not found shows in the
    residuals, for they are of B^T B itself.

    Reference: Stewart, "Simultaneous iteration for computing invariant subspaces", 1976.
    """
    width, size = coupling.shape[-1], gram.shape[-1]
    # Symmetric to float64's eps, or rounding would weigh in the small differences of squares below.
    t = gram.double()
    t = (t + t.mT) / 2
    # The first columns are of the random start: as good a one here.
    y = torch.eye(size, min(size, width + EXTRA)).to(t).expand(len(t), -1, -1)
    if y.shape[-1] < size:
        tiny = torch.finfo(t.dtype).tiny
        for _ in range(ROUNDS):
            for _ in range(APPLIED):
                y = t @ y
            y = y / torch.linalg.vector_norm(y, dim=1, keepdim=True).clamp(min=tiny)
            y = cholesky_qr(y, passes=1).q
        y = cholesky_qr(y).q
    image, beyond = t @ y, coupling.double() @ y[:, -width:]
    squares = image.mT @ image + beyond.mT @ beyond
    projected, squares = torch.stack([y.mT @ image, squares]).cpu()
    values, turn = (x[..., -width:].flip(-1) for x in each_on_host(torch.linalg.eigh, projected))
    # ||B^T B v||^2 - value^2; below eps of the largest, rounding.
    residuals = ((turn * (squares @ turn)).sum(dim=1) - values**2).clamp(min=0.0).sqrt()
    vectors = (y @ turn.to(y)).to(gram.dtype)
    return Pairs(vectors=vectors, values=values.numpy(), residuals=residuals.numpy())


def each_on_host(
    solver: Callable[[Tensor], Sequence[Tensor]], stack: Float[Tensor, "*b w w"]
) -> list[Tensor]:
    """What LAPACK gives of each of a stack of small matrices, the host's cores side by side, on the
    stack's device."""
    matrices = stack.reshape(-1, *stack.shape[-2:]).cpu()
    with ThreadPoolExecutor() as pool:
        parts = zip(*pool.map(solver, matrices), strict=True)
        found = [torch.stack(part) for part in parts]
    return [x.reshape(*stack.shape[:-2], *x.shape[1:]).to(stack.device) for x in found]
