"""The leading singular triplets of a matrix, by block Lanczos with full reorthogonalisation.

Everything works on a stack of matrices of one shape as on one: a leading `*b` is none, or its size.
Each matrix of a stack stops when it would by itself.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from svdmerge.core.components import RankOneComponents
from svdmerge.core.deflated import Deflated, without
from svdmerge.core.orthonormal import orthonormal
from svdmerge.core.products import Products
from svdmerge.core.ritz import each_on_host, leading_pairs
from svdmerge.core.svd import random_starts

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

# Steps before Ritz values alone, half a look's work, tell what is flat or of low rank; and before
# the first look at all else, of which little has converged before.
EARLY_STEPS, BLIND_STEPS = 3, 6
# By how much residuals shrink in a step at best, on power laws and models' matrices (8 to 15): so
# many more pass before the next look, dearer than a step on small matrices and cheaper on large.
SHRINKS = 15.0
# By how much at least where they do: of a matrix that is noise from some value on they stand still.
LEAST = 1.01
# Noise begins where the rest of a block does not fall, its last value above this share of its first
# (0.79 to 0.9 measured at the first look; power laws only in the last third of a block), and
# residuals shrink by less than this in a step (1.3 to 1.6 there, 8 to 15 on power laws). What has
# converged is then all that stands out: the rest would take two to three times the steps.
LEVEL, CREEPS = 0.75, 2.0
# Steps between the looks that tell, and left at least.
SHORT = 2
# A spectrum whose last value of a block is above this share of the first does not fall: finding
# where it ends takes as much as a full SVD. Of Gaussian noise it is 0.95, of fine-tuned models'
# matrices measured 0.5 at most.
FLAT = 0.55


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Leading:
    """Right vectors of the leading components of B, as far as they are known."""

    right: Float[Tensor, "*b n w"]
    """The best approximations, those that have not converged included."""
    converged: list[int]
    """By matrix, how many of the first ones have converged."""
    hidden: list[bool]
    """By matrix, whether all that is left is below what the dtype of A can reach."""


def leading(
    a: Products, *, known: RankOneComponents, width: int, max_steps: int, seeds: Sequence[int],
    restarts: int,
) -> Leading:  # fmt: skip
    """`width` right vectors of the largest components of B = (I - U U^T) A (I - V V^T), U and V
    those of `known`, of each matrix of A.

    Stops when all within reach have converged, when only rounding is left, or after `max_steps`
    blocks. Where none have by then, as where values hardly fall, starts again from the best so far.
    Without `restarts` an exact solver can take over: then it also stops once it sees that they
    will not have. A wide A takes no more passes than a tall one, only longer vectors.

    Reference: block Lanczos on A^T A, Golub, Underwood 1977; convergence without a gap, Musco,
    Musco, arXiv 1504.05477, algorithm 2.
    """
    b = Deflated(a, known.vh.T, known.u)
    *batch, _, n = a.shape
    largest, patient = float(known.s.max()) if len(known) else 0.0, restarts > 0
    starts = random_starts(n, width, seeds=seeds, device=b.v.device)
    start = starts.reshape(*batch, n, width).to(b.v)
    while True:
        krylov = _Krylov(b, start=start, largest=largest, max_steps=max_steps)
        found = _iterate(krylov, num_matrices=len(seeds), patient=patient)
        right = torch.stack([vectors for vectors, _ in found]).reshape(start.shape)
        converged = [ritz.converged for _, ritz in found]
        hidden = [ritz.reached == 0 for _, ritz in found]
        if restarts == 0 or any(converged) or all(hidden) or all(krylov.spent()):
            return Leading(right=right, converged=converged, hidden=hidden)
        start, restarts = right, restarts - 1


def _iterate(
    krylov: "_Krylov", *, num_matrices: int, patient: bool
) -> list[tuple[Float[Tensor, "n w"], "_Ritz"]]:
    """Of each matrix the leading approximations, once enough have converged, or no more can."""
    found, looked = dict[int, tuple[Tensor, _Ritz]](), dict[int, _Ritz]()
    due = dict.fromkeys(range(num_matrices), BLIND_STEPS)
    while due:
        krylov.extend()
        last = krylov.spent() if krylov.steps < krylov.max_steps else [True] * num_matrices
        early = krylov.early() if krylov.steps == EARLY_STEPS else [False] * num_matrices
        now = [i for i, look in due.items() if last[i] or early[i] or look <= krylov.steps]
        for i, ritz in zip(now, krylov.look(now) if now else (), strict=True):
            ended = last[i] or ritz.is_noise(looked.get(i))
            more = 0 if ended else ritz.steps_to_go(looked.get(i))
            hopeless = ritz.is_flat() or krylov.steps + more > krylov.max_steps
            if more == 0 or (hopeless and not patient):
                found[i] = krylov.basis(i) @ ritz.vectors, ritz
                del due[i]
            else:
                due[i], looked[i] = krylov.steps + more, ritz
    return [found[i] for i in range(num_matrices)]


def rayleigh_ritz(
    a: Products, right: Float[Tensor, "*b n w"], known: RankOneComponents
) -> tuple[Float[Tensor, "*b m w"], Float[Tensor, "*b w"], Float[Tensor, "*b w n"]]:
    """u, s and vh of the best components of B within the span of right vectors, in float64.

    Values err by the squared residual over the gap, and no longer by the rounding of products.
    """
    exact = known.to(torch.float64)
    v = orthonormal(without(right.double(), exact.vh.mT)).q
    images = orthonormal(without(a.image(v), exact.u))
    if a.device.type == "cpu":
        u, s, vh = torch.linalg.svd(images.r)
    else:
        u, s, vh = each_on_host(torch.linalg.svd, images.r)
    return images.q @ u, s, vh @ v.mT


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Ritz:
    """The leading approximations within the basis of a matrix."""

    steps: int
    vectors: Float[Tensor, "b w"]
    converged: int
    """How many of the leading ones have converged, and can be reached in this dtype."""
    reached: int
    """How many can be reached."""
    worst: float
    """The largest ratio of a residual to what is allowed, of those within reach."""
    ratio: float
    """The last value over the first, of those known."""
    level: float
    """The last value within reach over the first that has not converged; zero if all have."""

    def is_flat(self) -> bool:
        """Whether the spectrum does not fall, and nothing has converged in spite of it."""
        return self.ratio > FLAT and self.converged == 0

    def is_noise(self, before: "_Ritz | None") -> bool:
        """Whether all that stands out of noise has converged."""
        if before is None or not self._is_level() or self._shrinks(before) >= CREEPS:
            return False
        # Not where the rest is nearly there.
        return self.steps_to_go(before) > SHORT

    def _is_level(self) -> bool:
        return self.converged > 0 and self.level > LEVEL

    def _shrinks(self, before: "_Ritz") -> float:
        """By how much residuals shrank in a step since the look before."""
        return (before.worst / self.worst) ** (1 / (self.steps - before.steps))

    def steps_to_go(self, before: "_Ritz | None") -> int:
        """Steps to the next look, when all within reach may have converged: as residuals shrank
        since the look before, or as they commonly do. None if they have."""
        if self.worst <= 1.0:
            return 0
        if self.steps < BLIND_STEPS:
            return BLIND_STEPS - self.steps
        if before is None or before.steps < BLIND_STEPS:
            steps = math.ceil(math.log(self.worst, SHRINKS))
            return min(steps, SHORT) if self._is_level() else steps
        return math.ceil(math.log(self.worst) / math.log(max(self._shrinks(before), LEAST)))


class _Krylov:
    """An orthonormal basis Q of the Krylov space of B^T B, and Q^T B^T B Q."""

    def __init__(
        self, b: Deflated, *, start: Float[Tensor, "*b n w"], largest: float, max_steps: int
    ) -> None:
        *batch, _, n = b.a.shape
        k, width = b.v.shape[-1], start.shape[-1]
        self.b, self.width, self.steps = b, width, 0
        # A block must fit beside what is there.
        self.max_steps = max(1, min(max_steps, (n - k) // width))
        size = self.max_steps * width
        # V, then Q: what new columns must be orthogonal to.
        self._span = start.new_empty(*batch, n, k + size)
        self._span[..., :k] = b.v
        self._gram = start.new_zeros(*batch, size, size)
        self._num_known, self._largest = k, largest
        first = orthonormal(start)
        self._next, self._coupling = first.q, first.r

    def basis(self, i: int) -> Float[Tensor, "n b"]:
        """Q so far, of matrix `i`."""
        span = self._span if self._span.dim() == 2 else self._span[i]
        return span[:, self._num_known : self._num_known + self.steps * self.width]

    def extend(self) -> None:
        """One more block: B^T B times the last one, orthogonalised twice."""
        done, size, k = self.steps * self.width, (self.steps + 1) * self.width, self._num_known
        # Again, on unit columns: orthogonal also where rounding was all that was left of them.
        columns = orthonormal(without(self._next, self._span[..., : k + done]), passes=1).q
        self._span[..., k + done : k + size] = columns
        turned = self.b.step(columns)[1]
        span = self._span[..., : k + size]
        along = span.mT @ turned
        self._gram[..., :size, done:size] = along[..., k:, :]
        self._gram[..., done:size, :size] = along[..., k:, :].mT
        after = orthonormal(turned - span @ along, passes=1)
        self._next, self._coupling = after.q, after.r
        self.steps += 1

    def spent(self) -> list[bool]:
        """By matrix, whether rounding is all that is left of the next block: directions made of it
        would cost the basis its orthogonality."""
        left = torch.linalg.vector_norm(self._coupling, dim=(-2, -1))
        squared = self._gram.diagonal(dim1=-2, dim2=-1).amax(dim=-1)
        rounding = SPENT * torch.finfo(left.dtype).eps
        return [
            left <= rounding * max(squared, self._largest**2)
            for left, squared in torch.stack([left, squared], dim=-1).reshape(-1, 2).tolist()
        ]

    def early(self) -> list[bool]:
        """By matrix, whether values alone say that a look pays already: within a block they do not
        fall, or fall out of reach, and then the few others may have converged."""
        size = self.steps * self.width
        gram = self._gram[..., :size, :size].reshape(-1, size, size)
        if gram.device.type != "cpu":
            # Three steps more cost less there than these values.
            return [False] * len(gram)
        values = torch.linalg.eigvalsh(gram)[:, -self.width :].tolist()
        shares = [v[0] / max(v[-1], self._largest**2, torch.finfo(gram.dtype).tiny) for v in values]
        return [not REACH[gram.dtype] ** 2 <= share <= FLAT**2 for share in shares]

    def look(self, which: Sequence[int]) -> list[_Ritz]:
        """The leading Ritz vectors of some matrices, and how far they have converged."""
        size, width = self.steps * self.width, self.width
        gram = self._gram[..., :size, :size].reshape(-1, size, size)
        coupling = self._coupling.reshape(-1, width, width)
        if len(which) < len(gram):
            gram, coupling = gram[list(which)], coupling[list(which)]
        # Residuals of B^T B: ||B^T B v - s^2 v||, that is s ||B^T u - s v||.
        return [self._ritz(*pair) for pair in zip(*leading_pairs(gram, coupling), strict=True)]

    def _ritz(
        self, vectors: Float[Tensor, "b w"], values: Float[np.ndarray, " w"],
        residuals: Float[np.ndarray, " w"],
    ) -> _Ritz:  # fmt: skip
        """The approximations of a matrix, from values and residuals of B^T B, descending."""
        sigma = np.sqrt(values.clip(min=0.0))
        scale = max(self._largest, float(sigma[0]))
        allowed = np.minimum(OWN_RESIDUAL * sigma, RESIDUAL * scale) * sigma
        # Below rounding there is nothing to converge to.
        finfo = torch.finfo(vectors.dtype)
        ratio = residuals / allowed.clip(min=max(finfo.eps * scale**2, finfo.tiny))
        reached = int((sigma >= REACH[vectors.dtype] * scale).sum())
        within = ratio[:reached]
        converged = int((within <= 1.0).cumprod().sum())
        return _Ritz(
            steps=self.steps,
            vectors=vectors,
            converged=converged,
            reached=reached,
            level=float(sigma[reached - 1] / sigma[converged]) if converged < reached else 0.0,
            worst=float(within.max(initial=0.0)),
            ratio=float(sigma[-1]) / max(scale, finfo.tiny),
        )
