"""A model of base weights plus stored components of sources, built in memory to be judged."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from svdmerge.core.params import Action, Parameter
from svdmerge.storage import layout
from svdmerge.storage.checkpoint import Checkpoint
from svdmerge.storage.filesystem import Folder
from svdmerge.storage.manifest import Committed
from svdmerge.training.backbone import Backbone


@dataclass(frozen=True, slots=True, kw_only=True)
class Ingredient:
    """Leading components of one source in one matrix, and the factor on their singular values."""

    revision: str
    weight: float
    count: int | None = None
    """How many, of those stored; all of them by default."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Blend:
    """What is added to the base: per matrix, components of sources."""

    store: Folder
    base_key: str
    parameters: tuple[Parameter, ...]
    ingredients: Mapping[str, tuple[Ingredient, ...]]
    """By matrix id; one that is absent stays the base's."""


def differences(blend: Blend, *, base: Checkpoint) -> dict[str, Tensor]:
    """The whole difference by tensor name, float32 in the tensors' shapes: a model's memory."""
    found: dict[str, Tensor] = {}
    for p in blend.parameters:
        parts = blend.ingredients.get(p.id, ())
        if p.action is Action.EQUAL or not parts:
            continue
        if p.tensor not in found:
            found[p.tensor] = torch.zeros(base.tensors[p.tensor].numel)
        target = found[p.tensor][p.start : p.start + p.numel]
        target += _dense(blend, p, parts).reshape(-1)
    return {name: d.reshape(base.tensors[name].shape) for name, d in found.items()}


def _dense(blend: Blend, parameter: Parameter, parts: Sequence[Ingredient]) -> Tensor:
    """The sum of one matrix's components, (m, n)."""
    total = torch.zeros(parameter.m, parameter.n)
    for part in parts:
        source = committed(blend.store, blend.base_key, part.revision)
        stored = source.held(parameter.id)
        count = stored if part.count is None else min(part.count, stored)
        if count:
            c = source.read(parameter.id, range(count))
            total.addmm_(c.u * c.s, c.vh, alpha=part.weight)
    return total


@lru_cache(maxsize=64)
def committed(store: Folder, base_key: str, revision: str) -> Committed:
    """A source's commits, read once per process: they only grow, and plans name what they need."""
    return Committed.load(
        store,
        commits=layout.commits_path(base_key, revision),
        data=layout.components_path(base_key, revision),
    )


@torch.no_grad()
def at_strengths(
    backbone: Backbone, *, changes: Mapping[str, Tensor], strengths: Sequence[float]
) -> Iterator[float]:
    """Each strength, while the module holds base + strength * changes; the base's again at the end.

    The module must hold the base's weights.
    """
    state = backbone.module.state_dict()
    named = {backbone.module_name(name): change for name, change in changes.items()}
    start = {name: state[name].clone() for name in named if name in state}
    try:
        for strength in strengths:
            for name, weight in start.items():
                torch.add(weight, named[name].to(weight), alpha=strength, out=state[name])
            yield strength
    finally:
        for name, weight in start.items():
            state[name].copy_(weight)
