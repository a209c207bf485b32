"""The one trainer of all comparators: AdamW with a cosine, in a seeded order of items."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from svdmerge.errors import TrainingError
from svdmerge.peers.space import Weights, WeightSpace

Features = Callable[[Weights, list[int]], Tensor]
"""Features (b, d) of some examples under changed weights, as by `torch.func.functional_call`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainSettings:
    """How the values train."""

    epochs: int
    batch_size: int
    """Items a step: examples, or pairs of them."""
    learning_rate: float
    """Of the space's values; falls to zero by a cosine."""
    head_learning_rate: float
    """Of what the objective trains beside them."""
    weight_decay: float = 0.0
    """Of the values alone, towards zero; a head starts from a penalised solution already."""
    max_steps: int | None = None
    """Caps the cost; the cosine then ends there."""
    seed: int = 0

    def num_steps(self, num_items: int) -> int:
        """Steps of the whole training."""
        steps = self.epochs * math.ceil(num_items / self.batch_size)
        return steps if self.max_steps is None else min(steps, self.max_steps)


@runtime_checkable
class Objective(Protocol):
    """What is minimised: a mean over items, each of which needs the features of some examples."""

    @property
    def num_items(self) -> int:
        """Items of an epoch."""
        ...

    def values(self) -> list[nn.Parameter]:
        """What trains beside the space's values: a head, or nothing."""
        ...

    def loss(self, features: Callable[[list[int]], Tensor], *, items: list[int]) -> Tensor:
        """The mean loss of some items; `features` gives those of examples, by row."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Trained:
    """Where training ended."""

    weights: dict[str, Tensor]
    """As the space gives them, detached."""
    losses: tuple[float, ...]
    """Of each step's items, before the step."""


def train(
    features: Features,
    *,
    space: WeightSpace,
    objective: Objective,
    settings: TrainSettings,
    after_step: Callable[[int], None] = lambda step: None,
) -> Trained:
    """The weights after training the space's values, which are changed in place.

    `after_step` is told how many steps are done, from 1 on.

    Raises:
        TrainingError: nothing trains, or the loss is no longer finite.
    """
    if not space.num_trained:
        raise TrainingError(
            "the space has no value to train",
            "What was allowed is less than its smallest part.",
            "Allow more trained values.",
        )
    optimizer = torch.optim.AdamW(
        [
            {"params": space.values(), "lr": settings.learning_rate},
            {"params": objective.values(), "lr": settings.head_learning_rate, "weight_decay": 0.0},
        ],
        weight_decay=settings.weight_decay,
    )
    total = settings.num_steps(objective.num_items)
    rates = [float(group["lr"]) for group in optimizer.param_groups]
    losses: list[float] = []
    for step, items in zip(range(total), _batches(objective.num_items, settings), strict=False):
        _set_rates(optimizer, rates, factor=0.5 * (1.0 + math.cos(math.pi * step / total)))
        loss = objective.loss(partial(features, space.weights()), items=items)
        losses.append(_finite(float(loss.detach()), step=step, settings=settings))
        optimizer.zero_grad()
        loss.backward()  # pyright: ignore[reportUnknownMemberType]
        optimizer.step()
        after_step(step + 1)
    with torch.no_grad():
        # Clones: a space of free weights gives its parameters themselves.
        weights = {name: weight.detach().clone() for name, weight in space.weights().items()}
    return Trained(weights=weights, losses=tuple(losses))


def _batches(num_items: int, settings: TrainSettings) -> Iterator[list[int]]:
    generator = torch.Generator().manual_seed(settings.seed)
    for _ in range(settings.epochs):
        order: list[int] = torch.randperm(num_items, generator=generator).tolist()
        for start in range(0, num_items, settings.batch_size):
            yield order[start : start + settings.batch_size]


def _set_rates(optimizer: torch.optim.Optimizer, rates: list[float], *, factor: float) -> None:
    groups: list[dict[str, Any]] = optimizer.param_groups
    for group, rate in zip(groups, rates, strict=True):
        group["lr"] = rate * factor


def _finite(loss: float, *, step: int, settings: TrainSettings) -> float:
    if not math.isfinite(loss):
        raise TrainingError(
            f"the loss became {loss} in step {step + 1}",
            f"learning_rate {settings.learning_rate}, "
            f"head_learning_rate {settings.head_learning_rate}.",
            "Lower the learning rates.",
        )
    return loss
