"""Blocks of components by Lanczos, with a bound on all that follow; of one matrix or a stack."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from svdmerge.core import svd
from svdmerge.core.block_shape import block_width
from svdmerge.core.certificate import remainder_bounds
from svdmerge.core.components import RankOneComponents, none
from svdmerge.core.lanczos import leading, rayleigh_ritz
from svdmerge.core.products import Products

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

    def reaches(self) -> bool:
        """Whether it says anything: components, or that there are none."""
        return len(self.components) > 0 or self.bound == 0.0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Attempt:
    """What Lanczos made of a matrix."""

    block: Block
    is_hidden: bool
    """Whether what is left is too small beside what is known for the dtype of products."""


def lanczos_attempts(
    a: Products, known: RankOneComponents, *, fros: Sequence[float], seeds: Sequence[int],
    steps: int, restarts: int = 0,
) -> list[Attempt]:  # fmt: skip
    """The block after those known of each matrix of A, in the host's memory; maybe empty. For
    `restarts` see `leading`."""
    rank, known = min(a.shape[-2:]), known.on(a.device)
    ritz = leading(
        a, known=known, width=min(block_width(rank), rank - len(known)), max_steps=steps,
        seeds=seeds, restarts=restarts,
    )  # fmt: skip
    if not any(ritz.converged) and not any(ritz.hidden):
        # Another solver's turn: a certificate would be for nothing.
        found = [none(*a.shape[-2:]).to(torch.float64)] * len(seeds)
        bounds = [*fros]
    else:
        found, vh = _found(a, ritz.right, known, converged=ritz.converged)
        bounds = _bounds(a, known, found, vh=vh, fros=fros, seeds=seeds)
    solver = f"lanczos {str(a.dtype).removeprefix('torch.')}"
    return [
        Attempt(block=Block(components=c, bound=bound, solver=solver), is_hidden=hidden)
        for c, bound, hidden in zip(found, bounds, ritz.hidden, strict=True)
    ]


def _found(
    a: Products, right: Float[Tensor, "*b n w"], known: RankOneComponents, *,
    converged: Sequence[int],
) -> tuple[list[RankOneComponents], Float[Tensor, "b k n"]]:  # fmt: skip
    """Each matrix's components, as many as have converged: all take part in finding them. And on
    A's device the right ones, zero where a matrix has fewer than another."""
    u, s, vh = rayleigh_ritz(a, right, known)
    (m, n), w = a.shape[-2:], s.shape[-1]
    u, s, vh = u.reshape(-1, m, w), s.reshape(-1, w), vh.reshape(-1, w, n)
    values = s.cpu()
    positive = (values > 0).sum(dim=-1).tolist()
    counts = [min(count, most) for count, most in zip(converged, positive, strict=True)]
    k = max(counts)
    kept = torch.arange(k) < torch.tensor(counts)[:, None]
    vh = torch.where(kept[..., None].to(vh.device), vh[:, :k], 0.0)
    # One transfer for all.
    stack = zip(u[..., :k].cpu(), values[:, :k], vh.cpu(), counts, strict=True)
    every = [RankOneComponents(u=u, s=s, vh=vh).slice(0, count) for u, s, vh, count in stack]
    return [svd.fix_signs(c) for c in every], vh


def _bounds(
    a: Products, known: RankOneComponents, found: Sequence[RankOneComponents], *,
    vh: Float[Tensor, "b k n"], fros: Sequence[float], seeds: Sequence[int],
) -> list[float]:  # fmt: skip
    """On what follows, of each matrix; zero where that is nothing."""
    *batch, m, n = a.shape
    v = torch.cat([known.vh.double().expand(len(vh), -1, -1), vh], dim=1).mT.contiguous()
    before = float((known.s.double() ** 2).sum())
    bounds = remainder_bounds(
        a, v=v.reshape(*batch, n, v.shape[-1]), fros=fros, seeds=[seed + 1 for seed in seeds],
        rests=[f**2 - before - float((c.s**2).sum()) for f, c in zip(fros, found, strict=True)],
    )  # fmt: skip
    share = NOTHING * torch.finfo(torch.float64).eps * max(m, n)
    first = known.s[:1].tolist()
    largest = [max([0.0, *first, *c.s[:1].tolist()]) for c in found]
    return [
        0.0 if bound <= share * s or len(known) + len(c) >= min(m, n) else bound
        for bound, s, c in zip(bounds, largest, found, strict=True)
    ]
