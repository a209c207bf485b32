"""What all comparators are: trainable values, and the weights of a frozen model they stand for."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from svdmerge.core.transfer import LinearHead
from svdmerge.errors import MismatchError

Weights = Mapping[str, Tensor]
"""A parameter's name in the module -> its weight, float32."""


@runtime_checkable
class WeightSpace(Protocol):
    """Trainable values and the weights they stand for."""

    def values(self) -> list[nn.Parameter]:
        """All that trains, in a fixed order."""
        ...

    def weights(self) -> dict[str, Tensor]:
        """The weights that differ from the module's own, as functions of the values."""
        ...

    def frozen(self) -> Iterable[Tensor]:
        """What must stay in memory while the values train, the module's own weights included
        where this space changes them."""
        ...

    @property
    def num_trained(self) -> int:
        """Numbers that train, without a head."""
        return sum(value.numel() for value in self.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedValues:
    """What a comparator trains, stores and holds."""

    without_head: int
    with_head: int
    stored_bytes: int
    """Of the trained values alone in float32: an adapter without its head."""
    held_bytes: int
    """Of the space's frozen tensors: what grows with the sources, if anything does."""


def trained_values(space: WeightSpace, *, head: LinearHead) -> TrainedValues:
    """The space's size, counted from its tensors."""
    own = space.num_trained
    return TrainedValues(
        without_head=own,
        with_head=own + head.weight.numel() + head.bias.numel(),
        stored_bytes=4 * own,
        held_bytes=sum(t.numel() * t.element_size() for t in space.frozen()),
    )


@torch.no_grad()
def choose(spaces: Iterable[WeightSpace], *, score: Callable[[Weights], float]) -> WeightSpace:
    """The space whose weights score highest before any training; the first of equals."""
    return max(spaces, key=lambda space: score(space.weights()))


def taken(names: Iterable[str], *, weights: Weights, what: str) -> dict[str, Tensor]:
    """The weights of these names, in their order, cut off from any gradient.

    Raises:
        MismatchError: there is none of that name.
    """
    names = list(names)
    if unknown := sorted(set(names) - set(weights)):
        raise MismatchError(
            f"{what}: {unknown[0]} is not among the {len(weights)} weights given",
            f"{len(unknown)} such names.",
            "Give the model's own weight for every name, under the module's names.",
        )
    return {name: weights[name].detach() for name in names}


def shared_names(sources: Sequence[Mapping[str, object]], *, fix: str) -> list[str]:
    """The names that every source has, in the first one's order.

    Raises:
        MismatchError: there is no source, or one has other names.
    """
    for number, source in enumerate(sources):
        if other := sorted(set(source) ^ set(sources[0])):
            raise MismatchError(
                f"source {number + 1} of {len(sources)}: {other[0]} is not in both it and source 1",
                f"{len(other)} such names.",
                fix,
            )
    if not sources:
        raise MismatchError("no sources", "At least one is needed.", "Give the sources.")
    return list(sources[0])
