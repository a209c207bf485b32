"""What stage 2 costs as sources become more: tuned singular values, and aTLAS beside them."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call

from svdmerge.core.factored import FactoredLinear, install
from svdmerge.peers.atlas import Atlas
from svdmerge.peers.space import WeightSpace
from svdmerge.storage.checkpoint import Checkpoint
from svdmerge.training.backbone import Backbone
from svdmerge.training.step_cost import (
    Workload,
    frozen_backbone,
    frozen_step,
    random_factors,
    random_inputs,
    resident_peak_bytes,
    take_turns,
    tuned_matrices,
    tuned_step,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Growth:
    """One kind of stage 2 at one number of sources."""

    seconds: float
    """Of a step, the median."""
    ratio: float
    """Median over repeats of its time over the frozen model's in the same repeat."""
    held_bytes: int
    """Of the frozen tensors of the tuned matrices: weights, and factors or differences."""
    peak_bytes: int
    """The most that the process held."""


class _Whole(nn.Module):
    """The backbone with its pooling as one module, so that weights can be given to a call."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.module, self._features = backbone.module, backbone.features

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        """Features (b, d)."""
        return self._features(inputs)


def growth(
    base: Checkpoint, *, kind: str, num_sources: int, share: float, workload: Workload, threads: int
) -> Growth:
    """The cost of `ours` or `atlas`: its peak memory is right in a process of its own alone."""
    torch.set_num_threads(threads)
    inputs = random_inputs(base, workload)
    step, held = KINDS[kind](base, inputs, num_sources, share)
    floor = frozen_step(frozen_backbone(base), inputs)
    times = take_turns({"floor": floor, "step": step}, workload.repeats)
    pairs = zip(times["step"], times["floor"], strict=True)
    return Growth(
        seconds=statistics.median(times["step"]),
        ratio=statistics.median(t / f for t, f in pairs),
        held_bytes=held,
        peak_bytes=resident_peak_bytes(),
    )


def ours(
    base: Checkpoint, inputs: dict[str, Tensor], num_sources: int, share: float
) -> tuple[Callable[[], None], int]:
    """A step on singular values of factors merged from so many sources, and the bytes it holds."""
    backbone = frozen_backbone(base)
    layers = install(
        backbone.module, directions=random_factors(base, share=share, num_sources=num_sources)
    )
    return tuned_step(backbone, layers, inputs), sum(map(_held, layers.values()))


def atlas(
    base: Checkpoint, inputs: dict[str, Tensor], num_sources: int, share: float
) -> tuple[Callable[[], None], int]:
    """aTLAS's step on coefficients of as many sources' differences, and the bytes it holds."""
    del share
    backbone = frozen_backbone(base)
    state = dict(backbone.module.named_parameters())
    start = {name: state[name].detach() for name in tuned_matrices(base)}
    # Cost depends on shapes alone: one difference stands for all, and `Atlas` copies it for each.
    one = {name: 1e-3 * torch.ones_like(weight) for name, weight in start.items()}
    space = Atlas(start, differences=[one] * num_sources)
    return _space_step(backbone, space, inputs), sum(_bytes(t) for t in space.frozen())


KINDS = {"ours": ours, "atlas": atlas}


def _space_step(
    backbone: Backbone, space: WeightSpace, inputs: dict[str, Tensor]
) -> Callable[[], None]:
    whole = _Whole(backbone)
    optimizer = torch.optim.AdamW(space.values(), lr=1e-3, weight_decay=0.0)

    def step() -> None:
        optimizer.zero_grad()
        named = {f"module.{name}": weight for name, weight in space.weights().items()}
        functional_call(whole, named, (inputs,)).square().sum().backward()
        optimizer.step()

    return step


def _held(layer: FactoredLinear) -> int:
    return sum(_bytes(t) for t in (layer.weight, layer.u, layer.vh))


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
