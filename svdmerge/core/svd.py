"""Exact singular value decompositions, with what all solvers share: signs and seeds."""

import hashlib
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from svdmerge.core.components import RankOneComponents

# Share of a merged difference's Frobenius norm that its factors may leave out: that of rounding
# them to float32, in which they are stored.
LEFT_OUT = 1e-7


def exact(matrix: Float[Tensor, "m n"]) -> RankOneComponents:
    """All r components, singular values descending, signs fixed.

    In float64: components of one source can stand 4e-5 apart at the cut (measured on real deltas),
    and float32 vectors would mix by eps / gap, far above what selection promises.
    Values that are rounding alone (below max(m, n) * eps * s_0) are exactly zero.
    """
    u, s, vh = torch.linalg.svd(matrix.to(torch.float64), full_matrices=False)
    if len(s):
        s = torch.where(s > s[0] * torch.finfo(s.dtype).eps * max(matrix.shape), s, 0.0)
    return fix_signs(RankOneComponents(u=u, s=s, vh=vh))


def factors(matrix: Float[Tensor, "m n"]) -> RankOneComponents:
    """The leading components, to the least depth that leaves out no more than LEFT_OUT."""
    found = exact(matrix)
    # Norms of what each depth leaves out, summed from the smallest: exact for tiny tails.
    rest = (found.s**2).flip(0).cumsum(0).flip(0).sqrt()
    return found.slice(0, int((rest > LEFT_OUT * rest[:1]).sum()))


def seed_of(parameter: str, *, m: int, n: int, block: int) -> int:
    """A sketch's seed, from what the block is alone, so that any worker draws the same."""
    text = f"{parameter}\0{m}\0{n}\0{block}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def random_starts(
    n: int, width: int, *, seeds: Sequence[int], device: torch.device
) -> Float[Tensor, "b n w"]:
    """Gaussian columns by seed, drawn where they are used: a CPU would take longer to draw them
    than a GPU to multiply by them. So each kind of device has its own."""
    drawn = [
        torch.randn(n, width, generator=torch.Generator(device).manual_seed(seed), device=device)
        for seed in seeds
    ]
    return torch.stack(drawn)


def fix_signs(c: RankOneComponents) -> RankOneComponents:
    """Each column's largest entry of u made positive, so that solvers agree on what is stored."""
    if c.u.shape[0] == 0 or len(c) == 0:
        return c
    top = c.u.abs().argmax(dim=0, keepdim=True)
    sign = torch.where(c.u.gather(0, top)[0] < 0, -1.0, 1.0).to(c.u.dtype)
    return RankOneComponents(u=c.u * sign, s=c.s, vh=c.vh * sign[:, None])
