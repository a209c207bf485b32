"""What trains: the merged model with factored layers, and the linear head on its features."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor, nn

from svdmerge.core.components import RankOneComponents, none
from svdmerge.core.factored import (
    FactoredLinear,
    install,
    linear_of,
    num_trained,
    trained_directions,
)
from svdmerge.core.params import budget
from svdmerge.core.svd import seed_of
from svdmerge.errors import TrainingError
from svdmerge.recipe import TuneConfig
from svdmerge.storage.checkpoint import Checkpoint
from svdmerge.storage.filesystem import Folder
from svdmerge.storage.manifest import Committed
from svdmerge.training.backbone import Backbone, build_backbone, load_weights
from svdmerge.training.checkpointing import load_file
from svdmerge.training.data import Examples
from svdmerge.training.features import to_device
from svdmerge.training.objective import Objective

# Settings that change where or how often, not what is trained.
_PLACES = frozenset({"test", "out", "num_workers", "shard", "use_gpu", "save", "targets"}) | {
    "checkpoint_every",
    "checkpoint_every_s",
    "dataset",
    "dataset_task",
}
HEAD = "head-start.pt"


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """All that a training process needs to build the same trainee: places, and no weights."""

    config: TuneConfig
    base: Checkpoint
    merged: Checkpoint
    factors: Committed
    parameters: Mapping[str, int]
    """Matrix id -> merged components stored, of the matrices that are tuned."""
    folder: Folder
    """Where this tuning keeps its state; it holds the head's start."""
    threads: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Trainee:
    """The model in training."""

    backbone: Backbone
    layers: Mapping[str, FactoredLinear]
    """By checkpoint name."""
    head: nn.Module
    """A linear layer on the features; nothing where the model's own output counts."""
    objective: Objective
    device: torch.device
    half: bool = False
    """Whether the frozen model computes in bfloat16."""

    def values(self) -> list[nn.Parameter]:
        """The trained singular values' changes, in a fixed order."""
        return [self.layers[name].sigma_change for name in sorted(self.layers)]

    @property
    def num_values(self) -> int:
        """Singular values that train."""
        return num_trained(self.layers.values())

    def losses(self, examples: Examples, rows: list[int]) -> tuple[Tensor, Tensor]:
        """Of some examples (b,): each one's loss, and how much of it is told right, 0 to 1."""
        inputs = to_device(examples.batch(rows), self.device)
        labels = examples.labels[rows].to(self.device)
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.half):
            return self.objective.losses(self.backbone, self.head, inputs, labels)


def tuning_key(
    config: TuneConfig,
    *,
    base: Checkpoint,
    merged: Checkpoint,
    factors: Committed,
    parameters: Mapping[str, int],
    data: str,
) -> str:
    """sha256 of what the trained numbers depend on."""
    blocks = sorted(
        (b.parameter, b.first, b.sha256)
        for commit in factors.commits
        for b in commit.blocks
        if b.parameter in parameters
    )
    settings = config.model_dump(mode="json", exclude=set(_PLACES))
    fields = [settings, base.revision, merged.revision, sorted(parameters.items()), blocks, data]
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def tunable(
    backbone: Backbone, *, parameters: Mapping[str, int], null_space: bool
) -> tuple[dict[str, int], list[str]]:
    """The matrices that can be tuned, and notes on the others.

    Where nothing was merged, as when no source helps the target, nothing is tuned.

    Raises:
        TrainingError: none is a linear layer of the backbone.
    """
    linear = {p for p in parameters if linear_of(backbone.module, backbone.module_name(p))}
    empty = set() if null_space else {p for p in linear if parameters[p] == 0}
    notes = [
        *_told(set(parameters) - linear, "are no linear layers of the backbone and stay merged"),
        *_told(empty, "have no merged components to tune"),
    ]
    kept = {p: k for p, k in sorted(parameters.items()) if p in linear - empty}
    if not linear:
        raise TrainingError(
            f"none of {len(parameters)} merged matrices can be tuned",
            "; ".join(notes),
            "Check that `model` fits the base model.",
        )
    return kept, notes


def _told(names: Iterable[str], what: str) -> list[str]:
    names = sorted(names)
    return [f"{len(names)} matrices {what}, first {names[0]}"] if names else []


def read_directions(job: Job, parameter: str) -> RankOneComponents:
    """The directions that train of one matrix, from the run's merged factors."""
    m, n = job.base.tensors[parameter].shape
    num_values = budget(job.config.num_values, rank=min(m, n))
    stored = job.parameters[parameter]
    # Null-space directions must avoid all stored ones; else the leading ones are enough.
    wanted = stored if job.config.null_space else min(stored, num_values)
    found = job.factors.read(parameter, range(wanted)) if wanted else none(m, n)
    return trained_directions(
        found,
        num_values=num_values,
        null_space=job.config.null_space,
        seed=seed_of(parameter, m=m, n=n, block=0) ^ job.config.seed,
    )


def build_trainee(
    job: Job, *, examples: Examples, objective: Objective, device: torch.device,
    sharded: bool = False,
) -> Trainee:  # fmt: skip
    """The merged model ready to train: sigma changes zero, the head at its stored start.

    A matrix that features do not depend on, such as a pooler's, is left out.
    """
    backbone = build_backbone(job.config, base=job.base)
    load_weights(backbone, checkpoint=job.merged, base=job.base)
    names = {backbone.module_name(p): p for p in job.parameters}
    installed = install(
        backbone.module,
        directions={name: read_directions(job, p) for name, p in names.items()},
    )
    head = _head(load_file(job.folder, HEAD))
    trainee = Trainee(
        backbone=backbone,
        layers={names[name]: layer for name, layer in installed.items()},
        head=head.to(device),
        objective=objective,
        half=job.config.precision == "bfloat16",
        device=device,
    )
    if sharded:
        from svdmerge.training.sharding import shard  # importing it takes long, and few need it

        shard(backbone.module, device=device)
    else:
        backbone.module.to(device)
    return _reached(trainee, examples)


def _reached(trainee: Trainee, examples: Examples) -> Trainee:
    """The trainee without layers that no gradient reaches, found by one example's backward pass."""
    names = sorted(trainee.layers)
    total = trainee.losses(examples, [0])[0].sum()
    grads = cast(
        tuple[Tensor | None, ...],
        torch.autograd.grad(total, trainee.values(), allow_unused=True),
    )
    unused = {name for name, grad in zip(names, grads, strict=True) if grad is None}
    for name in unused:
        trainee.layers[name].sigma_change.requires_grad_(False)
    if len(unused) == len(names):
        raise TrainingError(
            f"none of {len(names)} tuned matrices takes part in the features",
            f"No gradient reaches {names[0]}.",
            "Check that `model` is the class whose output the features come from.",
        )
    layers = {name: trainee.layers[name] for name in names if name not in unused}
    return replace(trainee, layers=layers)


def _head(start: Mapping[str, Tensor]) -> nn.Module:
    if not start:
        return nn.Identity()
    head = nn.Linear(start["weight"].shape[1], start["weight"].shape[0])
    with torch.no_grad():
        head.weight.copy_(start["weight"])
        head.bias.copy_(start["bias"])
    return head
