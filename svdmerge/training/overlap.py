"""How alike sources are: principal angles between what they changed most."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from svdmerge.core.overlap import overlap
from svdmerge.core.params import Action, Parameter
from svdmerge.storage.filesystem import Folder
from svdmerge.training.blend import committed

# Leading directions compared: half a stored block, enough to tell a copy, which agrees in all of
# them, from a relative, which agrees in the first few.
WIDTH = 8
# Of the first singular value, the least that counts: below it a change of low rank, as that of an
# adapter, is what rounding to the weights' dtype left, and no two sources share that.
LEAST = 0.1
# Mean squared cosine from which two sources count as near-duplicates. Random spans of width 8 have
# 0.02 at 384 columns; a copy trained a little further stays near 1.
DUPLICATE = 0.8


@dataclass(frozen=True, slots=True, kw_only=True)
class OverlapUnit:
    """Matrices in which all pairs of sources are compared."""

    name: str
    memory_bytes: int
    threads: int
    store: Folder
    base_key: str
    revisions: tuple[str, ...]
    parameters: tuple[Parameter, ...]


def overlaps(unit: OverlapUnit) -> tuple[list[list[float]], list[list[float]]]:
    """Sums over the unit's matrices of every pair's overlap, left and right spans alike (N x N),
    and of how many matrices: a matrix that both left as it was tells nothing of them."""
    size = len(unit.revisions)
    total, count = torch.zeros(2, size, size, dtype=torch.float64)
    for parameter in unit.parameters:
        if parameter.action is Action.DECOMPOSE:
            spans = [_spans(unit, revision, parameter) for revision in unit.revisions]
            total += _pairs(spans)
            changed = torch.tensor([u.shape[1] > 0 for u, _ in spans])
            count += changed[:, None] | changed
    return total.tolist(), count.tolist()


def _spans(unit: OverlapUnit, revision: str, parameter: Parameter) -> tuple[Tensor, Tensor]:
    source = committed(unit.store, unit.base_key, revision)
    width = min(WIDTH, source.held(parameter.id))
    if width == 0:
        return torch.zeros(parameter.m, 0), torch.zeros(parameter.n, 0)
    c = source.read(parameter.id, range(width))
    width = int((c.s >= LEAST * c.s[0]).sum())
    return c.u[:, :width], c.vh[:width].T


def _pairs(spans: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    found = torch.zeros(len(spans), len(spans), dtype=torch.float64)
    for i, (u, v) in enumerate(spans):
        for j in range(i):
            found[i, j] = (overlap(u, spans[j][0]) + overlap(v, spans[j][1])) / 2
    return found + found.T
