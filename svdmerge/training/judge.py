"""How well models that are not yet merged serve a target: held-out losses of its few examples."""

import hashlib
import json
import time
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from svdmerge.recipe import TuneConfig
from svdmerge.storage.checkpoint import Checkpoint
from svdmerge.storage.filesystem import Folder
from svdmerge.training.backbone import Backbone, build_backbone, load_weights
from svdmerge.training.blend import Blend, at_strengths, differences
from svdmerge.training.data import Examples, draw, load_training
from svdmerge.training.objective import Objective, objective_of

# Of what is cached: other losses must not find the old numbers.
VERSION = 3
# Examples a model is judged by. The standard error of a mean loss over so many is about 3 % of the
# losses' spread, finer than sources differ; features of more would only cost time.
MAX_EXAMPLES = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgeUnit:
    """A blend to be judged at several strengths."""

    name: str
    memory_bytes: int
    threads: int
    config: TuneConfig
    base: Checkpoint
    blend: Blend
    strengths: tuple[float, ...]
    examples: str
    """Digest of the examples."""
    cache: Folder


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """Losses of each example, by strength; lower is better."""

    losses: tuple[tuple[float, ...], ...]
    seconds: float
    """Of computing them, now or when they were cached."""


def judge(unit: JudgeUnit) -> Judged:
    """The held-out losses of a blend's models, from the store if they were computed before.

    Raises:
        TrainingError: the examples or the backbone cannot be used.
        StoreError: a component is not stored, or damaged.
    """
    path = f"{_key(unit)}.json"
    if unit.cache.stat(path) is not None:
        held = json.loads(unit.cache.read(path))
        return Judged(losses=tuple(map(tuple, held["losses"])), seconds=held["seconds"])
    start = time.perf_counter()
    backbone = build_backbone(unit.config, base=unit.base)
    load_weights(backbone, checkpoint=unit.base, base=unit.base)
    examples = judged_examples(unit.config, base=unit.base)
    changes = differences(unit.blend, base=unit.base)
    objective = objective_of(unit.config)
    losses = tuple(
        tuple(float(x) for x in example_losses(backbone, examples, objective=objective))
        for _ in at_strengths(backbone, changes=changes, strengths=unit.strengths)
    )
    found = Judged(losses=losses, seconds=time.perf_counter() - start)
    unit.cache.put(path, json.dumps(asdict(found)).encode())
    return found


def example_losses(backbone: Backbone, examples: Examples, *, objective: Objective) -> Tensor:
    """Each example's loss (b,) in nats: by a head fitted without it on frozen features, or
    per predicted token of a language model."""
    measured = objective.measure(backbone, examples, device=torch.device("cpu"))
    return objective.judge(measured, examples).losses


def judged_examples(config: TuneConfig, *, base: Checkpoint) -> Examples:
    """The target's drawn training examples, at most `MAX_EXAMPLES`, of every class alike."""
    examples = load_training(config, base=base)
    return examples.take(judged_rows(examples.labels, seed=config.seed))


def judged_rows(labels: Tensor, *, seed: int) -> list[int]:
    """Which of b examples models are judged by: at most `MAX_EXAMPLES`, of every class alike."""
    if len(labels) <= MAX_EXAMPLES:
        return list(range(len(labels)))
    per_class = max(2, MAX_EXAMPLES // (int(labels.max()) + 1))
    return draw(labels.numpy(), per_class=per_class, seed=seed)


def _key(unit: JudgeUnit) -> str:
    parts = sorted(
        (parameter, [(i.revision, i.weight, i.count) for i in ingredients])
        for parameter, ingredients in unit.blend.ingredients.items()
    )
    config = unit.config
    fields = [
        VERSION, unit.base.revision, unit.blend.base_key, parts, unit.strengths, unit.examples,
        config.task, config.model, config.max_length,
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(fields).encode()).hexdigest()[:40]
