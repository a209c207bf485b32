"""Learngenes and tailors of models that were never trained as such: what many sources share."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from svdmerge.core.components import RankOneComponents, concatenate
from svdmerge.core.merge import recompress

# Of the sources: what at least so many share is a learngene.
MAJORITY = 0.5
# A source contributes to a component substantially if it has at least so much of its strength.
SUBSTANTIAL = 0.5
# Components below this part of a source's largest are rounding of stored weights, and span nothing.
LEAST = 1e-3


@dataclass(frozen=True, slots=True, kw_only=True)
class Shared:
    """A matrix of several sources taken apart: D_i is about learngenes + tailors_i."""

    learngenes: RankOneComponents
    tailors: tuple[RankOneComponents, ...]
    explained: float
    """Share of the sources' squared norms that learngenes take off: below 0 they would add."""


def take_apart(sources: Sequence[RankOneComponents], *, num_tailors: int) -> Shared:
    """What the sources' differences to their base share, and what is each one's own; each source is
    the leading part of an SVD.

    1. A direction (left and right apart) is shared if the mean over the sources of its squared
       cosine with their spans is above MAJORITY and above what chance makes it (`chance_edge`).
       Spans count, not singular values: of sources with orthogonal spans every direction has 1/N,
       however their values tie. Components below LEAST of a source's largest do not count.
    2. Between the shared directions lie each source's cores C_i = P^T D_i Q. Their mean's SVD gives
       candidates a v^T of strength s, and source i contributes a^T C_i v. A candidate is a
       learngene if at least MAJORITY of the sources contribute SUBSTANTIAL * s or more: of one
       sign, so that opposite changes never meet in the middle.
    3. Tailors are the SVD of D_i less the learngenes, its `num_tailors` leading components: with
       as many as D_i and the learngenes have together, base + learngenes + tailors is the source.
    """
    cores = _shared_cores([c.to(torch.float64) for c in sources])
    learngenes = _agreed(*cores)
    minus = RankOneComponents(u=learngenes.u, s=-learngenes.s, vh=learngenes.vh)
    own = [recompress(concatenate([c.to(torch.float64), minus])) for c in sources]
    whole = sum(_energy(c) for c in sources)
    return Shared(
        learngenes=learngenes,
        tailors=tuple(t.slice(0, num_tailors) for t in own),
        explained=1.0 - sum(_energy(t) for t in own) / whole if whole else 0.0,
    )


def shared_directions(spans: Sequence[Float[Tensor, "m _"]]) -> Float[Tensor, "m j"]:
    """Orthonormal directions that most of the spans (orthonormal columns each) contain."""
    num, m = len(spans), spans[0].shape[0]
    u, s, _ = torch.linalg.svd(torch.cat(list(spans), dim=1) / math.sqrt(num), full_matrices=False)
    edge = chance_edge(num, share=sum(span.shape[1] for span in spans) / (num * m))
    if edge >= 1.0:
        return u[:, :0]  # spans so large that chance alone makes them share
    # Squared: eigenvalues of the spans' mean projector, which are mean squared cosines.
    return u[:, s.square() >= max(MAJORITY, edge)]


def chance_edge(num: int, *, share: float) -> float:
    """The most that the mean squared cosine comes to with `num` random spans, each of that share of
    the whole space; the upper edge of the mean of free projectors.

    Reference: Kesten 1959; Voiculescu's free convolution: for two, 1/2 + sqrt(p (1 - p)).
    """
    if share >= 1.0 or num * share >= num - 1 + (num == 1):
        return 1.0
    spread = 2.0 * math.sqrt((num - 1) * share * (1.0 - share))
    return min(1.0, (1.0 + (num - 2) * share + spread) / num)


def _shared_cores(
    sources: Sequence[RankOneComponents],
) -> tuple[Float[Tensor, "m a"], Float[Tensor, "n b"], Float[Tensor, "y a b"]]:
    strong = [c.slice(0, int((c.s > LEAST * c.s[:1]).sum())) for c in sources]
    left = shared_directions([torch.linalg.qr(c.u).Q for c in strong])
    right = shared_directions([torch.linalg.qr(c.vh.T).Q for c in strong])
    cores = [(left.T @ c.u * c.s) @ (c.vh @ right) for c in sources]
    return left, right, torch.stack(cores)


def _agreed(
    left: Float[Tensor, "m a"], right: Float[Tensor, "n b"], cores: Float[Tensor, "y a b"]
) -> RankOneComponents:
    """The components of the mean core to which most sources contribute."""
    a, s, bh = torch.linalg.svd(cores.mean(dim=0), full_matrices=False)
    contributions = torch.einsum("ak,yab,kb->yk", a, cores, bh)
    # What cancels to rounding alone is no agreement. Not >=: all may be zero.
    floor = cores.abs().sum() * torch.finfo(s.dtype).eps * max(left.shape[0], right.shape[0])
    substantial = (contributions >= SUBSTANTIAL * s) & (s > floor)
    kept = substantial.double().mean(dim=0) >= MAJORITY
    return RankOneComponents(u=left @ a[:, kept], s=s[kept], vh=bh[kept] @ right.T)


def _energy(c: RankOneComponents) -> float:
    """Squared Frobenius norm, of orthonormal components."""
    return float(c.s.double().square().sum())
