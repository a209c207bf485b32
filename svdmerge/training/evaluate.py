"""How well a whole model serves a target: what releases are compared by."""

import sys
from dataclasses import dataclass

import torch

from svdmerge.recipe import TuneConfig
from svdmerge.storage.checkpoint import Checkpoint
from svdmerge.storage.filesystem import Folder
from svdmerge.training.backbone import build_backbone
from svdmerge.training.data import load_target
from svdmerge.training.features import FeatureStore
from svdmerge.training.objective import objective_of


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationUnit:
    """A model to be measured."""

    name: str
    memory_bytes: int
    threads: int
    config: TuneConfig
    base: Checkpoint
    model: Checkpoint
    cache: Folder
    search_path: str
    """Where the backbone's package lies."""


def evaluate(unit: EvaluationUnit) -> float:
    """A model's merit on the test examples, the more the better: the share told right by a linear
    head, fitted in closed form to the training examples' features; of a language target, minus the
    nats per token.

    Raises:
        TrainingError: the examples or the backbone cannot be used, or the model overflows.
    """
    if unit.search_path not in sys.path:
        sys.path.append(unit.search_path)
    backbone, objective = build_backbone(unit.config, base=unit.base), objective_of(unit.config)
    target, device = load_target(unit.config, base=unit.base), torch.device("cpu")
    features = FeatureStore(
        backbone, base=unit.base, target=target, config=unit.config, folder=unit.cache,
        device=device, measure=lambda e: objective.measure(backbone, e, device=device),
    )  # fmt: skip
    judge = objective.judge(features.train(unit.model).values, target.train)
    score = judge.score(features.test(unit.model).values, target.test)
    return score.accuracy if score.nll is None else -float(score.nll.double().mean())
