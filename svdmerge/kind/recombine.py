"""Recombine: a smaller gated model for some classes and a budget, without training."""

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from svdmerge.core.components import RankOneComponents
from svdmerge.core.kind.blueprint import Blueprint, shaped
from svdmerge.core.kind.gate import GateRows, gated
from svdmerge.core.kind.layer import DecomposableLinear
from svdmerge.core.kind.recombine import (
    Chosen,
    Recombination,
    Stored,
    assembled,
    least,
    recombine,
)
from svdmerge.core.kind.replace import GATE, put
from svdmerge.errors import RecipeError
from svdmerge.kind.folder import called, fill, plain
from svdmerge.kind.recipe import Budget

ITEM_BYTES = 4  # layers are stored, and come back, in float32
NUM_RUNS = 15  # an odd number: the median is one of them


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What a model takes."""

    parameters: int
    flops: int
    """Of a forward pass of the example, by torch's counter."""
    latency_ms: float
    """Of that pass, the median."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RecombineResult:
    """The recombined model beside the full one."""

    out: str
    classes: tuple[str, ...]
    gated: bool
    """Whether it still needs a class at inference."""
    full: Cost
    recombined: Cost
    tailors_dropped: int
    """That the classes would use and the budget does not afford."""
    max_difference: float
    """Largest difference of outputs to the full model's on the example, over the classes; what the
    dropped tailors make it, and rounding alone without any."""

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


class Parts(Protocol):
    """A decomposed model by its parts, of which only what is asked for is read."""

    blueprint: Blueprint

    def layers(self) -> Mapping[str, Stored]:
        """Every layer as selection sees it."""
        ...

    def components(self, path: str, indices: Sequence[int]) -> RankOneComponents:
        """Components of a layer by ids, in their order."""
        ...

    def rest(self) -> dict[str, Tensor]:
        """Every tensor that is no factor."""
        ...


def recombined(
    parts: Parts, *, classes: Sequence[str], budget: Budget | None
) -> tuple[Blueprint, nn.Module, Recombination]:
    """The smaller model and its blueprint; only the components it takes are read.

    Raises:
        RecipeError: a class is unknown, or the budget is below the learngenes alone.
    """
    rest, blueprint, layers = parts.rest(), parts.blueprint, parts.layers()
    bases = [f"{path}.base" for path in blueprint.based]
    others = [value for name, value in rest.items() if name not in bases]
    limit = None
    if budget is not None:
        blueprint.gate.of(classes)  # that a class is unknown is told first
        limit = layer_parameters(budget, others, least=least(layers))
    chosen = recombine(layers, gate=blueprint.gate, classes=classes, budget=limit)
    model = _put_together(parts, chosen, rest=rest)
    linear = [p for p in chosen.layers if isinstance(model.get_submodule(p), nn.Linear)]
    linear = (*blueprint.linear, *linear)  # those of an earlier recombination stay
    return replace(blueprint.of(model), linear=linear), model, chosen


def whole(parts: Parts) -> nn.Module:
    """The full gated model, from the same parts."""
    rest, blueprint = parts.rest(), parts.blueprint
    every = {
        path: Chosen(indices=tuple(range(sum(sizes))), sizes=sizes, dense=False)
        for path, sizes in blueprint.layers.items()
    }
    unchanged = Recombination(gate=blueprint.gate, layers=every, num_dropped=0)
    return _put_together(parts, unchanged, rest=rest)


def _put_together(parts: Parts, chosen: Recombination, *, rest: Mapping[str, Tensor]) -> nn.Module:
    model = shaped(plain(parts.blueprint), parts.blueprint)
    for path, choice in chosen.layers.items():
        components = parts.components(path, choice.indices)
        bias, base = rest.get(f"{path}.bias"), rest.get(f"{path}.base")
        put(model, path, assembled(choice, components, bias=bias, base=base))
    model.add_module(GATE, GateRows(chosen.gate))
    bases = {f"{path}.base" for path in parts.blueprint.based}  # these are in their layers
    state = {name: value for name, value in rest.items() if name not in bases}
    fill(model, model.state_dict() | state, builder=parts.blueprint.model)
    return model.eval()


def layer_parameters(budget: Budget, rest: Sequence[Tensor], *, least: int) -> int:
    """The budget as parameters of the decomposed layers, what else the model has taken off.

    Raises:
        RecipeError: it is below what every class needs, `least` parameters of layers and the rest.
    """
    unit, limit = next((name, value) for name, value in budget if value is not None)
    # Of FLOPs, a multiplication and an addition for each parameter, per token.
    each = {"parameters": 1, "bytes": ITEM_BYTES, "flops": 2}[unit]
    others = {
        "parameters": sum(value.numel() for value in rest),
        "bytes": sum(value.nbytes for value in rest),
        "flops": 0,
    }[unit]
    if limit < others + each * least:
        beside = f"; embeddings, norms, biases and heads alone {others:,}" if others else ""
        raise RecipeError(
            f"budget: {limit:,} {unit}",
            f"Learngenes alone take {each * least:,}{beside}. Every class needs all of that.",
            f"Raise it to {others + each * least:,} at least, or train with fewer learngenes.",
        )
    return (limit - others) // each


def compared(
    full: nn.Module, small: nn.Module, *, example: Mapping[str, Tensor], classes: Sequence[str]
) -> tuple[Cost, Cost, float]:
    """Costs of both models on the example, and the largest difference of their outputs."""
    costs = [_cost(model, example, classes[0]) for model in (full, small)]
    with torch.no_grad():
        differences: list[float] = []
        for name in classes:
            outputs: list[Tensor] = []
            for model in (full, small):
                with gated(model, name):
                    outputs.append(called(model, example))
            differences.append(float((outputs[0] - outputs[1]).abs().max()))
    times = _latencies((full, small), example, classes[0])
    found = [replace(cost, latency_ms=ms) for cost, ms in zip(costs, times, strict=True)]
    return found[0], found[1], max(differences)


def _cost(model: nn.Module, example: Mapping[str, Tensor], name: str) -> Cost:
    with FlopCounterMode(display=False) as counter, torch.no_grad(), gated(model, name):
        called(model, example)
    parameters = sum(p.numel() for p in model.parameters())
    return Cost(parameters=parameters, flops=counter.get_total_flops(), latency_ms=0.0)


def _latencies(
    models: Sequence[nn.Module], example: Mapping[str, Tensor], name: str
) -> list[float]:
    """Medians in milliseconds; the models take turns, so that a busy machine slows all alike."""
    seconds: list[list[float]] = [[] for _ in models]
    for _ in range(NUM_RUNS):
        for model, own in zip(models, seconds, strict=True):
            start = time.perf_counter()
            with torch.no_grad(), gated(model, name):
                called(model, example)
            own.append(time.perf_counter() - start)
    return [1e3 * statistics.median(own) for own in seconds]


def is_gated(model: nn.Module) -> bool:
    """Whether a class has to be given."""
    layers = [m for m in model.modules() if isinstance(m, DecomposableLinear)]
    return any(len(layer.sizes) > 1 for layer in layers)
