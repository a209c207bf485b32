"""LoRA and LoRA-XS with ranks that fit a number of trained values."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from svdmerge.core.svd import exact, seed_of
from svdmerge.peers.space import Weights, WeightSpace, taken

Cost = Callable[[int, int, int], int]
"""(rank, m, n) -> trained values of one matrix."""


def lora_cost(rank: int, m: int, n: int) -> int:
    """B (m, rank) and A (rank, n)."""
    return rank * (m + n)


def lora_xs_cost(rank: int, m: int, n: int) -> int:
    """R (rank, rank)."""
    del m, n
    return rank * rank


def ranks_within(
    num_values: int, *, weights: Weights, names: Iterable[str], cost: Cost
) -> dict[str, int]:
    """A rank for every matrix, such that together they train at most `num_values`, nearly as many.

    All matrices get the largest rank that fits for all; what is left buys one rank more for the
    last matrices that it fits, the last being nearest to the features. Where not even rank 1 fits
    everywhere this leaves early matrices out, so that small sizes stay comparable. Matrices of
    rank zero are not returned.
    """
    matrices = taken(names, weights=weights, what="adapted matrices")
    shapes = {name: tuple(weight.flatten(1).shape) for name, weight in matrices.items()}

    def total(ranks: Mapping[str, int]) -> int:
        return sum(cost(rank, *shapes[name]) for name, rank in ranks.items())

    def deeper(rank: int) -> dict[str, int]:
        return {name: min(rank, *shape) for name, shape in shapes.items()}

    most = max((min(shape) for shape in shapes.values()), default=0)
    ranks = deeper(max(r for r in range(most + 1) if total(deeper(r)) <= num_values))
    for name in reversed(shapes):
        tried = ranks | {name: ranks[name] + 1}
        if tried[name] <= min(shapes[name]) and total(tried) <= num_values:
            ranks = tried
    return {name: rank for name, rank in ranks.items() if rank}


class Lora(WeightSpace):
    """W = W_0 + B A; A starts uniform in +-1/sqrt(n), B at zero, so W starts as W_0.

    Deviations: alpha equals the rank, so nothing scales B A and the learning rate alone sets the
    pace; no dropout, for features come from a model in eval mode. A's start is that of the authors'
    code (Kaiming, a = sqrt(5)); the paper says Gaussian.

    Reference: LoRA, arXiv 2106.09685, section 4.1.
    """

    def __init__(self, base: Weights, *, ranks: Mapping[str, int], seed: int) -> None:
        self._start = taken(ranks, weights=base, what="adapted matrices")
        self._a: dict[str, nn.Parameter] = {}
        self._b: dict[str, nn.Parameter] = {}
        for name, weight in self._start.items():
            m, n = weight.flatten(1).shape
            generator = torch.Generator().manual_seed(seed_of(name, m=m, n=n, block=0) ^ seed)
            a = (2 * torch.rand(ranks[name], n, generator=generator) - 1) / math.sqrt(n)
            self._a[name] = nn.Parameter(a.to(weight))
            self._b[name] = nn.Parameter(weight.new_zeros(m, ranks[name]))

    def values(self) -> list[nn.Parameter]:
        """A and B of every matrix."""
        return [*self._a.values(), *self._b.values()]

    def weights(self) -> dict[str, Tensor]:
        """W_0 + B A."""
        return {
            name: start + (self._b[name] @ self._a[name]).reshape(start.shape)
            for name, start in self._start.items()
        }

    def frozen(self) -> Iterable[Tensor]:
        """W_0."""
        return self._start.values()


class WithLora(nn.Module):
    """A model with LoRA on some of its weights, ranks such that it has at most so many values.

    What else of the model trains is as its parameters say.
    """

    def __init__(
        self, model: nn.Module, *, names: Sequence[str], num_values: int, seed: int
    ) -> None:
        super().__init__()
        self.model = model
        weights = {name: model.get_parameter(name) for name in names}
        ranks = ranks_within(num_values, weights=weights, names=list(names), cost=lora_cost)
        self._space = Lora(weights, ranks=ranks, seed=seed)
        self.values = nn.ParameterList(self._space.values())

    def forward(self, *inputs: Any) -> Any:
        """What the model returns."""
        return functional_call(self.model, self._space.weights(), inputs)


class LoraXs(WeightSpace):
    """W = W_0 + U_r R diag(s_r) Vh_r of W_0's own leading factors; R (r, r) trains.

    The singular values stand on the input's side, as in the authors' code. Deviations: R starts at
    zero, theirs at a Gaussian of 1e-5, so that W starts as W_0 exactly; alpha equals the rank.
    Theirs runs 10 epochs, batches of 32, rates of 1e-4 to 1e-3.

    Reference: LoRA-XS, arXiv 2405.17604.
    """

    def __init__(self, base: Weights, *, ranks: Mapping[str, int]) -> None:
        self._start = taken(ranks, weights=base, what="adapted matrices")
        self._left: dict[str, Tensor] = {}
        self._right: dict[str, Tensor] = {}
        self._r: dict[str, nn.Parameter] = {}
        for name, weight in self._start.items():
            c = exact(weight.flatten(1)).slice(0, ranks[name])
            self._left[name] = c.u.to(weight)
            self._right[name] = (c.s[:, None] * c.vh).to(weight)
            self._r[name] = nn.Parameter(weight.new_zeros(ranks[name], ranks[name]))

    def values(self) -> list[nn.Parameter]:
        """R of every matrix."""
        return list(self._r.values())

    def weights(self) -> dict[str, Tensor]:
        """W_0 + U_r R diag(s_r) Vh_r."""
        return {
            name: start
            + (self._left[name] @ self._r[name] @ self._right[name]).reshape(start.shape)
            for name, start in self._start.items()
        }

    def frozen(self) -> Iterable[Tensor]:
        """W_0 and its leading factors."""
        yield from self._start.values()
        yield from self._left.values()
        yield from self._right.values()
