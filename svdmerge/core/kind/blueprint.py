"""How a decomposable model is put together again: plain values beside its tensors."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from svdmerge.core.components import RankOneComponents
from svdmerge.core.factored import linear_of
from svdmerge.core.kind.gate import ClassGate, GateRows, gate_rows
from svdmerge.core.kind.layer import DecomposableLinear
from svdmerge.core.kind.replace import GATE, layers_of, put
from svdmerge.core.kind.start import groups_of
from svdmerge.errors import TrainingError


@dataclass(frozen=True, slots=True, kw_only=True)
class Blueprint:
    """A model's architecture, its gate, and the form of every layer that is not as built."""

    model: str
    """`package.module:callable` that builds the undecomposed module from its configuration."""
    config: dict[str, Any]
    gate: ClassGate
    layers: dict[str, tuple[int, ...]]
    """Paths of decomposed layers: components always on, then those of each group."""
    based: tuple[str, ...] = ()
    """Paths of those that also have a dense part."""
    linear: tuple[str, ...] = ()
    """Paths of layers that became plain linear ones again."""
    about: dict[str, Any] = field(default_factory=dict[str, Any])
    """What the task needs to know of it, such as its labels."""

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    @staticmethod
    def from_json(raw: Mapping[str, Any]) -> "Blueprint":
        """The blueprint of plain values, which may come from anywhere.

        Raises: KeyError, TypeError, ValueError, if they are none.
        """
        gate = ClassGate(
            classes=tuple(map(str, raw["gate"]["classes"])),
            groups=tuple(map(str, raw["gate"]["groups"])),
            uses=tuple(tuple(map(int, own)) for own in raw["gate"]["uses"]),
        )
        places = range(len(gate.groups))
        used = [g for own in gate.uses for g in own]
        twice = len({*gate.classes}) < len(gate.classes)
        if twice or len(gate.uses) != len(gate.classes) or not all(g in places for g in used):
            raise ValueError("the gate's classes, groups and uses do not fit")
        return Blueprint(
            model=str(raw["model"]),
            config=dict(raw["config"]),
            gate=gate,
            layers={path: tuple(map(int, own)) for path, own in dict(raw["layers"]).items()},
            based=tuple(raw["based"]),
            linear=tuple(raw["linear"]),
            about=dict(raw["about"]),
        )

    def of(self, model: nn.Module) -> "Blueprint":
        """The same architecture with the gate and the layers that the model has now."""
        layers = layers_of(model)
        return replace(
            self,
            gate=gate_rows(model).gate,
            layers={path: layer.sizes for path, layer in layers.items()},
            based=tuple(path for path, layer in layers.items() if layer.base is not None),
        )


def shaped(model: nn.Module, blueprint: Blueprint) -> nn.Module:
    """The architecture's plain module with layers of the blueprint's form and its gate; what takes
    another's place has no values yet."""
    for path, sizes in blueprint.layers.items():
        m, n, bias = shape_of(model, path)
        r = sum(sizes)
        components = RankOneComponents(u=torch.zeros(m, r), s=torch.zeros(r), vh=torch.zeros(r, n))
        base = torch.zeros(m, n) if path in blueprint.based else None
        layer = DecomposableLinear(components, group=groups_of(sizes), bias=bias, base=base)
        put(model, path, layer)
    for path in blueprint.linear:
        m, n, bias = shape_of(model, path)
        put(model, path, nn.Linear(n, m, bias=bias is not None))
    model.add_module(GATE, GateRows(blueprint.gate))
    return model


def shape_of(model: nn.Module, path: str) -> tuple[int, int, Tensor | None]:
    """Outputs, inputs and bias of a linear layer, also of one that is stored transposed.

    Raises:
        TrainingError: there is none at that path.
    """
    layer = dict(model.named_modules()).get(path)
    if isinstance(layer, DecomposableLinear):
        return layer.out_features, layer.in_features, layer.bias
    linear = linear_of(model, f"{path}.weight")
    if linear is None:
        raise TrainingError(
            f"{path}: is no linear layer of {type(model).__name__}",
            "The blueprint says that it was one.",
            "Use the version of its package that the model was trained with.",
        )
    return linear.out_features, linear.in_features, linear.bias
