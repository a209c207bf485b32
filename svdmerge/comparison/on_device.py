"""What the first blocks of a large model's source cost on a device, beside copying it there."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from svdmerge.engine.device import Pair, deltas_on, device_class, stacks
from svdmerge.engine.stacked import FirstBlock, first_blocks_on

# (m, n) and how many of them: attention and feed-forward matrices of 32 layers of a 7B model.
SCALES: dict[str, tuple[tuple[int, int, int], ...]] = {
    "7b": ((4096, 4096, 128), (11008, 4096, 64), (4096, 11008, 32)),
    "small": ((160, 160, 4), (400, 160, 2), (160, 400, 1)),
}
# Components of the change, all well above the edge of bfloat16's rounding.
RANK = 12
# Weights' standard deviation, and the change's values over the edge of the noise that rounding
# weights of that size to eight bits adds to it.
WEIGHTS, ABOVE = 0.02, (10.0, 3.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceCost:
    """Seconds, medians over interleaved repeats, and what was found."""

    device: str
    num_matrices: int
    num_bytes: int
    """Of source and base, which are both copied."""
    copying: float
    """Copying them to the device and subtracting, nothing else."""
    ours: float
    """Copying, first blocks with certificates, and components back."""
    complete: int
    """Matrices whose change was found whole: all of it above the edge of the noise, and nothing
    left that could be larger."""
    besides: int
    """Values above the edge beyond those: rounding noise follows the change, and is no more noise
    of independent entries then."""


def synthetic_source(scale: str, *, device: torch.device) -> list[Pair]:
    """A bfloat16 model's matrices and those of a fine-tune of low rank, in the host's memory."""
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    pairs: list[Pair] = []
    for m, n, count in SCALES[scale]:
        base = (WEIGHTS * random(m, n)).bfloat16()
        # A step of bfloat16 is 2^-8 of the number, its rounding uniform.
        edge = WEIGHTS * 2**-8 / 12**0.5 * (m**0.5 + n**0.5)
        s = edge * torch.linspace(*ABOVE, RANK, device=device)
        for i in range(count):
            u, v = (torch.linalg.qr(random(side, RANK)).Q for side in (m, n))
            source = (base.float() + (u * s) @ v.T).bfloat16()
            name = f"{m}x{n}.{i}"
            pairs.append(Pair(name=name, source=_in_host(source), base=_in_host(base)))
    return pairs


def _in_host(tensor: Tensor) -> Tensor:
    """Pinned where there is a GPU, for only such memory is copied beside computation."""
    return tensor if tensor.device.type == "cpu" else tensor.cpu().pin_memory()


def measure_scale(scale: str, *, device: str, repeats: int) -> DeviceCost:
    """The costs of a synthetic source."""
    place = torch.device(device)
    return measure_device(synthetic_source(scale, device=place), device=place, repeats=repeats)


def measure_device(pairs: Sequence[Pair], *, device: torch.device, repeats: int) -> DeviceCost:
    """The costs, once everything has run once."""
    stacked = list(stacks(pairs))
    times: dict[str, list[float]] = {"copying": [], "ours": []}
    complete, besides = 0, 0
    for repeat in range(repeats + 1):
        start = _now(device)
        for deltas in deltas_on(device, stacked):
            del deltas
        copied = _now(device)
        above = [_above(found) for found in first_blocks_on(device, pairs)]
        complete = sum(count >= RANK for count in above)
        besides = sum(max(0, count - RANK) for count in above)
        if repeat:
            times["copying"].append(copied - start)
            times["ours"].append(_now(device) - copied)
    return DeviceCost(
        device=device_class(device),
        num_matrices=len(pairs),
        num_bytes=sum(2 * p.source.numel() * p.source.itemsize for p in pairs),
        copying=sorted(times["copying"])[repeats // 2],
        ours=sorted(times["ours"])[repeats // 2],
        complete=complete,
        besides=besides,
    )


def _above(found: FirstBlock) -> int:
    """Components above the edge of the noise; none if one of the change might be missing."""
    s = found.block.components.s
    count = int((s > found.noise).sum())
    return count if count >= RANK and found.block.bound <= float(s[RANK - 1]) else 0


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
