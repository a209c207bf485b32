"""Weights that train themselves: all of some, or the biases alone."""

from collections.abc import Iterable

from torch import Tensor, nn

from svdmerge.errors import MismatchError
from svdmerge.peers.space import Weights, WeightSpace, taken


class FreeSpace(WeightSpace):
    """Some weights, free, from their start. Weight decay pulls to zero, as fine-tuning's does."""

    def __init__(self, start: Weights) -> None:
        self._weights = {name: nn.Parameter(w.detach().clone()) for name, w in start.items()}

    def values(self) -> list[nn.Parameter]:
        """The weights."""
        return list(self._weights.values())

    def weights(self) -> dict[str, Tensor]:
        """The weights."""
        return dict(self._weights)

    def frozen(self) -> Iterable[Tensor]:
        """Nothing."""
        return ()


def full(base: Weights, *, names: Iterable[str]) -> FreeSpace:
    """Full fine-tuning of the parameters named."""
    return FreeSpace(taken(names, weights=base, what="tuned parameters"))


def bitfit(base: Weights) -> FreeSpace:
    """All biases, those of norms included, and nothing else.

    Raises:
        MismatchError: there are none.

    Reference: BitFit, arXiv 2106.10199. Deviation: theirs trains a new head; here one
    trains along from its closed-form start, as everywhere.
    """
    # `in_proj_bias` of torch's attention is one too.
    biases = {name: weight for name, weight in base.items() if name.endswith("bias")}
    if not biases:
        raise MismatchError(
            f"none of {len(base)} parameters is a bias",
            "Their names end in `bias`.",
            "Give all of the module's parameters.",
        )
    return FreeSpace(biases)
