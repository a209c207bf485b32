"""What merging 500 sources of 70B parameters would take on 1,000 GPUs, by the simulator: a core's
rates are measured, the machines' and the store's are assumed."""

import hashlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch

from svdmerge.comparison.simulator import Machines, UnitCost, simulate
from svdmerge.core.params import Action, Parameter
from svdmerge.engine.decompose import GPU_SHARE
from svdmerge.engine.flops import block_flops, merge_flops, write_flops

# (m, n) and how many in a layer: Llama 3 70B's attention and feed-forward matrices.
LAYER = ((8192, 8192, 2), (1024, 8192, 2), (28672, 8192, 2), (8192, 28672, 1))
NUM_LAYERS = 80
# Bytes of a weight in bfloat16, and of a stored vector's entry.
WEIGHT_BYTES, STORED_BYTES = 2, 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """What one worker does in a second."""

    host_bytes: float
    """Hashed and decoded by one core; `host_rate` measures it."""
    cpu_flops: float
    """Of products and decompositions by one task's threads; `cpu_rate` measures one thread."""
    gpu_flops: float = 2e13
    """Of products in float32 on a GPU: assumed, a third of an H100's peak without tensor cores."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """The machines and their store, all assumed."""

    num_gpus: int = 1000
    num_sources: int = 500
    num_layers: int = NUM_LAYERS
    base_reads: float = 1.0
    """How often the base is read for each source: 1, as it is built; 0 if nodes kept it."""
    store_bytes_per_s: float = 1e11
    """Of a bucket, all readers together."""
    worker_bytes_per_s: float = 1.25e9
    """10 Gbit/s for each GPU."""
    driver_s: float = 1e-3
    """For each unit: a thousand in a second, which is what the engine is to reach."""
    straggler_share: float = 0.02
    straggler_factor: float = 5.0
    mean_life_s: float = 6 * 3600.0
    """Of a spot machine's GPU."""
    recovery_s: float = 180.0
    """Until the next machine is up, its image pulled."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """What a merge would take: seconds by step, and what was done twice."""

    seconds: Mapping[str, float]
    lost_share: float
    """Of the workers' busy seconds, in units that were lost with their machine."""
    gpu_hours: float

    @property
    def total_s(self) -> float:
        """Of all steps."""
        return sum(self.seconds.values())


def forecast(cluster: Cluster, rates: Rates, *, k: float, seed: int = 0) -> Forecast:
    """Decompose, merge and write; the selection from stored values takes seconds."""
    slots = round(cluster.num_gpus / GPU_SHARE)
    machines = Machines(
        num_workers=slots, driver_s=cluster.driver_s,
        store_bytes_per_s=cluster.store_bytes_per_s,
        # Two tasks take turns on one GPU and share its machine's network.
        worker_bytes_per_s=cluster.worker_bytes_per_s * GPU_SHARE,
        straggler_share=cluster.straggler_share, straggler_factor=cluster.straggler_factor,
        mean_life_s=cluster.mean_life_s, recovery_s=cluster.recovery_s,
    )  # fmt: skip
    whole = replace(
        machines, num_workers=cluster.num_gpus, worker_bytes_per_s=cluster.worker_bytes_per_s
    )
    found = {
        "decompose": simulate(
            [_decompose_cost(cluster, rates)] * (cluster.num_sources * cluster.num_layers),
            machines,
            seed=seed,
        ),
        "merge": simulate([_merge_cost(rates, k=k)] * cluster.num_layers, whole, seed=seed),
        "write": simulate([_write_cost(rates, k=k)] * cluster.num_layers, whole, seed=seed),
    }
    seconds = {name: outcome.seconds for name, outcome in found.items()}
    busy = sum(outcome.busy_s for outcome in found.values())
    return Forecast(
        seconds=seconds,
        lost_share=sum(outcome.lost_s for outcome in found.values()) / busy,
        gpu_hours=cluster.num_gpus * sum(seconds.values()) / 3600,
    )


def alternatives(cluster: Cluster) -> dict[str, Cluster]:
    """The cluster, and each of its limits lifted alone: what helps most is the bottleneck."""
    without = {
        "as assumed": {},
        "four times the store's bandwidth": {"store_bytes_per_s": 4 * cluster.store_bytes_per_s},
        "the base read once a node, not once a source": {"base_reads": 0.0},
        "four times a worker's network": {"worker_bytes_per_s": 4 * cluster.worker_bytes_per_s},
        "a driver of 10,000 units a second": {"driver_s": 1e-4},
        "no stragglers": {"straggler_share": 0.0},
        "no machine lost": {"mean_life_s": float("inf")},
        "machines live an hour": {"mean_life_s": 3600.0},
    }
    return {name: replace(cluster, **changes) for name, changes in without.items()}


def host_rate(*, num_bytes: int = 1 << 26) -> float:
    """Bytes a second that one thread here hashes (sha256) and decodes (bfloat16 to float32)."""
    data = bytearray(num_bytes)

    def work() -> None:
        hashlib.sha256(data).digest()
        torch.frombuffer(data, dtype=torch.bfloat16).float()

    return num_bytes / _least_seconds(work)


def cpu_rate(*, side: int = 1024) -> float:
    """Flops a second of one thread's float32 product here."""
    a = torch.ones(side, side)
    return 2.0 * side**3 / _least_seconds(lambda: a @ a)


def _least_seconds(work: Callable[[], object]) -> float:
    """Of this process's processor time, for others may keep the machine busy; of three times."""
    times: list[float] = []
    for _ in range(3):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return min(times)


def _numel() -> int:
    return sum(m * n * count for m, n, count in LAYER)


def _decompose_cost(cluster: Cluster, rates: Rates) -> UnitCost:
    """One layer of one source: first blocks of its matrices, with certificates."""
    read = (1.0 + cluster.base_reads) * _numel() * WEIGHT_BYTES
    flops = sum(count * block_flops(p) for p, count in _matrices())
    # Two tasks share a GPU, so that each computes at half its rate.
    gpu = rates.gpu_flops * GPU_SHARE
    # Kept or not, the base is hashed and decoded with every source.
    return UnitCost(
        read_bytes=read, seconds=2 * _numel() * WEIGHT_BYTES / rates.host_bytes + flops / gpu
    )


def _merge_cost(rates: Rates, *, k: float) -> UnitCost:
    """One layer: its kept components read and merged on a worker's processor."""
    flops = sum(count * merge_flops(p, k=_kept(p, k)) for p, count in _matrices())
    stored = sum(count * _kept(p, k) * (p.m + p.n) * STORED_BYTES for p, count in _matrices())
    return UnitCost(read_bytes=stored, seconds=stored / rates.host_bytes + flops / rates.cpu_flops)


def _write_cost(rates: Rates, *, k: float) -> UnitCost:
    """One layer as a file of its own: the base read, the difference added, the file written."""
    flops = sum(count * write_flops(p, k=_kept(p, k)) for p, count in _matrices())
    weights = _numel() * WEIGHT_BYTES
    stored = sum(count * _kept(p, k) * (p.m + p.n) * STORED_BYTES for p, count in _matrices())
    return UnitCost(
        read_bytes=2 * weights + stored,  # read and written, at the same rate
        seconds=2 * weights / rates.host_bytes + flops / rates.cpu_flops,
    )


def _matrices() -> list[tuple[Parameter, int]]:
    return [
        (Parameter(id="", tensor="", start=0, m=m, n=n, action=Action.DECOMPOSE), count)
        for m, n, count in LAYER
    ]


def _kept(parameter: Parameter, k: float) -> int:
    return max(1, int(k * parameter.rank + 1e-9))
