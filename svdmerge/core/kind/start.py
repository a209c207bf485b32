"""Where decomposable layers start: at random, or from a trained matrix by SVD."""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from svdmerge.core.components import RankOneComponents
from svdmerge.core.svd import exact


def at_random(
    m: int,
    n: int,
    *,
    num_components: int,
    num_active: float,
    generator: torch.Generator,
    variance: float | None = None,
) -> RankOneComponents:
    """Components whose sum over the `num_active` that a class uses has entries of this variance:
    that of the layer they replace, so that depth and learning rates of dense models fit; by default
    nn.Linear's 1 / (3 n), which beside Xavier's cost a diffusion transformer 1 % of its loss.

    Columns of u and rows of vh have norm 1 in the mean, so s alone carries the scale: a sum of a
    terms has entry variance a s^2 / (m n).
    """
    u = torch.randn(m, num_components, generator=generator) / math.sqrt(m)
    vh = torch.randn(num_components, n, generator=generator) / math.sqrt(n)
    variance = 1.0 / (3.0 * n) if variance is None else variance
    s = torch.full((num_components,), math.sqrt(variance * m * n / max(num_active, 1.0)))
    return RankOneComponents(u=u, s=s, vh=vh)


def from_matrix(weight: Float[Tensor, "m n"], *, sizes: Sequence[int]) -> RankOneComponents:
    """The leading components of a matrix's SVD, dealt to learngenes and tailor groups.

    `sizes` counts learngenes, then each group's tailors. The largest values become learngenes; the
    next are dealt to the groups in turn, so that all groups get a like spectrum. All groups
    together are the matrix's best approximation of that rank, and itself at full rank.
    """
    found = exact(weight).slice(0, sum(sizes)).to(torch.float32)
    order = torch.tensor(dealt(sizes))
    return RankOneComponents(u=found.u[:, order], s=found.s[order], vh=found.vh[order])


def dealt(sizes: Sequence[int]) -> list[int]:
    """Which value each component gets: the first to learngenes, the rest to groups in turn."""
    num_learngenes, *tailors = sizes
    left, own = list(tailors), [list[int]() for _ in tailors]
    value = num_learngenes
    while any(left):
        for g, wanted in enumerate(left):
            if wanted:
                own[g].append(value)
                left[g] -= 1
                value += 1
    return [*range(num_learngenes), *(v for values in own for v in values)]


def groups_of(sizes: Sequence[int]) -> list[int]:
    """The group of each component, 0 for learngenes, of the groups' sizes."""
    return [g for g, size in enumerate(sizes) for _ in range(size)]


def even(total: int, *, parts: int) -> list[int]:
    """A total in parts that differ by one at most, larger ones first."""
    return [total // parts + (i < total % parts) for i in range(parts)]
