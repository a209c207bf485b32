"""Differences on the device that decomposes them: copied while the ones before are computed."""

from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from svdmerge.core.delta import delta

# Elements of a stack at most: on a GPU so many that products are few and large, and that two of
# them with what Lanczos keeps beside them stay within a fifth of 80 GB.
STACK = 1 << 29


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Pair:
    """A source's matrix and the base's, in the host's memory, as their files hold them."""

    name: str
    source: Float[Tensor, "m n"]
    base: Float[Tensor, "m n"]


def stacks(pairs: Sequence[Pair], *, most: int = STACK) -> Iterator[list[Pair]]:
    """Pairs of one shape and dtype together, in their order, at most so many elements at once."""
    by_kind: dict[tuple[object, ...], list[Pair]] = {}
    for pair in pairs:
        kind = (pair.source.shape, pair.source.dtype, pair.base.dtype)
        by_kind.setdefault(kind, []).append(pair)
    for alike in by_kind.values():
        count = max(1, most // max(1, alike[0].source.numel()))
        for start in range(0, len(alike), count):
            yield alike[start : start + count]


def deltas_on(
    device: torch.device, stacked: Sequence[Sequence[Pair]]
) -> Iterator[Float[Tensor, "b m n"]]:
    """Each stack's differences in float32 on the device. The next stack is copied, in the files'
    dtype, while the caller computes: from pinned memory, on a stream of its own."""
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None
    ahead: list[tuple[Tensor, Tensor]] = []
    for i, pairs in enumerate(stacked):
        here = ahead.pop() if ahead else _copied(pairs, device, stream)
        if stream is not None:
            torch.cuda.current_stream(device).wait_stream(stream)
        found = delta(here[0], base=here[1], dtype=torch.float32)
        if stream is not None:
            # The copies' memory may serve the next ones once the difference is made.
            for tensor in here:
                tensor.record_stream(torch.cuda.current_stream(device))
        del here
        if i + 1 < len(stacked):
            ahead.append(_copied(stacked[i + 1], device, stream))
        yield found


def _copied(
    pairs: Sequence[Pair], device: torch.device, stream: "torch.cuda.Stream | None"
) -> tuple[Tensor, Tensor]:
    """Sources and bases of a stack on the device, perhaps still under way."""
    with torch.cuda.stream(stream):
        found = [
            torch.empty(len(tensors), *tensors[0].shape, dtype=tensors[0].dtype, device=device)
            for tensors in ([p.source for p in pairs], [p.base for p in pairs])
        ]
        for i, pair in enumerate(pairs):
            found[0][i].copy_(pair.source, non_blocking=True)
            found[1][i].copy_(pair.base, non_blocking=True)
    return found[0], found[1]


@contextmanager
def full_float32() -> Generator[None]:
    """Products in float32 proper: TF32's ten bits would be above every residual promised."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def device_class(device: torch.device) -> str:
    """The device's part of a numerics class: what bits depend on beside torch and threads."""
    if device.type == "cpu":
        return f"cpu/{torch.backends.cpu.get_cpu_capability()}"
    return f"{device.type}/{torch.cuda.get_device_name(device)}"
