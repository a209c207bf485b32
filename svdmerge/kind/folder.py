"""The folder of a decomposable model: its blueprint, its tensors and an example of its inputs."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors import torch as files
from torch import Tensor, nn

from svdmerge.core.kind.blueprint import Blueprint, shaped
from svdmerge.errors import OutputError, TrainingError
from svdmerge.storage.filesystem import Folder
from svdmerge.training.backbone import build_module
from svdmerge.training.kind.classifier import BUILDER, EXTRACTOR

WEIGHTS, EXAMPLE, DESCRIPTION = "model.safetensors", "example.safetensors", "kind.json"
# What may build a model that a folder describes: these, transformers' classes, and ...
BUILDERS = (
    "svdmerge.core.dit:build",
    "svdmerge.demo_models:build",
    "svdmerge.comparison.text_case:build",
)
# ... these, which build what `backbone` of their configuration names.
WRAPPERS = (BUILDER, EXTRACTOR)
# Positional arguments of the example are named so; any other names are keys of one mapping.
ARGUMENT = "argument"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Model:
    """A decomposable model at rest."""

    blueprint: Blueprint
    state: Mapping[str, Tensor]
    example: Mapping[str, Tensor]
    """Inputs of a small batch, by which cost is measured: see `called`."""

    @property
    def digest(self) -> str:
        """sha256 of blueprint and tensors."""
        digest = hashlib.sha256(json.dumps(self.blueprint.to_json(), sort_keys=True).encode())
        for name in sorted(self.state):
            value = self.state[name].detach().cpu().contiguous()
            digest.update(name.encode())
            digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()


def as_example(inputs: Tensor | Mapping[str, Tensor] | tuple[Tensor, ...]) -> dict[str, Tensor]:
    """Inputs by name: one argument that is a tensor or a mapping of tensors, or several tensors."""
    if isinstance(inputs, Mapping):
        return dict(inputs)
    given = inputs if isinstance(inputs, tuple) else (inputs,)
    return {f"{ARGUMENT}{i}": value for i, value in enumerate(given)}


def called(model: nn.Module, example: Mapping[str, Tensor]) -> Any:
    """What the model returns for an example."""
    if all(name.startswith(ARGUMENT) for name in example):
        return model(*(example[name] for name in sorted(example)))
    return model(dict(example))


def plain(blueprint: Blueprint) -> nn.Module:
    """The undecomposed module. Raises: TrainingError, if its callable does not build it."""
    return build_module(blueprint.model, blueprint.config, origin="the blueprint")


def load(model: Model) -> nn.Module:
    """The model ready to run, in eval mode, inside `with gated(...)`.

    Raises:
        TrainingError: its callable is missing or builds something else.
    """
    module = shaped(plain(model.blueprint), model.blueprint)
    fill(module, model.state, builder=model.blueprint.model)
    return module.eval()


def fill(module: nn.Module, state: Mapping[str, Tensor], *, builder: str) -> None:
    """Put a whole state into the module. Raises: TrainingError, if they do not fit."""
    try:
        module.load_state_dict(dict(state), strict=True)
    except RuntimeError as error:
        raise TrainingError(
            f"{builder}: builds another model than was stored",
            str(error).splitlines()[-1].strip(),
            "Use the version of its package that the model was trained with.",
        ) from error


def check_free(out: Folder) -> None:
    """Raise OutputError if the folder holds anything but an earlier decomposable model."""
    names = out.names()
    if names and DESCRIPTION not in names:
        raise OutputError(
            f"{out.uri}: holds something else ({', '.join(names[:3])})",
            f"Only a model of `svdmerge kind`, with its {DESCRIPTION}, is ever replaced.",
            "Give another folder, or empty that one yourself.",
        )


def write(out: Folder, model: Model, *, result: Mapping[str, Any]) -> None:
    """Write a model; its description, without which nothing loads, goes last."""
    check_free(out)
    out.remove(DESCRIPTION)
    weights = files.save({k: v.detach().cpu().contiguous() for k, v in model.state.items()})
    out.put(WEIGHTS, weights)
    out.put(EXAMPLE, files.save({k: v.contiguous() for k, v in model.example.items()}))
    description = {
        "blueprint": model.blueprint.to_json(),
        "sha256": hashlib.sha256(weights).hexdigest(),
        "result": dict(result),
    }
    out.put(DESCRIPTION, (json.dumps(description, indent=1) + "\n").encode())


def read(folder: Folder, *, trusted: Sequence[str] = ()) -> Model:
    """The model in a folder.

    `trusted` names callables, besides those of `check_builder`, that may build its backbone.

    Raises:
        OutputError: there is none, it is not what its description says, or a stranger builds it.
    """
    try:
        description = json.loads(folder.read(DESCRIPTION))
        blueprint = Blueprint.from_json(description["blueprint"])
        weights = folder.read(WEIGHTS)
        if hashlib.sha256(weights).hexdigest() != description["sha256"]:
            raise ValueError(f"{WEIGHTS}: its content changed")
        state, example = files.load(weights), files.load(folder.read(EXAMPLE))
        _check_factors(blueprint, state)
    except (OSError, ValueError, KeyError, TypeError, RecursionError, SafetensorError) as error:
        raise OutputError(
            f"{folder.uri}: holds no whole decomposable model",
            f"{type(error).__name__}: {error}",
            "Run `svdmerge kind train` first, or correct `model`.",
        ) from None
    check_builder(blueprint, trusted=trusted, place=folder.uri)
    return Model(blueprint=blueprint, state=state, example=example)


def check_builder(blueprint: Blueprint, *, trusted: Sequence[str], place: str) -> None:
    """Raise OutputError if code that is neither ours nor trusted would build the model: whoever
    wrote a folder must not choose what runs here."""
    wrapped = blueprint.model in WRAPPERS
    # One wrapper deep: a wrapper is no backbone, else a second one could name anything.
    builder = str(blueprint.config.get("backbone") if wrapped else blueprint.model)
    if not builder.startswith("transformers:") and builder not in (*BUILDERS, *trusted):
        raise OutputError(
            f"{place}: is to be built by {builder}",
            "Code that a model's folder names runs only if the configuration names it too.",
            "If you trust it, give it as `backbone` of a `train` or `transfer` section.",
        )


def _check_factors(blueprint: Blueprint, state: Mapping[str, Tensor]) -> None:
    """Raise KeyError or ValueError if a layer's factors are not of the blueprint's sizes."""
    for path, sizes in blueprint.layers.items():
        u, s, vh = (state[f"{path}.{name}"] for name in ("u", "s", "vh"))
        ranks = {u.shape[-1], *s.shape, vh.shape[0]}
        fits = ranks == {sum(sizes)} and 1 <= len(sizes) <= 1 + len(blueprint.gate.groups)
        if min(sizes, default=-1) < 0 or not fits:
            raise ValueError(f"{path}: {sizes} components, but factors of {sorted(ranks)}")
