"""How a decomposable model is put together again: plain values beside its tensors."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from svdmerge.core.components import RankOneComponents
from svdmerge.core.kind.gate import ClassGate, GateRows, gate_rows
from svdmerge.core.kind.layer import DecomposableLinear
from svdmerge.core.kind.replace import GATE, layers_of, put
from svdmerge.core.kind.start import groups_of


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
        """The blueprint of plain values. Raises: KeyError, TypeError, if they are none."""
        gate = raw["gate"]
        return Blueprint(
            model=raw["model"],
            config=raw["config"],
            gate=ClassGate(
                classes=tuple(gate["classes"]),
                groups=tuple(gate["groups"]),
                uses=tuple(tuple(own) for own in gate["uses"]),
            ),
            layers={path: tuple(sizes) for path, sizes in raw["layers"].items()},
            based=tuple(raw["based"]),
            linear=tuple(raw["linear"]),
            about=raw["about"],
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
    """Outputs, inputs and bias of a linear layer, also of one that is stored transposed."""
    layer = model.get_submodule(path)
    if isinstance(layer, DecomposableLinear):
        return layer.out_features, layer.in_features, layer.bias
    weight = layer.get_parameter("weight")
    m, n = weight.shape if isinstance(layer, nn.Linear) else weight.T.shape
    bias: Tensor | None = getattr(layer, "bias", None)
    return m, n, bias


def rest_of(model: nn.Module, paths: Sequence[str]) -> dict[str, Tensor]:
    """The state without the factors of the layers at these paths; their biases belong to it."""
    factors = {f"{path}.{name}" for path in paths for name in ("u", "s", "vh")}
    return {name: value for name, value in model.state_dict().items() if name not in factors}
