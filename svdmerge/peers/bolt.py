"""BOLT: a diagonal between orthogonalised directions of all sources."""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from svdmerge.core.components import RankOneComponents, concatenate
from svdmerge.errors import TrainingError
from svdmerge.peers.diagonal import DiagonalSpace, rectified
from svdmerge.peers.space import Weights, shared_names, taken
from svdmerge.peers.train import TrainSettings

PER_SOURCE = 12
# Tried on the training examples before training starts, by `space.choose`.
ALPHAS = (1.0, 3.0, 5.0, 7.0, 10.0)
# The head's rate is ours.
PUBLISHED = TrainSettings(epochs=20, batch_size=32, learning_rate=1e-3, head_learning_rate=1e-3)


def bolt_bases(
    sources: Sequence[Mapping[str, RankOneComponents]], *, per_source: int = PER_SOURCE
) -> dict[str, RankOneComponents]:
    """Shared orthonormal U and V of each matrix, and in s the start mean_i diag(U^T D_i V).

    Each source gives all its components of each matrix: its leading ones enter the bases, all of
    them the start. Depends on no target, so one call serves all of them.

    Deviations: of N sources each gives at most min(m, n) / N directions, for no more can be
    orthonormal together; directions of singular value zero, arbitrary as they are, are left out.

    Raises:
        MismatchError: the sources have not the same matrices.
        TrainingError: there are more sources than directions.

    Reference: BOLT, arXiv 2512.02441, offline phase; the polar factor as in TSV-M, 2412.00081.
    """
    fix = "Give a source that leaves a matrix alone no components of it (`components.none`)."
    names = shared_names(sources, fix=fix)
    return {
        name: _basis([source[name] for source in sources], name=name, per_source=per_source)
        for name in names
    }


def bolt(base: Weights, *, bases: Mapping[str, RankOneComponents], alpha: float) -> DiagonalSpace:
    """W_0 + U diag(relu(s)) Vh with s from alpha times the start; s trains.

    Deviations: theirs picks alpha by accuracy on the training examples; a ridge head fits a few of
    them perfectly under every alpha, so score it on left-out ones. As published,
    values that start negative are cut off by the relu and never train. Weight decay, if any, acts
    on s minus its start.

    Reference: BOLT, arXiv 2512.02441, online phase.
    """
    start = taken(bases, weights=base, what="BOLT's bases")
    directions: dict[str, RankOneComponents] = {}
    for name, c in bases.items():
        s = alpha * c.s
        directions[name] = RankOneComponents(u=c.u, s=s, vh=c.vh)
        weight = start[name]
        moved = ((c.u * torch.relu(s)) @ c.vh).reshape(weight.shape).to(weight.device)
        # Summed in the bases' float64, then rounded once.
        start[name] = (weight.to(moved.dtype) + moved).to(weight.dtype)
    return DiagonalSpace(start, directions=directions, shift=rectified)


def _basis(parts: Sequence[RankOneComponents], *, name: str, per_source: int) -> RankOneComponents:
    m, n = parts[0].u.shape[0], parts[0].vh.shape[1]
    count = min(per_source, min(m, n) // len(parts))
    if not count:
        raise TrainingError(
            f"{name}: {len(parts)} sources of a {m} x {n} matrix",
            "Not every source can have a direction orthogonal to the others'.",
            "Leave the matrix out, or take fewer sources.",
        )
    leading = concatenate([_leading(part, count=count) for part in parts]).to(torch.float64)
    u, vh = _polar(leading.u), _polar(leading.vh.T).T
    pooled = sum((_along(u, part.to(torch.float64), vh=vh) for part in parts), torch.zeros(()))
    return RankOneComponents(u=u, s=(pooled / len(parts)).to(u), vh=vh)


def _leading(part: RankOneComponents, *, count: int) -> RankOneComponents:
    order = part.s.argsort(descending=True, stable=True)[:count]
    order = order[part.s[order] > 0]
    return RankOneComponents(u=part.u[:, order], s=part.s[order], vh=part.vh[order])


def _polar(columns: Float[Tensor, "m c"]) -> Float[Tensor, "m c"]:
    """The orthonormal columns nearest to those given: P Q^T of their SVD P S Q^T."""
    p, _, qh = torch.linalg.svd(columns, full_matrices=False)
    return p @ qh


def _along(
    u: Float[Tensor, "m c"], part: RankOneComponents, *, vh: Float[Tensor, "c n"]
) -> Float[Tensor, " c"]:
    """diag(U^T D V) of D = sum of the components, which is never formed."""
    return ((u.T @ part.u * part.s) * (vh @ part.vh.T)).sum(dim=1)
