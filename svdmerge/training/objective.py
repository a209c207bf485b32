"""What a target trains for and is judged by: the one place where kinds of targets differ."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from svdmerge.core.discriminant import DiscriminantFit, discriminant
from svdmerge.core.transfer import LinearHead
from svdmerge.errors import TrainingError
from svdmerge.recipe import TuneConfig
from svdmerge.training.backbone import Backbone, Inputs
from svdmerge.training.data import Examples
from svdmerge.training.features import extract
from svdmerge.training.head import fitted_head
from svdmerge.training.language import predict, predictions

Loss = Callable[[Tensor, Tensor], Tensor]
"""Scores (b, y), labels (b,) -> losses (b,)."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Score:
    """A model on examples that nothing was fitted to."""

    accuracy: float
    """Share of examples told right; of a language model, of tokens."""
    nll: Tensor | None = None
    """Of a language model: nats per token of each text, (b,)."""


class Judge(Protocol):
    """What the training examples taught about one frozen model: how to read what it measures."""

    @property
    def error(self) -> float:
        """What sources are ranked by, the least first; no test example takes part."""
        ...

    @property
    def losses(self) -> Tensor:
        """Of each training example, held out: nats, (b,)."""
        ...

    @property
    def head(self) -> LinearHead | None:
        """The head in closed form; None where the model's own output is judged."""
        ...

    def score(self, measured: Tensor, examples: Examples) -> Score:
        """The model on examples, from what it measured on them."""
        ...


class Objective(Protocol):
    """What a target trains for and is judged by."""

    def measure(self, backbone: Backbone, examples: Examples, *, device: torch.device) -> Tensor:
        """All that judging a frozen model takes, a row per example, on the CPU."""
        ...

    def judge(self, measured: Tensor, examples: Examples) -> Judge:
        """The judge of a model, from what it measured on training examples."""
        ...

    def start(self, measured: Tensor, examples: Examples) -> dict[str, Tensor]:
        """Parameters of the head that training starts from; empty where there is none."""
        ...

    def losses(
        self, backbone: Backbone, head: nn.Module, inputs: Inputs, labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Of each example (b,): its loss, and how much of it was told right, from 0 to 1."""
        ...


def objective_of(config: TuneConfig) -> Objective:
    """The objective of a recipe's task. Raises: TrainingError, if `loss` names nothing callable."""
    if config.task == "causal_lm":
        return LanguageModelling()
    return Classification(loss=find_loss(config.loss))


def find_loss(name: str) -> Loss:
    """The loss of a name. Raises: TrainingError, if it cannot be imported."""
    if name == "cross_entropy":
        return cross_entropy
    library, _, attribute = name.partition(":")
    try:
        return getattr(importlib.import_module(library), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise TrainingError(
            f"loss: {name}: cannot be imported ({error})",
            "Expected `cross_entropy` or `package.module:callable`.",
            "Install the package, or correct the name.",
        ) from error


def cross_entropy(scores: Tensor, labels: Tensor) -> Tensor:
    """Minus the log of each label's softmax."""
    return F.cross_entropy(scores, labels, reduction="none")


@dataclass(frozen=True, slots=True, kw_only=True)
class Classification:
    """Classes by a linear head on the backbone's features."""

    loss: Loss

    def measure(self, backbone: Backbone, examples: Examples, *, device: torch.device) -> Tensor:
        """Features (b, d)."""
        return extract(backbone, examples, device=device)

    def judge(self, measured: Tensor, examples: Examples) -> "HeadJudge":
        """A head in closed form, by leave-one-out."""
        # Every class has an example: reading them checked it.
        num_classes = int(examples.labels.max()) + 1
        fit = discriminant(measured, labels=examples.labels, num_classes=num_classes)
        return HeadJudge(fit=fit, features=measured, labels=examples.labels)

    def start(self, measured: Tensor, examples: Examples) -> dict[str, Tensor]:
        """The head of the frozen model."""
        head = self.judge(measured, examples).head
        return {"weight": head.weight, "bias": head.bias}

    def losses(
        self, backbone: Backbone, head: nn.Module, inputs: Inputs, labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The loss on the head's scores, and whether the best one is the label's."""
        features = backbone.features(inputs)
        # The head stays in float32 where the backbone runs in less.
        with torch.autocast(features.device.type, enabled=False):
            scores = head(features.float())
        losses: object = self._loss_of(scores, labels)
        if not isinstance(losses, Tensor) or losses.shape != labels.shape:
            got = f"shape {list(losses.shape)}" if isinstance(losses, Tensor) else repr(losses)
            raise TrainingError(
                f"loss: returned {got} for {len(labels)} examples",
                "Expected one loss per example: (scores (b, y), labels (b,)) -> (b,).",
                "Leave out the mean or sum over examples, as `reduction='none'` does in torch.",
            )
        return losses, (scores.argmax(dim=1) == labels).float()

    def _loss_of(self, scores: Tensor, labels: Tensor) -> object:
        try:
            return self.loss(scores, labels)
        except Exception as error:
            raise TrainingError(
                f"loss: fails on scores {list(scores.shape)}, labels {list(labels.shape)}",
                f"{type(error).__name__}: {error}",
                "Expected (scores (b, y), labels (b,)) -> (b,).",
            ) from error


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class HeadJudge:
    """A head on frozen features; held out, that in closed form speaks for it."""

    fit: DiscriminantFit
    features: Tensor
    labels: Tensor
    fitted: list[LinearHead] = field(default_factory=list[LinearHead])
    """The head, once it was asked for: ranking does without."""

    @property
    def error(self) -> float:
        """Mean over examples of the leave-one-out loss, in nats."""
        return float(self.fit.log_loss.mean())

    @property
    def losses(self) -> Tensor:
        """By the head fitted without the example."""
        return self.fit.log_loss

    @property
    def head(self) -> LinearHead:
        """The head."""
        if not self.fitted:
            self.fitted.append(fitted_head(self.features, labels=self.labels, closed=self.fit))
        return self.fitted[0]

    def score(self, measured: Tensor, examples: Examples) -> Score:
        """Its accuracy."""
        return Score(accuracy=self.head.accuracy(measured, labels=examples.labels))


@dataclass(frozen=True, slots=True, kw_only=True)
class LanguageModelling:
    """Next tokens by the model's own output layer, which stays frozen."""

    def measure(self, backbone: Backbone, examples: Examples, *, device: torch.device) -> Tensor:
        """Nats per token and share of tokens right, (b, 2)."""
        return predictions(backbone, examples, device=device)

    def judge(self, measured: Tensor, examples: Examples) -> "LanguageJudge":
        """By the mean over texts; nothing is fitted."""
        del examples
        return LanguageJudge(losses=measured[:, 0])

    def start(self, measured: Tensor, examples: Examples) -> dict[str, Tensor]:
        """No head."""
        del measured, examples
        return {}

    def losses(
        self, backbone: Backbone, head: nn.Module, inputs: Inputs, labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Nats per token, and share of tokens right, of each text."""
        del head, labels
        predicted = predict(backbone, inputs)
        return predicted.nll, predicted.accuracy


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LanguageJudge:
    """A model's own likelihoods."""

    losses: Tensor
    """Nats per token on the training examples. The model never saw them: nothing was fitted."""
    head: None = None

    @property
    def error(self) -> float:
        """Their mean."""
        return float(self.losses.double().mean())

    def score(self, measured: Tensor, examples: Examples) -> Score:
        """Its likelihoods."""
        del examples
        return Score(accuracy=float(measured[:, 1].double().mean()), nll=measured[:, 0])
