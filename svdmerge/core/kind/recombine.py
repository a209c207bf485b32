"""A model of the right size: which components some classes need, and which a budget affords."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from svdmerge.core.components import RankOneComponents
from svdmerge.core.kind.gate import ClassGate
from svdmerge.core.kind.layer import DecomposableLinear
from svdmerge.core.kind.start import groups_of
from svdmerge.errors import RecipeError


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Stored:
    """A decomposed layer as selection sees it: no vectors."""

    m: int
    n: int
    sizes: tuple[int, ...]
    """Learngenes, then tailors of each group."""
    salience: Float[Tensor, " r"]
    based: bool = False
    """Whether it has a dense part too, into which components that are always on then merge."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """The part of a layer that is taken over."""

    indices: tuple[int, ...]
    """Of components as stored: a selection is a list of ids. Those always on come first."""
    sizes: tuple[int, ...]
    """Components that are always on, then those of each group of the new gate."""
    dense: bool
    """Whether those always on become one matrix, which is smaller than they are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recombination:
    """A smaller gated model: its gate, and what is taken over of every layer."""

    gate: ClassGate
    layers: Mapping[str, Chosen]
    num_dropped: int
    """Tailors that the classes would use and the budget does not afford."""


def salience(components: RankOneComponents) -> Float[Tensor, " r"]:
    """|s| * ||u|| * ||vh||: the spectral and Frobenius norm of each component, whatever its scale
    is shared out as among its free factors."""
    c = components.to(torch.float64)
    return c.s.abs() * c.u.norm(dim=0) * c.vh.norm(dim=1)


def recombine(
    layers: Mapping[str, Stored], *, gate: ClassGate, classes: Sequence[str], budget: int | None
) -> Recombination:
    """Learngenes and the tailors of some classes, as many as the budget affords.

    Groups that every one of the classes uses need no gate: their components join those always on.
    `budget` bounds the parameters of the decomposed layers together. Where it is short, tailors are
    taken in order of the energy (salience squared) that they bring for each parameter, over all
    layers and groups alike; learngenes are never dropped.

    Raises:
        RecipeError: a class is unknown, or the budget is below the learngenes alone.
    """
    kept = gate.of(classes)
    always = {g for g in kept.groups if all(kept.groups.index(g) in own for own in kept.uses)}
    reduced = _without(kept, always)
    # Old group numbers to new ones; 0 is always on.
    numbers = {0: 0} | {1 + gate.groups.index(g): 0 for g in always}
    numbers |= {1 + gate.groups.index(g): 1 + i for i, g in enumerate(reduced.groups)}
    wanted = {path: list(_wanted(layer, numbers)) for path, layer in layers.items()}
    taken, num_dropped = _afford(layers, wanted, num_groups=1 + len(reduced.groups), budget=budget)
    return Recombination(gate=reduced, layers=taken, num_dropped=num_dropped)


def _without(gate: ClassGate, always: set[str]) -> ClassGate:
    """The gate without the groups that are always on; it may have none left."""
    groups = tuple(g for g in gate.groups if g not in always)
    uses = tuple(
        tuple(groups.index(gate.groups[g]) for g in own if gate.groups[g] not in always)
        for own in gate.uses
    )
    return ClassGate(classes=gate.classes, groups=groups, uses=uses)


def least(layers: Mapping[str, Stored]) -> int:
    """Parameters of the layers with their learngenes alone."""
    return sum(_size_of(layer, layer.sizes[0], 0) for layer in layers.values())


def _wanted(layer: Stored, numbers: Mapping[int, int]) -> Iterator[tuple[int, int, bool]]:
    """(index, new group, whether it is a learngene) of the components that the classes use."""
    for index, group in enumerate(groups_of(layer.sizes)):
        if group in numbers:
            yield index, numbers[group], group == 0


def _afford(
    layers: Mapping[str, Stored],
    wanted: Mapping[str, list[tuple[int, int, bool]]],
    *,
    num_groups: int,
    budget: int | None,
) -> tuple[dict[str, Chosen], int]:
    counts = {path: [0, 0] for path in layers}  # components always on, and gated ones
    for path, own in wanted.items():
        counts[path][0] = sum(learngene for _, _, learngene in own)
    held = {path: [(i, 0) for i, _, learngene in own if learngene] for path, own in wanted.items()}
    size = least(layers)
    if budget is not None and size > budget:
        raise RecipeError(
            f"budget: {budget:,} parameters for the decomposed layers",
            f"Their learngenes alone take {size:,}, and every class needs those.",
            f"Raise the budget to {size:,} at least, or train with fewer learngenes.",
        )
    tailors = [(p, i, g) for p, own in wanted.items() for i, g, learngene in own if not learngene]
    # Stable: what ties stays in the order of layers and components.
    tailors.sort(key=lambda c: -_energy(layers[c[0]], c[1]))
    num_dropped = 0
    for path, index, group in tailors:
        more = [counts[path][0] + (group == 0), counts[path][1] + (group > 0)]
        growth = _size_of(layers[path], *more) - _size_of(layers[path], *counts[path])
        if budget is not None and size + growth > budget:
            num_dropped += 1
            continue
        held[path].append((index, group))
        counts[path], size = more, size + growth
    return {
        path: _chosen(layers[path], own, num_groups=num_groups) for path, own in held.items()
    }, num_dropped


def _energy(layer: Stored, index: int) -> float:
    return float(layer.salience[index]) ** 2 / (layer.m + layer.n + 1)


def _chosen(layer: Stored, held: list[tuple[int, int]], *, num_groups: int) -> Chosen:
    # Stable in the stored order within each group.
    ordered = sorted(held, key=lambda pair: (pair[1], pair[0]))
    sizes = tuple(sum(g == group for _, g in ordered) for group in range(num_groups))
    return Chosen(
        indices=tuple(i for i, _ in ordered),
        sizes=sizes,
        dense=layer.based or layer.m * layer.n <= sizes[0] * (layer.m + layer.n + 1),
    )


def _size_of(layer: Stored, num_always: int, num_gated: int) -> int:
    """Parameters of a layer whose part always on takes the smaller form, factored or dense."""
    component, whole = layer.m + layer.n + 1, layer.m * layer.n
    always = whole if layer.based else min(num_always * component, whole)
    return always + num_gated * component


def assembled(
    chosen: Chosen,
    components: RankOneComponents,
    *,
    bias: Float[Tensor, " m"] | None,
    base: Float[Tensor, "m n"] | None = None,
) -> nn.Module:
    """The new layer, of its components in the order of the ids: a plain linear layer where all of
    it is dense. `base` is the dense part that the layer had before."""
    if not chosen.dense:
        group = groups_of(chosen.sizes)
        return DecomposableLinear(components, group=group, bias=bias, base=base)
    num_always = chosen.sizes[0]
    # In float64: hundreds of terms that cancel would leave float32 rounding in every output.
    always = components.slice(0, num_always).to(torch.float64).dense()
    always = (always if base is None else always + base.double()).to(components.s.dtype)
    gated = components.slice(num_always, len(components))
    if len(gated):
        group = groups_of((0, *chosen.sizes[1:]))
        return DecomposableLinear(gated, group=group, bias=bias, base=always)
    linear = nn.Linear(always.shape[1], always.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(always)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach().clone())
    return linear
