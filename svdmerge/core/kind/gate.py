"""The class gate: which tailor groups a class uses."""

from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from svdmerge.errors import RecipeError, TrainingError

Hierarchy = Mapping[str, "Hierarchy"] | Sequence[str | int]


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassGate:
    """Classes, tailor groups, and the groups that each class uses. Learngenes are always on."""

    classes: tuple[str, ...]
    groups: tuple[str, ...]
    uses: tuple[tuple[int, ...], ...]
    """Of each class: positions in `groups`, ascending."""

    def rows(self) -> Float[Tensor, "y g"]:
        """0 or 1 for each class: column 0 for learngenes, always 1, then one for each group."""
        rows = torch.zeros(len(self.classes), 1 + len(self.groups))
        rows[:, 0] = 1.0
        for row, used in zip(rows, self.uses, strict=True):
            row[[1 + g for g in used]] = 1.0
        return rows

    def index(self, name: str) -> int:
        """A class's position. Raises: RecipeError, if the gate does not know it."""
        if name not in self.classes:
            raise RecipeError(
                f"class {name!r}: unknown to the gate",
                f"It knows {', '.join(self.classes[:10])}.",
                "Name one of these, or transfer the learngenes to new classes.",
            )
        return self.classes.index(name)

    def of(self, classes: Iterable[str]) -> "ClassGate":
        """The gate of some of the classes, and of the groups that they use; order is kept.

        Raises:
            RecipeError: a class is unknown, or none is given.
        """
        kept = sorted({self.index(name) for name in classes})
        if not kept:
            raise RecipeError("no class is named", "", "Name at least one.")
        groups = sorted({g for i in kept for g in self.uses[i]})
        # Not by `gate_of`: where all share their groups, as in recombined models, none is left.
        return ClassGate(
            classes=tuple(self.classes[i] for i in kept),
            groups=tuple(self.groups[g] for g in groups),
            uses=tuple(tuple(groups.index(g) for g in self.uses[i]) for i in kept),
        )


def gate_of(uses: Mapping[str, Sequence[str]], *, groups: Sequence[str] | None = None) -> ClassGate:
    """The gate of a map from class to the names of its tailor groups.

    Groups are numbered in the order of `groups`, or in that of first mention.

    Raises:
        RecipeError: there is no class, a class has no group, or a group no class.
    """
    named = list(dict.fromkeys(g for own in uses.values() for g in own))
    order = named if groups is None else list(groups)
    if not uses:
        raise RecipeError("the class gate has no classes", "", "Name at least one.")
    for name, own in uses.items():
        if not own:
            raise RecipeError(
                f"class {name!r}: has no tailors",
                "It uses no tailor group, so nothing of the model could be its own.",
                "Give it a group, its own or another class's.",
            )
    for group in order:
        if group not in named:
            raise RecipeError(
                f"tailor group {group!r}: is empty",
                "No class uses it, so its components would never train.",
                "Remove it, or give it a class.",
            )
    if missing := [g for g in named if g not in order]:
        raise RecipeError(
            f"tailor group {missing[0]!r}: is not listed", f"Listed: {', '.join(order)}.", "Add it."
        )
    return ClassGate(
        classes=tuple(uses),
        groups=tuple(order),
        uses=tuple(tuple(sorted({order.index(g) for g in own})) for own in uses.values()),
    )


def disjoint(classes: Sequence[str]) -> ClassGate:
    """The default gate: a tailor group for each class, shared with none."""
    return gate_of({name: [name] for name in classes})


def from_hierarchy(tree: Hierarchy) -> ClassGate:
    """The gate of a label hierarchy: a group for each inner node, shared by the classes below it.

    `{"animals": {"cats": ["lion", "lynx"], "dogs": ["wolf"]}}` gives lion the tailors of animals
    and those of cats. A class in several places has the groups of all of them.

    Raises:
        RecipeError: a node has no class below it, or a class stands directly at the root.
    """
    uses: dict[str, list[str]] = {}
    _descend(tree, path=[], uses=uses)
    return gate_of(uses)


def _descend(node: Hierarchy, *, path: list[str], uses: dict[str, list[str]]) -> None:
    if not node:
        raise RecipeError(
            f"tailor group {'/'.join(path)!r}: is empty", "No class is below it.", "Remove it."
        )
    if isinstance(node, Mapping):
        for name, below in node.items():
            _descend(below, path=[*path, name], uses=uses)
        return
    for name in node:
        uses.setdefault(str(name), []).extend("/".join(path[: i + 1]) for i in range(len(path)))


class GateRows(nn.Module):
    """The gate as part of a model: found from any wrapper of it, and moved with its device."""

    rows: Tensor

    def __init__(self, gate: ClassGate) -> None:
        super().__init__()
        self.gate = gate
        self.register_buffer("rows", gate.rows(), persistent=False)

    def active(self, classes: Int[Tensor, "..."] | int | str) -> Float[Tensor, "... g"]:
        """Rows of the classes: (b, g) of a batch of them, (g,) of one for all samples.

        Raises:
            RecipeError: a class given by name or number is unknown.
        """
        if isinstance(classes, Tensor):
            # An embedding, for indexing would take -1 as the last class.
            return F.embedding(classes.to(self.rows.device), self.rows)
        number = self.gate.index(classes) if isinstance(classes, str) else classes
        if not 0 <= number < len(self.rows):
            raise RecipeError(
                f"class number {number}: unknown to the gate",
                f"It has {len(self.rows)} classes, numbered from 0.",
                "Number classes as the gate lists them.",
            )
        return self.rows[number]


def gate_rows(model: nn.Module) -> GateRows:
    """The gate in a model. Raises: TrainingError, if it has none."""
    for module in model.modules():
        if isinstance(module, GateRows):
            return module
    raise TrainingError(
        f"{type(model).__name__}: has no class gate",
        "It is not a decomposable model.",
        "Make it one with `decomposable`.",
    )


@contextmanager
def gated(model: nn.Module, classes: Int[Tensor, "..."] | int | str) -> Generator[None]:
    """Within it, every forward pass of the model uses the tailors of these classes.

    `classes` numbers each sample's class (b,), or is one class, by number or name, for all. Where a
    forward pass is recomputed in backward (activation checkpointing), backward belongs inside too.
    The masks are set on the layers, so wrappers such as DistributedDataParallel, functional_call
    and vmap over samples see them.

    Raises:
        TrainingError: the model has no gate.
        RecipeError: the class is unknown to it.
    """
    from svdmerge.core.kind.layer import DecomposableLinear

    active = gate_rows(model).active(classes)
    layers = [m for m in model.modules() if isinstance(m, DecomposableLinear)]
    before = [layer.mask for layer in layers]
    masks: dict[tuple[int, ...], Tensor] = {}  # one gather for all layers that are split alike
    try:
        for layer in layers:
            if layer.sizes not in masks:
                masks[layer.sizes] = active[..., layer.group]
            layer.mask = masks[layer.sizes]
        yield
    finally:
        for layer, mask in zip(layers, before, strict=True):
            layer.mask = mask
