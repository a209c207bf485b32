"""Canonical blocks: a matrix's components sixteen at a time, each with a bound on all that follow.

A block is a function of the difference, its parameter's name and the stored blocks before it; which
solver makes it follows from the shape and those blocks alone. So a store deepened over months holds
the numbers of one that was filled at once, whoever filled it.
"""

import contextlib
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from svdmerge.core import svd
from svdmerge.core.block_shape import WIDTH, block_width, max_steps
from svdmerge.core.certified import Block, lanczos_attempts
from svdmerge.core.components import RankOneComponents, none
from svdmerge.core.deflated import without
from svdmerge.core.gram import by_gram
from svdmerge.core.lanczos import FLAT
from svdmerge.core.products import Dense, Products

# Smaller sides go to the exact solver: it takes no longer there.
SMALL = 128
# Share of the rank from which on the exact solver takes what is left: a block costs about 1 / 10 of
# it at rank 768 and falls with the rank.
LANCZOS_SHARE = 1 / 16
# Stored blocks of which the last is not full ended where values fell too slowly for Lanczos, if
# their last value is above this share of the first: far above what float32 can reach.
SLOW = 0.1
# Frobenius norms between which float32 holds the squares of Gram matrices' entries, small ones
# beside the largest too: a difference outside is multiplied in float64, whose range is far wider.
FLOAT32_RANGE = 1e-4, 1e8
# What LAPACK's failures to converge are raised as.
FAILURES = (
    torch.linalg.LinAlgError,  # pyright: ignore[reportPrivateImportUsage]
    np.linalg.LinAlgError,
)
# What a block says of its solver if that finds all that is left.
EXACT = "exact"
# And of one that was given in factors.
FACTORED = "factored"
# Where either was at work no values follow, whatever was stored of the vectors.
COMPLETE = (EXACT, FACTORED)


def next_block(
    delta: Float[Tensor, "m n"], *, stored: RankOneComponents, fro: float, parameter: str
) -> Block:
    """The block after those stored (none: the first). `fro` is ||delta||_F.

    Solvers in turn: Lanczos in float32, in float64 where that cannot see what is left or hold its
    square, then the exact one; the next one too where LAPACK fails one of them.
    """
    if delta.shape[0] < delta.shape[1]:
        return _turned_block(
            next_block(delta.T, stored=_turned(stored), fro=fro, parameter=parameter)
        )
    n = delta.shape[1]
    if fro > 0.0 and len(stored) < n and _is_exact(n, s=stored.s):
        return exact_block(delta, stored=stored)
    found = None
    with contextlib.suppress(*FAILURES):
        found = lanczos_block(
            partial(Dense, delta), shape=tuple(delta.shape), stored=lambda: stored, fro=fro,
            parameter=parameter, steps=lambda _: max_steps(n),
        )  # fmt: skip
    return found or exact_block(delta, stored=stored)


def first_blocks(
    deltas: Float[Tensor, "b m n"], *, fros: Sequence[float], parameters: Sequence[str]
) -> list[Block]:
    """The first block of each of a stack of matrices: as by `next_block` of each, but for the
    rounding of products of stacks."""
    _, m, n = deltas.shape
    if m < n:
        turned = first_blocks(deltas.mT, fros=fros, parameters=parameters)
        return [_turned_block(block) for block in turned]
    nothing = none(m, n).to(torch.float64)
    if n <= SMALL or not all(fro == 0.0 or _suits_float32(fro) for fro in fros):
        return [
            next_block(delta, stored=nothing, fro=fro, parameter=parameter)
            for delta, fro, parameter in zip(deltas, fros, parameters, strict=True)
        ]
    attempts = lanczos_attempts(
        Dense(deltas, torch.float32), nothing, fros=fros, steps=max_steps(n),
        seeds=[svd.seed_of(p, m=m, n=n, block=0) for p in parameters],
    )  # fmt: skip
    return [
        Block(components=nothing, bound=0.0, solver="none") if fro == 0.0
        else attempt.block if attempt.block.reaches()
        else exact_block(delta, stored=nothing)
        for attempt, delta, fro in zip(attempts, deltas, fros, strict=True)
    ]  # fmt: skip


