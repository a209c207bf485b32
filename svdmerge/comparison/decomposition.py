"""What decomposing for a selection costs: threshold rounds beside full and sketched SVDs."""

import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from svdmerge.comparison.rounds import threshold_rounds
from svdmerge.core.delta import delta
from svdmerge.core.params import Action, action_of
from svdmerge.storage.checkpoint import FLOATING, Checkpoint

# Exponents of the sources' spectra: those measured on fine-tuned models lie between.
STEEPNESS = (0.6, 0.9)
# Passes over a matrix, both ways counted as one, in which sixteen components of such spectra
# converge; and the columns of a certificate: what the count of flops needed assumes.
PASSES, CERTIFICATE, OVERSAMPLE = 6, 56, 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """CPU seconds for all sources of one matrix, or of several."""

    num_sources: int
    ours: float
    """Threshold rounds, certificates included."""
    full: float
    """`torch.linalg.svd` of every source, float32; measured on some, for all cost the same."""
    full_float64: float
    """The same in float64, which the selection is exact to; zero if it was not measured."""
    sketched: float
    """`torch.svd_lowrank` of every source to rank k: neither certain nor as exact."""
    floor: float
    """Flops needed at the speed of a large matrix product in the same run, or reading every source
    once at that of a sum, whichever is longer."""
    kept: int
    computed: int
    """Components kept and computed."""
    reads: float
    """How often a source is read, on average: once a round in which it takes part."""
    bytes_read: int
    depths: dict[int, int]
    """Sources by how many components were computed of them, over all matrices."""


def spectra(rank: int, *, num_sources: int) -> list[Float[Tensor, " r"]]:
    """Power laws of exponents spread over STEEPNESS."""
    exponents = np.linspace(*STEEPNESS, num_sources)
    return [torch.arange(1, rank + 1, dtype=torch.float32) ** -float(a) for a in exponents]


def matrices(rank: int, *, num_sources: int) -> list[Float[Tensor, "r r"]]:
    """Square matrices of those spectra. Vectors of all are those of two random orthogonal matrices
    in another order each, for drawing more of them would take longer than what is measured."""
    generator = torch.Generator().manual_seed(rank)
    u, v = (
        torch.linalg.qr(torch.randn(rank, rank, generator=generator)).Q for _ in range(2)
    )  # fmt: skip
    found: list[Tensor] = []
    for s in spectra(rank, num_sources=num_sources):
        rows, columns = (torch.randperm(rank, generator=generator) for _ in range(2))
        found.append((u[:, rows] * s) @ v[:, columns].T)
    return found


def model_matrices(base: Checkpoint, sources: Sequence[Checkpoint]) -> list[list[Tensor]]:
    """Every source's difference in each matrix that a merge would decompose."""
    return [
        [delta(s.tensors[name].read(), base=base.tensors[name].read()) for s in sources]
        for name in decomposed_names(base)
    ]


def decomposed_names(base: Checkpoint) -> list[str]:
    """Matrices of a model that a merge decomposes, by default policies."""
    return [
        name
        for name, ref in base.tensors.items()
        if action_of(
            name, shape=ref.shape, floating=ref.dtype in FLOATING, policies=(),
            vocab_size=base.vocab_size, matrix_action=Action.DECOMPOSE,
            vector_action=Action.AVERAGE,
        ) is Action.DECOMPOSE and not name.startswith("pooler.")
    ]  # fmt: skip


def measure(
    every: Sequence[Sequence[Float[Tensor, "m n"]]], *, share: float, repeats: int, full_of: int,
    float64: bool = False,
) -> Cost:  # fmt: skip
    """The costs of matrices, each of several sources: medians over interleaved repeats. Full SVDs
    of `full_of` sources stand for all; in `float64` too, if asked."""
    ks = [max(1, int(share * min(deltas[0].shape))) for deltas in every]
    found = [threshold_rounds(deltas, k=k) for deltas, k in zip(every, ks, strict=True)]
    some = [(d, k) for deltas, k in zip(every, ks, strict=True) for d in deltas[:full_of]]
    num_sources = len(every[0])
    probe, large, scale = torch.randn(1024, 1024), torch.randn(1 << 24), num_sources / full_of
    work: dict[str, tuple[float, Callable[[], object]]] = {
        "ours": (1.0, lambda: [threshold_rounds(d, k=k) for d, k in zip(every, ks, strict=True)]),
        "full": (scale, lambda: [torch.linalg.svd(d.float(), False) for d, _ in some]),
        "float64": (scale, lambda: [torch.linalg.svd(d.double(), False) for d, _ in some]),
        "sketched": (scale, lambda: [torch.svd_lowrank(d.float(), q=k) for d, k in some]),
        "flop": (1 / (2 * 1024**3), lambda: probe @ probe),
        "byte": (1 / (large.numel() * large.itemsize), large.sum),
    }
    if not float64:
        del work["float64"]
    times: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(repeats):
        for name, (factor, run) in work.items():
            times[name].append(factor * _seconds(run))
    middle = {name: statistics.median(values) for name, values in times.items()}
    flops = sum(
        needed_flops(*deltas[0].shape, needed=needed)
        for deltas, f in zip(every, found, strict=True)
        for needed in np.bincount([source for source, _ in f.kept], minlength=len(deltas)).tolist()
    )
    size = sum(d.numel() * 4 for deltas in every for d in deltas)
    depths = Counter(depth for f in found for depth in map(len, f.stored))
    return Cost(
        num_sources=num_sources,
        ours=middle["ours"],
        full=middle["full"],
        full_float64=middle.get("float64", 0.0),
        sketched=middle["sketched"],
        floor=max(flops * middle["flop"], size * middle["byte"]),
        kept=sum(len(f.kept) for f in found),
        computed=sum(depth * count for depth, count in depths.items()),
        reads=sum(f.reads for f in found) / sum(len(f.stored) for f in found),
        bytes_read=sum(f.reads * d[0].numel() * 4 for f, d in zip(found, every, strict=True)),
        depths=dict(sorted(depths.items())),
    )


def needed_flops(m: int, n: int, *, needed: int) -> float:
    """Of one source: 4 m n (l q + 56) with l = needed + 8 columns, q passes, the certificate."""
    return 4.0 * m * n * ((needed + OVERSAMPLE) * PASSES + CERTIFICATE)


def _seconds(work: Callable[[], object]) -> float:
    """Of this process's CPU: in one thread what a machine that does nothing else would take."""
    start = time.process_time()
    work()
    return time.process_time() - start
