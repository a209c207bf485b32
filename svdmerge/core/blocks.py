"""Canonical blocks: a matrix's components sixteen at a time, each with a bound on all that follow.

A block is a function of the difference, its parameter's name and the stored blocks before it; which
solver makes it follows from the shape and those blocks alone. So a store deepened over months holds
the numbers of one that was filled at once, whoever filled it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from svdmerge.core import svd
from svdmerge.core.block_shape import WIDTH, block_width, max_steps
from svdmerge.core.certificate import remainder_bound
from svdmerge.core.components import RankOneComponents, concatenate, none
from svdmerge.core.lanczos import leading, rayleigh_ritz
from svdmerge.core.products import Dense, Products

# Smaller sides go to the exact solver: it takes no longer there.
SMALL = 128
# Share of the rank from which on the exact solver takes what is left: a block costs about 1 / 15 of
# it at rank 768 and falls with the rank, so that what was spent before stays below a quarter.
LANCZOS_SHARE = 1 / 16
# A spectrum whose sixteenth value is above this share of the first does not fall: finding where it
# ends takes as much as a full SVD. Of Gaussian noise it is 0.95, of differences measured 0.2.
FLAT = 0.7
# What a block says of its solver if that finds all that is left.
EXACT = "exact"
# And of one that was given in factors.
FACTORED = "factored"
# Where either was at work no values follow, whatever was stored of the vectors.
COMPLETE = (EXACT, FACTORED)
# Of eps * max(m, n) * s_0 in float64, below which nothing is left: what `exact` calls zero, with
# the certificate's own rounding.
NOTHING = 8.0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Block:
    """Components that follow those stored, and what bounds all that follow these."""

    components: RankOneComponents
    """float64, values descending and positive. All that are left, of an exact solver."""
    bound: float
    """On every singular value after these. Zero if there are none; fails with probability 1e-9."""
    solver: str


def next_block(
    delta: Float[Tensor, "m n"], *, stored: RankOneComponents, fro: float, parameter: str
) -> Block:
    """The block after those stored (none: the first). `fro` is ||delta||_F.

    Solvers in turn: Lanczos in float32, in float64 where that reaches nothing, then LAPACK.
    """
    if delta.shape[0] < delta.shape[1]:
        turned = next_block(delta.T, stored=_turned(stored), fro=fro, parameter=parameter)
        found = svd.fix_signs(_turned(turned.components))
        return Block(components=found, bound=turned.bound, solver=turned.solver)
    n = delta.shape[1]
    if fro > 0.0 and len(stored) < n and _is_exact(n, s=stored.s):
        return exact_block(delta, stored=stored)
    found = lanczos_block(
        partial(Dense, delta), shape=tuple(delta.shape), stored=lambda: stored, fro=fro,
        parameter=parameter, steps=lambda _: max_steps(n),
    )  # fmt: skip
    return found or exact_block(delta, stored=stored)


def lanczos_block(
    products: Callable[[torch.dtype], Products], *, shape: tuple[int, ...],
    stored: Callable[[], RankOneComponents], fro: float, parameter: str,
    steps: Callable[[torch.dtype], int],
) -> Block | None:  # fmt: skip
    """The block after those stored, of a matrix known by its products; None where Lanczos reaches
    nothing. The stored components are read when needed, for they can outweigh all else; `steps` are
    those at most of Lanczos in a dtype.
    """
    (m, n), known = shape, stored()
    if fro == 0.0 or len(known) >= min(m, n):
        return Block(components=none(m, n).to(torch.float64), bound=0.0, solver="none")
    seed = svd.seed_of(parameter, m=m, n=n, block=len(known))
    a = products(torch.float32)
    block = _iterated(a, known, fro=fro, seed=seed, steps=steps(a.dtype))
    if len(block.components) or block.bound == 0.0:
        return block
    del known
    # In float64 without what the rounding of stored vectors leaves of them in the difference.
    a = products(torch.float64)
    block = _iterated(a, _polished(a, stored()), fro=fro, seed=seed, steps=steps(a.dtype))
    return block if len(block.components) or block.bound == 0.0 else None


def exact_block(delta: Float[Tensor, "m n"], *, stored: RankOneComponents) -> Block:
    """All components that follow those stored, by LAPACK in float64."""
    return Block(components=_rest(delta, stored), bound=0.0, solver=EXACT)


def _is_exact(n: int, *, s: Float[Tensor, " k"]) -> bool:
    """Whether the exact solver takes what follows, by the smaller side and the stored values."""
    flat = len(s) >= WIDTH and bool(s[WIDTH - 1] > FLAT * s[0])
    return n <= SMALL or flat or len(s) >= LANCZOS_SHARE * n


def _iterated(a: Products, known: RankOneComponents, *, fro: float, seed: int, steps: int) -> Block:
    """The block by Lanczos; maybe empty."""
    (m, n), rank = a.shape, min(a.shape)
    width = min(block_width(rank), rank - len(known))
    right = leading(a, known=known, width=width, max_steps=steps, seed=seed)
    found = svd.fix_signs(rayleigh_ritz(a, right, known))
    every = concatenate([known.to(torch.float64), found])
    bound = remainder_bound(a, known=every, fro=fro, seed=seed + 1)
    largest = float(every.s.max()) if len(every) else 0.0
    floor = NOTHING * torch.finfo(torch.float64).eps * max(m, n) * largest
    solver = f"lanczos {str(a.dtype).removeprefix('torch.')}"
    return Block(components=found, bound=bound if bound > floor else 0.0, solver=solver)


def _polished(a: Products, stored: RankOneComponents) -> RankOneComponents:
    """Stored components after a step of subspace iteration in float64: orthonormal to its eps."""
    if len(stored) == 0:
        return stored.to(torch.float64)
    v = torch.linalg.qr(a.step(stored.vh.T.double())[1]).Q
    u, s, vh = torch.linalg.svd(a.image(v), full_matrices=False)
    return RankOneComponents(u=u, s=s, vh=vh @ v.T)


def _rest(delta: Float[Tensor, "m n"], stored: RankOneComponents) -> RankOneComponents:
    """All components that are left, by LAPACK."""
    if len(stored) == 0:
        found = svd.exact(delta)
        return found.slice(0, int((found.s > 0).sum()))
    known, a = _polished(Dense(delta, torch.float64), stored), delta.to(torch.float64)
    a = a - known.u @ (known.u.T @ a)
    found = svd.exact(a - (a @ known.vh.T) @ known.vh)
    floor = torch.finfo(torch.float64).eps * max(a.shape) * float(known.s[0])
    left = min(int((found.s > floor).sum()), min(a.shape) - len(stored))
    return found.slice(0, left)


def _turned(c: RankOneComponents) -> RankOneComponents:
    """The components of the transpose."""
    return RankOneComponents(u=c.vh.T, s=c.s, vh=c.u.T)