def lanczos_block(
    products: Callable[[torch.dtype], Products], *, shape: tuple[int, ...],
    stored: Callable[[], RankOneComponents], fro: float, parameter: str,
    steps: Callable[[torch.dtype], int], restarts: int = 0,
) -> Block | None:  # fmt: skip
    """The block after those stored, of a matrix known by its products; None where Lanczos reaches
    nothing. The stored components are read when needed, for they can outweigh all else; `steps` are
    those at most of Lanczos in a dtype. Without `restarts` (see `leading`) an exact solver follows.
    """
    (m, n), known = shape, stored()
    if fro == 0.0 or len(known) >= min(m, n):
        return Block(components=none(m, n).to(torch.float64), bound=0.0, solver="none")
    attempt = partial(
        lanczos_attempts, fros=[fro], restarts=restarts,
        seeds=[svd.seed_of(parameter, m=m, n=n, block=len(known))],
    )  # fmt: skip
    found = None
    if _suits_float32(fro):
        a = products(torch.float32)
        (found,) = attempt(a, known, steps=steps(a.dtype))
    if found is None or (not found.block.reaches() and (restarts or found.is_hidden)):
        del known
        # In float64 without what the rounding of stored vectors leaves of them in the difference.
        a = products(torch.float64)
        (found,) = attempt(a, _polished(a, stored()), steps=steps(a.dtype))
    return found.block if found.block.reaches() else None


def exact_block(delta: Float[Tensor, "m n"], *, stored: RankOneComponents) -> Block:
    """All components that follow those stored, in float64 and the host's memory."""
    return Block(components=_rest(delta, stored).on("cpu"), bound=0.0, solver=EXACT)


def _suits_float32(fro: float) -> bool:
    """Whether a difference of this Frobenius norm can be multiplied in float32."""
    return FLOAT32_RANGE[0] <= fro <= FLOAT32_RANGE[1]


def _is_exact(n: int, *, s: Float[Tensor, " k"]) -> bool:
    """Whether the exact solver takes what follows, by the smaller side and the stored values."""
    flat = len(s) >= WIDTH and bool(s[WIDTH - 1] > FLAT * s[0])
    slow = len(s) % block_width(n) != 0 and bool(s[-1] > SLOW * s[0])
    return n <= SMALL or flat or slow or len(s) >= LANCZOS_SHARE * n


def _polished(a: Products, stored: RankOneComponents) -> RankOneComponents:
    """Stored components after a step of subspace iteration in float64: orthonormal to its eps."""
    if len(stored) == 0:
        return stored.to(torch.float64)
    v = torch.linalg.qr(a.step(stored.vh.T.double())[1]).Q
    u, s, vh = torch.linalg.svd(a.image(v), full_matrices=False)
    return RankOneComponents(u=u, s=s, vh=vh @ v.T)


def _rest(delta: Float[Tensor, "m n"], stored: RankOneComponents) -> RankOneComponents:
    """All components that are left."""
    if len(stored) == 0:
        found = _all(delta)
        return found.slice(0, int((found.s > 0).sum()))
    known, a = _polished(Dense(delta, torch.float64), stored), delta.to(torch.float64)
    # Twice, for what rounding leaves along them is as large as the smallest values that count.
    for _ in range(2):
        a = without(without(a, known.u).mT, known.vh.mT).mT
    found = _all(a)
    floor = torch.finfo(torch.float64).eps * max(a.shape) * float(known.s[0])
    left = min(int((found.s > floor).sum()), min(a.shape) - len(stored))
    return found.slice(0, left)


def _all(a: Float[Tensor, "m n"]) -> RankOneComponents:
    """All components of a matrix, by LAPACK's own decomposition if its eigensolver fails."""
    with contextlib.suppress(*FAILURES):
        return by_gram(a)
    return svd.exact(a)


def _turned_block(block: Block) -> Block:
    """The block of the transpose."""
    found = svd.fix_signs(_turned(block.components))
    return Block(components=found, bound=block.bound, solver=block.solver)


def _turned(c: RankOneComponents) -> RankOneComponents:
    """The components of the transpose."""
    return RankOneComponents(u=c.vh.T, s=c.s, vh=c.u.T)
