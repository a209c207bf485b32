"""What a tuning step costs beside a frozen model's forward pass and activation gradients."""

import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from svdmerge.core.components import RankOneComponents
from svdmerge.core.factored import FactoredLinear, install
from svdmerge.core.methods.axis import axis
from svdmerge.core.params import budget
from svdmerge.core.svd import seed_of
from svdmerge.recipe import TuneConfig
from svdmerge.storage.checkpoint import Checkpoint
from svdmerge.training.backbone import UNUSED_MODULES, Backbone, build_backbone, load_weights

FLOOR, FORWARD = "frozen: forward + activation gradients", "frozen: forward"


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCost:
    """The time of one kind of step, over repeats that took turns with all other kinds."""

    name: str
    trained: int
    seconds: float
    ratio: float
    """Median over repeats of its time over the frozen model's in the same repeat."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What a step runs on."""

    num_texts: int = 32
    num_tokens: int = 40
    repeats: int = 7


def step_costs(
    base: Checkpoint, *, shares: Sequence[float], workload: Workload, threads: int
) -> list[StepCost]:
    """The frozen model, then a tuned one per share of the rank in each form: auto and low-rank.

    All kinds take turns within each repeat, so that a machine's mood meets them alike.
    """
    torch.set_num_threads(threads)
    inputs = random_inputs(base, workload)
    steps: dict[str, tuple[int, Callable[[], None]]] = {
        FLOOR: (0, frozen_step(frozen_backbone(base), inputs)),
        FORWARD: (0, _forward(frozen_backbone(base), inputs)),
    }
    for share in shares:
        for form in ("auto", "low-rank"):
            backbone = frozen_backbone(base)
            layers = install(backbone.module, directions=random_factors(base, share=share))
            if form == "low-rank":
                for layer in layers.values():
                    layer.forward = layer.low_rank
            trained = sum(layer.sigma_change.numel() for layer in layers.values())
            steps[f"N = {share:.0%}, {form}"] = (trained, tuned_step(backbone, layers, inputs))
    times = take_turns({name: step for name, (_, step) in steps.items()}, workload.repeats)
    return [
        StepCost(
            name=name,
            trained=trained,
            seconds=statistics.median(times[name]),
            ratio=statistics.median(
                t / floor for t, floor in zip(times[name], times[FLOOR], strict=True)
            ),
        )
        for name, (trained, _) in steps.items()
    ]


def resident_peak_bytes() -> int:
    """The most that this process has held."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts KiB


def random_factors(
    base: Checkpoint, *, share: float, num_sources: int = 1
) -> dict[str, RankOneComponents]:
    """Seeded factors of every tunable matrix, merged from those of so many made-up sources."""
    return {
        name: _merged(name, m=m, n=n, k=budget(share, rank=min(m, n)), num_sources=num_sources)
        for name, (m, n) in tuned_matrices(base).items()
    }


def _merged(name: str, *, m: int, n: int, k: int, num_sources: int) -> RankOneComponents:
    generator = torch.Generator().manual_seed(seed_of(name, m=m, n=n, block=num_sources))

    def orthonormal(size: int, columns: int) -> Tensor:
        return torch.linalg.qr(torch.randn(size, columns, generator=generator)).Q

    # As selection leaves it: k components in all, shared out over the sources.
    counts = [k // num_sources + (i < k % num_sources) for i in range(num_sources)]
    parts = [
        RankOneComponents(
            u=orthonormal(m, count),
            s=torch.linspace(0.1, 0.01, count),
            vh=orthonormal(n, count).T.contiguous(),
        )
        for count in counts
        if count
    ]
    return axis(parts, weights=[1.0] * len(parts), scale=1.0).to(torch.float32)


def tuned_matrices(base: Checkpoint) -> dict[str, tuple[int, int]]:
    """Names and shapes of the matrices that tuning changes."""
    return {
        name: (module.weight.shape[0], module.weight.shape[1])
        for path, module in frozen_backbone(base).module.named_modules()
        if isinstance(module, nn.Linear)
        and not (name := f"{path}.weight").startswith(UNUSED_MODULES)
    }


def frozen_backbone(base: Checkpoint) -> Backbone:
    """The base, none of whose weights trains."""
    backbone = build_backbone(TuneConfig(train="-", test="-"), base=base)
    load_weights(backbone, checkpoint=base, base=base)
    backbone.module.requires_grad_(False)
    return backbone


def random_inputs(base: Checkpoint, workload: Workload) -> dict[str, Tensor]:
    """Seeded token ids."""
    shape = (workload.num_texts, workload.num_tokens)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, base.vocab_size or 100, shape, generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def frozen_step(backbone: Backbone, inputs: dict[str, Tensor]) -> Callable[[], None]:
    """A pass whose gradients run through all layers to the embeddings' output, into no weight."""
    embeddings = backbone.module.get_submodule("embeddings")
    embeddings.register_forward_hook(lambda module, args, out: out.detach().requires_grad_())

    def step() -> None:
        backbone.features(inputs).square().sum().backward()

    return step


def _forward(backbone: Backbone, inputs: dict[str, Tensor]) -> Callable[[], None]:
    def step() -> None:
        with torch.no_grad():
            backbone.features(inputs)

    return step


def tuned_step(
    backbone: Backbone, layers: Mapping[str, FactoredLinear], inputs: dict[str, Tensor]
) -> Callable[[], None]:
    """A whole step of AdamW on the singular values."""
    values = [layer.sigma_change for layer in layers.values()]
    optimizer = torch.optim.AdamW(values, lr=1e-3, weight_decay=0.0)

    def step() -> None:
        optimizer.zero_grad()
        backbone.features(inputs).square().sum().backward()
        optimizer.step()

    return step


def take_turns(steps: Mapping[str, Callable[[], None]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each step in each repeat."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for repeat in range(-1, repeats):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if repeat >= 0:  # the first turn warms caches and is not counted
                times[name].append(time.perf_counter() - start)
    return times
