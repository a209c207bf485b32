"""What a gated layer costs in training, beside dense layers."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from svdmerge.core.kind.gate import GateRows, disjoint, gated
from svdmerge.core.kind.layer import DecomposableLinear
from svdmerge.core.kind.start import at_random, even, groups_of

NUM_GROUPS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerCost:
    """Milliseconds of a forward and backward pass of b samples of t tokens; medians."""

    m: int
    n: int
    rank: int
    gated_ms: float
    """All components, each sample's class another."""
    ungated_ms: float
    """The same factors without a gate."""
    dense_ms: float
    """A dense layer (m, n)."""


class _Ungated(nn.Module):
    """y = ((x Vh^T) * s) U^T + b, all components for every sample."""

    def __init__(self, layer: DecomposableLinear) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        layer = self.layer
        along = nn.functional.linear(x, layer.vh) * layer.s
        return nn.functional.linear(along, layer.u, layer.bias)


def layer_cost(m: int, n: int, *, batch: int, tokens: int, repeats: int) -> LayerCost:
    """Costs of an (m, n) layer whose rank makes its factors as many values as the dense layer's."""
    rank = m * n // (m + n + 1)
    sizes = [rank - rank // 2, *even(rank // 2, parts=NUM_GROUPS)]
    generator = torch.Generator().manual_seed(0)
    components = at_random(m, n, num_components=rank, num_active=rank, generator=generator)
    layer = DecomposableLinear(components, group=groups_of(sizes), bias=torch.zeros(m))
    model = nn.ModuleList([layer, GateRows(disjoint([str(g) for g in range(NUM_GROUPS)]))])
    classes = torch.arange(batch) % NUM_GROUPS
    x = torch.randn(batch, tokens, n, generator=generator, requires_grad=True)
    dense, ungated = nn.Linear(n, m), _Ungated(layer)

    def with_gate() -> None:
        with gated(model, classes):
            layer(x).sum().backward()

    times = _medians(
        [with_gate, lambda: ungated(x).sum().backward(), lambda: dense(x).sum().backward()],
        repeats=repeats,
    )
    return LayerCost(m=m, n=n, rank=rank, gated_ms=times[0], ungated_ms=times[1], dense_ms=times[2])


def _medians(works: list[Callable[[], None]], *, repeats: int) -> list[float]:
    """Milliseconds; the works take turns, so that a busy machine slows all alike."""
    seconds: list[list[float]] = [[] for _ in works]
    for _ in range(repeats + 1):
        for work, own in zip(works, seconds, strict=True):
            start = time.perf_counter()
            work()
            own.append(time.perf_counter() - start)
    return [1e3 * statistics.median(own[1:]) for own in seconds]  # the first warms up
