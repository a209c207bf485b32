"""Frozen features of a model on the target's examples, computed once and kept in the run."""

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from safetensors import torch as files
from torch import Tensor

from svdmerge.errors import TrainingError
from svdmerge.recipe import TuneConfig
from svdmerge.storage.checkpoint import Checkpoint
from svdmerge.storage.filesystem import Folder
from svdmerge.training.backbone import Backbone, Inputs, load_weights
from svdmerge.training.data import Examples, Target

# Examples at once without gradients: wide enough for the matrix products, small beside the weights.
BATCH = 64
# Of what is cached: another pooling or layout must not find the old numbers.
VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Features:
    """Features (b, d) of a model, and what computing them took, now or when they were cached."""

    values: Tensor
    seconds: float


def to_device(inputs: Inputs, device: torch.device) -> Inputs:
    """Inputs on a device."""
    if isinstance(inputs, Tensor):
        return inputs.to(device)
    return {column: values.to(device) for column, values in inputs.items()}


@torch.no_grad()
def extract(backbone: Backbone, examples: Examples, *, device: torch.device) -> Tensor:
    """Features (b, d) in float32, on the CPU, in the order of the examples."""
    order = examples.by_length()
    parts: list[Tensor] = []
    for start in range(0, len(order), BATCH):
        inputs = to_device(examples.batch(order[start : start + BATCH]), device)
        parts.append(backbone.features(inputs).float().cpu())
    back = torch.empty(len(order), dtype=torch.int64)
    back[torch.tensor(order)] = torch.arange(len(order))
    return finite(torch.cat(parts)[back], what="features")


def finite(measured: Tensor, *, what: str) -> Tensor:
    """What a model measured, a row per example.

    Raises:
        TrainingError: some of it is no number: it would be judged, and stored, as if it were one.
    """
    bad = ~torch.isfinite(measured).all(dim=1)
    if bool(bad.any()):
        raise TrainingError(
            f"the {what} of {int(bad.sum())} of {len(bad)} examples are NaN or Inf",
            f"The model overflows, first on example {int(bad.nonzero()[0])} from 0.",
            "Check its weights; if it was tuned, lower the learning rates.",
        )
    return measured


class FeatureStore:
    """What whole models measure on the target, from the run's folder where it is there: features,
    or likelihoods of a language target."""

    def __init__(
        self,
        backbone: Backbone,
        *,
        base: Checkpoint,
        target: Target,
        config: TuneConfig,
        folder: Folder,
        measure: Callable[[Examples], Tensor],
        device: torch.device,
    ) -> None:
        self._backbone, self._base, self._folder, self._device = backbone, base, folder, device
        self._config, self._measure = config, measure
        self._examples = {"train": target.train, "test": target.test}
        self._digests = {name: part.digest() for name, part in self._examples.items()}
        self._loaded = ""

    def train(self, model: Checkpoint) -> Features:
        """Features of the training examples."""
        return self._get(model, "train")

    def test(self, model: Checkpoint) -> Features:
        """Features of the test examples."""
        return self._get(model, "test")

    def _get(self, model: Checkpoint, part: str) -> Features:
        fields = [
            VERSION, model.revision, self._base.revision, self._config.model, self._config.task,
            self._digests[part],
        ]  # fmt: skip
        key = hashlib.sha256(json.dumps(fields).encode()).hexdigest()[:32]
        return cached(self._folder, key, lambda: self._compute(model, part))

    def _compute(self, model: Checkpoint, part: str) -> Tensor:
        if self._loaded != model.revision:
            self._loaded = ""
            load_weights(self._backbone, checkpoint=model, base=self._base)
            self._backbone.module.to(self._device)
            self._loaded = model.revision
        return self._measure(self._examples[part])


def cached(folder: Folder, key: str, compute: Callable[[], Tensor]) -> Features:
    """What `compute` returns, from the folder if an earlier run left it there."""
    path = f"{key}.safetensors"
    if folder.stat(path) is not None:
        held = files.load(folder.read(path))
        return Features(values=held["features"], seconds=float(held["seconds"]))
    start = time.perf_counter()
    values = compute()
    seconds = time.perf_counter() - start
    held = {"features": values, "seconds": torch.tensor(seconds, dtype=torch.float64)}
    folder.put(path, files.save(held))
    return Features(values=values, seconds=seconds)
