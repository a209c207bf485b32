"""The leading singular triplets of a matrix, by block Lanczos with full reorthogonalisation."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from svdmerge.core.components import RankOneComponents
from svdmerge.core.deflated import Deflated, without
from svdmerge.core.products import Products

# Of ||A^T u - s v||: no more than this share of the largest singular value, which the residual of
# what is kept inherits (promised: 1e-4), ...
RESIDUAL = 3e-5
# ... and no more than this share of the value itself. Its error is the square over the gap to what
# the basis lacks, about a third of it: 3e-6, below the 1e-5 promised at a cut.
OWN_RESIDUAL = 1e-3
# Values below this share of the matrix's largest are out of reach: rounding of the products leaves
# about ten eps of the largest in every residual, and eps of its square in A^T A.
REACH = {torch.float32: 1e-2, torch.float64: 1e-6}
# Of eps and the largest value squared: what rounding leaves in a next block of nothing, measured
# two to four.
SPENT = 8.0

# Steps before the first look at the Ritz values, which costs as much as a step on small matrices:
# little but a matrix of low rank has converged before.
BLIND_STEPS = 5
# By how much the residuals shrink in a step, about: so many more pass before the next look.
SHRINKS = 20.0


def leading(
    a: Products, *, known: RankOneComponents, width: int, max_steps: int, seed: int
) -> Float[Tensor, "n b"]:
    """Right vectors, at most `width`, of the largest components of B = (I - U U^T) A (I - V V^T),
    U and V those of `known`: the converged ones, down to what the dtype of A can reach.

    Stops when all `width` have converged, when only rounding is left, or after `max_steps` blocks.
    A wide A takes no more passes than a tall one, only longer vectors.

    Reference: block Lanczos on A^T A, Golub, Underwood 1977; convergence without a gap, Musco,
    Musco, arXiv 1504.05477, algorithm 2.
    """
    krylov = _Krylov(a, known=known, width=width, max_steps=max_steps, seed=seed)
    look = BLIND_STEPS + 1
    while True:
        krylov.extend()
        last = krylov.steps == krylov.max_steps or krylov.is_spent()
        if krylov.steps < look and not last:
            continue
        ritz = krylov.look()
        if ritz.worst <= 1.0 or last:
            return krylov.basis() @ ritz.vectors[:, : ritz.converged]
        look = krylov.steps + max(1, int(math.log(ritz.worst, SHRINKS)))


def rayleigh_ritz(
    a: Products, right: Float[Tensor, "n b"], known: RankOneComponents
) -> RankOneComponents:
    """The best components of B within the span of right vectors, in float64.

    Values err by the squared residual over the gap, and no longer by the rounding of products.
    """
    exact = known.to(torch.float64)
    v = torch.linalg.qr(without(right.double(), exact.vh.T)).Q
    u, s, vh = torch.linalg.svd(without(a.image(v), exact.u), full_matrices=False)
    return RankOneComponents(u=u, s=s, vh=vh @ v.T)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Ritz:
    """The leading approximations within a basis."""

    vectors: Float[Tensor, "b k"]
    converged: int
    """How many of the leading ones have converged, and can be reached in this dtype."""
    worst: float
    """The largest ratio of a residual to what is allowed."""


class _Krylov:
    """An orthonormal basis Q of the Krylov space of B^T B, and the Gram matrix of B Q."""

    def __init__(
        self, a: Products, *, known: RankOneComponents, width: int, max_steps: int, seed: int
    ) -> None:
        (m, n), k = a.shape, len(known)
        self.b, self.width, self.steps = Deflated(a, known.vh.T, known.u), width, 0
        # A block must fit beside what is there.
        self.max_steps = max(1, min(max_steps, (n - k) // width))
        # V, then Q: what new columns must be orthogonal to.
        like: dict[str, Any] = {"dtype": a.dtype, "device": a.device}
        self._span = torch.empty(n, k + self.max_steps * width, **like)
        self._span[:, :k] = self.b.v
        self._images = torch.empty(m, self.max_steps * width, **like)
        self._gram = torch.zeros(self.max_steps * width, self.max_steps * width, **like)
        self._num_known = k
        self._largest = float(known.s.max()) if k else 0.0
        generator = torch.Generator().manual_seed(seed)
        # Drawn on the CPU whatever the device, so that all start from the same columns.
        start = torch.randn(n, width, generator=generator).to(**like)
        self._next, self._coupling = torch.linalg.qr(start)

    def basis(self) -> Float[Tensor, "n b"]:
        """Q so far."""
        return self._span[:, self._num_known : self._num_known + self.steps * self.width]

    def extend(self) -> None:
        """One more block: B^T B times the last one, orthogonalised twice."""
        done, size, k = self.steps * self.width, (self.steps + 1) * self.width, self._num_known
        # Again, on unit columns: orthogonal also where rounding was all that was left of them.
        columns = torch.linalg.qr(without(self._next, self._span[:, : k + done])).Q
        self._span[:, k + done : k + size] = columns
        self._images[:, done:size], image = self.b.step(columns)
        self._gram[:size, done:size] = self._images[:, :size].T @ self._images[:, done:size]
        self._gram[done:size, :size] = self._gram[:size, done:size].T
        self._next, self._coupling = torch.linalg.qr(without(image, self._span[:, : k + size]))
        self.steps += 1

    def is_spent(self) -> bool:
        """Whether rounding is all that is left of the next block: directions made of it would cost
        the basis its orthogonality."""
        largest = max(self._largest**2, float(self._gram.diagonal().max()))
        rounding = SPENT * torch.finfo(self._coupling.dtype).eps * largest
        return float(torch.linalg.vector_norm(self._coupling)) <= rounding

    def look(self) -> _Ritz:
        """The leading Ritz vectors, and how far they have converged."""
        size, width = self.steps * self.width, self.width
        values, vectors = torch.linalg.eigh(self._gram[:size, :size])
        sigma, vectors = values[-width:].flip(0).clamp(min=0.0).sqrt(), vectors[:, -width:].flip(1)
        # ||B^T B v - s^2 v||, that is s ||B^T u - s v||.
        residual = torch.linalg.vector_norm(self._coupling @ vectors[-width:], dim=0)
        scale = max(self._largest, float(sigma[0]))
        allowed = torch.clamp(OWN_RESIDUAL * sigma, max=RESIDUAL * scale) * sigma
        # Below rounding there is nothing to converge to.
        least = max(torch.finfo(sigma.dtype).eps * scale**2, torch.finfo(sigma.dtype).tiny)
        ratio = residual / allowed.clamp(min=least)
        converged = int((ratio <= 1.0).long().cumprod(dim=0).sum())
        reached = int((sigma >= REACH[sigma.dtype] * scale).sum())
        return _Ritz(vectors=vectors, converged=min(converged, reached), worst=float(ratio.max()))
