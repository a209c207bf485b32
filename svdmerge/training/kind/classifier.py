"""A classifier whose backbone is decomposable, and the objective that trains it.

The gate needs to know which tailors an example uses before its label is known. So it is told a
*superclass*: a set of labels that use the same tailor groups. That has to be known wherever the
model is used, in training and at inference alike; the label itself is then told among the
superclass's labels alone. Comparisons with a dense model have to give it the same knowledge.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool
from torch import Tensor, nn

from svdmerge.core.kind.gate import ClassGate, gate_rows, gated
from svdmerge.errors import RecipeError
from svdmerge.training.backbone import Backbone, Inputs, build_module
from svdmerge.training.data import Examples
from svdmerge.training.features import BATCH, to_device

BUILDER = "svdmerge.training.kind.classifier:build_classifier"
EXTRACTOR = "svdmerge.training.kind.classifier:build_extractor"


class Classifier(nn.Module):
    """Scores of every label, (b, labels), from mean features and a linear head."""

    def __init__(self, backbone: nn.Module, *, pooled: bool, features: int, labels: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(features, labels)
        self._pooled = pooled

    def forward(self, inputs: Inputs) -> Tensor:
        """Scores (b, labels)."""
        reader = Backbone(module=self.backbone, names={}, unused=(), pooled=self._pooled)
        return self.head(reader.features(inputs))

    def train(self, mode: bool = True) -> "Classifier":
        """Nothing: dropout stays off, for any number of workers must take the same steps."""
        del mode
        return super().train(False)


def build_classifier(config: dict[str, Any]) -> nn.Module:
    """The undecomposed classifier: `backbone` names what builds it from `config`, `features` is the
    width of its features and `labels` their number."""
    backbone = build_module(config["backbone"], config["config"], origin=BUILDER)
    return Classifier(
        backbone.float(),
        pooled=not config["backbone"].startswith("transformers:"),
        features=config["features"],
        labels=config["labels"],
    )


class Extractor(nn.Module):
    """Features (b, d) of a backbone."""

    def __init__(self, backbone: nn.Module, *, pooled: bool) -> None:
        super().__init__()
        self.backbone = backbone
        self._pooled = pooled

    def forward(self, inputs: Inputs) -> Tensor:
        """Features (b, d)."""
        reader = Backbone(module=self.backbone, names={}, unused=(), pooled=self._pooled)
        return reader.features(inputs)


def build_extractor(config: dict[str, Any]) -> nn.Module:
    """What `backbone` builds from `config`, giving features."""
    backbone = build_module(config["backbone"], config["config"], origin=EXTRACTOR)
    return Extractor(backbone.float(), pooled=not config["backbone"].startswith("transformers:"))


class Classification:
    """The objective: cross-entropy among the labels of each example's superclass."""

    def __init__(self, model: nn.Module, *, train: Examples, test: Examples) -> None:
        self._model, self._train, self._test = model, train, test
        gate = gate_rows(model).gate
        check_labels(gate, train=train.labels, test=test.labels)
        self._peers = superclasses(gate)

    @property
    def num_examples(self) -> int:
        """Training examples."""
        return len(self._train)

    def model(self) -> nn.Module:
        """The model as it was given."""
        return self._model

    def losses(self, model: nn.Module, rows: Sequence[int], *, step: int) -> Tensor:
        """Losses (b,); nothing in them is random."""
        del step
        labels = self._train.labels[list(rows)]
        scores = self._scores(model, self._train, rows)
        return F.cross_entropy(scores, labels.to(scores.device), reduction="none")

    def measure(self, model: nn.Module, *, step: int) -> dict[str, float]:
        """Loss and accuracy on the test examples, their superclasses known."""
        del step
        return self.tested(model)

    @torch.no_grad()
    def tested(self, model: nn.Module) -> dict[str, float]:
        """Mean loss and accuracy on the test examples."""
        order, loss, right = self._test.by_length(), 0.0, 0.0
        for start in range(0, len(order), BATCH):
            rows = order[start : start + BATCH]
            scores = self._scores(model, self._test, rows).cpu()
            labels = self._test.labels[rows]
            loss += float(F.cross_entropy(scores, labels, reduction="sum"))
            right += float((scores.argmax(dim=1) == labels).sum())
        return {"test_loss": loss / len(order), "test_accuracy": right / len(order)}

    def _scores(self, model: nn.Module, examples: Examples, rows: Sequence[int]) -> Tensor:
        device = next(model.parameters()).device
        labels = examples.labels[list(rows)]
        with gated(model, labels):
            scores: Tensor = model(to_device(examples.batch(rows), device))
        return scores.masked_fill(~self._peers[labels].to(device), -torch.inf)


def superclasses(gate: ClassGate) -> Bool[Tensor, "y y"]:
    """Which labels share a superclass: all that use the same tailor groups."""
    rows = gate.rows()
    return (rows[:, None] == rows[None]).all(dim=-1)


def check_labels(gate: ClassGate, *, train: Tensor, test: Tensor) -> None:
    """Raise RecipeError if labels are unknown to the gate, or the gate gives every label away."""
    largest = int(torch.cat([train, test]).max())
    if largest >= len(gate.classes) or int(torch.cat([train, test]).min()) < 0:
        raise RecipeError(
            f"the examples have label {largest}",
            f"The gate knows {len(gate.classes)} classes, numbered from 0.",
            "Put every label into a group of `groups`.",
        )
    if len(gate.classes) > 1 and int(superclasses(gate).sum()) == len(gate.classes):
        raise RecipeError(
            "groups: no two labels use the same tailors",
            "A classifier's gate is told its example's tailors, which would tell the label.",
            "Group labels into superclasses that are known at inference.",
        )
