"""Ways to carry a pre-trained model to novel classes: what each starts from and what it trains."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from svdmerge.comparison.kind.study import Study
from svdmerge.core.components import RankOneComponents
from svdmerge.core.kind.gate import GateRows
from svdmerge.core.kind.layer import DecomposableLinear
from svdmerge.core.kind.replace import GATE, layers_of, projections, put
from svdmerge.core.kind.start import at_random, groups_of
from svdmerge.core.svd import exact, seed_of
from svdmerge.peers.lora import WithLora

EMBEDDING = "class_embed.weight"


@dataclass(frozen=True, slots=True, kw_only=True)
class Entrant:
    """A start for novel classes."""

    name: str
    build: Callable[[Study, int], nn.Module]
    """A model of the novel classes for a seed; what trains requires gradients."""


def entrants() -> tuple[Entrant, ...]:
    """All of them; the first is KIND."""
    return (
        Entrant(name="learngenes + tailors", build=kind),
        Entrant(name="learngenes + tailors, nothing frozen", build=kind_unfrozen),
        Entrant(name="random gate's learngenes + tailors", build=random_gate),
        Entrant(name="leading SVD components + tailors", build=leading),
        Entrant(name="whole dense model + tailors", build=whole),
        Entrant(name="LoRA of equal size", build=lora),
        Entrant(name="full fine-tuning", build=full),
        Entrant(name="from scratch", build=scratch),
    )


def kind(study: Study, seed: int) -> nn.Module:
    """The gated model's learngenes, frozen, and new random tailors."""
    return _extended(study, _always(study.gated(seed)), seed=seed)


def random_gate(study: Study, seed: int) -> nn.Module:
    """As `kind`, from the control whose gate knew nothing of classes."""
    return _extended(study, _always(study.random_gate(seed)), seed=seed)


def leading(study: Study, seed: int) -> nn.Module:
    """As `kind`, from a dense model's leading singular components, as many as learngenes."""
    dense = study.dense(seed)
    state = dict(dense.state_dict())
    for path in projections(dense):
        found = exact(state[f"{path}.weight"]).slice(0, study.num_learngenes)
        state[f"{path}.weight"] = found.dense().float()
    return _extended(study, state, seed=seed)


def whole(study: Study, seed: int) -> nn.Module:
    """The whole dense model, frozen, and new tailors that start at zero, as LoRA does: a model
    that already works is not disturbed."""
    model = _extended(study, study.dense(seed).state_dict(), seed=seed)
    for layer in layers_of(model).values():
        nn.init.zeros_(layer.u)
    return model


def lora(study: Study, seed: int) -> nn.Module:
    """The whole dense model, frozen, with LoRA of as many values as the tailors have."""
    num_values = sum(p.numel() for p in _tailors(kind(study, seed)))
    model = _novel(study, study.dense(seed).state_dict(), seed=seed).requires_grad_(False)
    names = [f"{path}.weight" for path in projections(model)]
    adapted = WithLora(model, names=names, num_values=num_values, seed=seed)
    model.get_parameter(EMBEDDING).requires_grad_(True)
    return adapted


def full(study: Study, seed: int) -> nn.Module:
    """The whole dense model, all of it trained."""
    return _novel(study, study.dense(seed).state_dict(), seed=seed)


def scratch(study: Study, seed: int) -> nn.Module:
    """A new dense model."""
    return study.objective(study.novel, spec=None, seed=seed).model()


def kind_unfrozen(study: Study, seed: int) -> nn.Module:
    """As `kind`, with learngenes as components and everything trained."""
    num_tailors = study.num_new * len(study.novel)
    spec = replace(
        study.spec(study.novel, seed=seed), gate=study.gate(study.novel), num_tailors=num_tailors
    )
    old = study.gated(seed)
    model = study.objective(study.novel, spec=spec, seed=seed).model()
    num = study.num_learngenes
    state = model.state_dict()
    for name, value in old.state_dict().items():
        path, _, leaf = name.rpartition(".")
        if path in layers_of(old) and leaf in ("u", "s", "vh"):
            view, source = (state[name].T, value.T) if leaf == "u" else (state[name], value)
            view[:num] = source[:num]
        elif name != EMBEDDING:
            state[name].copy_(value)
    model.load_state_dict(state)
    return model


def _always(model: nn.Module) -> dict[str, Tensor]:
    """A dense model's state whose projections are the sums of the learngenes."""
    layers = layers_of(model)
    state = {
        name: value
        for name, value in model.state_dict().items()
        if name.rpartition(".")[0] not in layers or name.endswith(".bias")
    }
    for path, layer in layers.items():
        learnt = layer.components().slice(0, layer.sizes[0])
        state[f"{path}.weight"] = learnt.dense()
    return state


def _novel(study: Study, state: Mapping[str, Tensor], *, seed: int) -> nn.Module:
    """A dense model of the novel classes with a state's values, all but the class embedding's."""
    model = study.objective(study.novel, spec=None, seed=seed).model()
    own = {EMBEDDING: model.get_parameter(EMBEDDING).detach()}
    model.load_state_dict({**state, **own})
    return model


def _extended(study: Study, state: Mapping[str, Tensor], *, seed: int) -> nn.Module:
    """A state's projections, frozen as each layer's base, and random tailors for each novel class;
    those and the class embedding train."""
    model = _novel(study, state, seed=seed).requires_grad_(False)
    gate = study.gate(study.novel)
    own = study.num_new
    for path in projections(model):
        linear = model.get_submodule(path)
        assert isinstance(linear, nn.Linear), path
        components = _random(linear, path=path, num=own, groups=len(gate.groups), seed=seed)
        sizes = (0, *[own] * len(gate.groups))
        layer = DecomposableLinear(
            components, group=groups_of(sizes), bias=linear.bias, base=linear.weight
        )
        layer.requires_grad_(False)
        for parameter in (layer.u, layer.s, layer.vh):
            parameter.requires_grad_(True)
        put(model, path, layer)
    model.add_module(GATE, GateRows(gate))
    model.get_parameter(EMBEDDING).requires_grad_(True)
    return model


def _random(linear: nn.Linear, *, path: str, num: int, groups: int, seed: int) -> RankOneComponents:
    m, n = linear.weight.shape
    generator = torch.Generator().manual_seed(seed_of(path, m=m, n=n, block=1) ^ seed)
    # At the scale of a model of learngenes and tailors alike, of which these are the new part.
    active = float(num * (1 + groups))
    return at_random(
        m,
        n,
        num_components=num * groups,
        num_active=active,
        variance=2.0 / (m + n),  # Xavier's, from which dense models started too
        generator=generator,
    )


def _tailors(model: nn.Module) -> Iterator[Tensor]:
    for layer in layers_of(model).values():
        yield from (layer.u, layer.s, layer.vh)
