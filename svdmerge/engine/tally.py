"""What the units of a run come to, by step: counted by the driver, and by it alone. On a Ray, its
metrics export the same counts as they grow."""

import logging
import threading
import time
from collections import Counter
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol, runtime_checkable

from svdmerge.engine.retry import Failure, Retry
from svdmerge.progress import Progress, Stage

logger = logging.getLogger(__name__)


class Kind(StrEnum):
    """How a metric changes: what is added up, or what is at a time."""

    COUNTER = "counter"
    GAUGE = "gauge"


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """Something that is counted, by step and one thing more."""

    name: str
    kind: Kind
    help: str
    labels: tuple[str, ...] = ("step",)

    @property
    def exported(self) -> str:
        """Its name where Prometheus reads it."""
        return f"ray_{self.name}{'_total' * (self.kind is Kind.COUNTER)}"


def _counter(name: str, text: str, *labels: str) -> Metric:
    return Metric(name=name, kind=Kind.COUNTER, help=text, labels=("step", *labels))


UNITS = _counter("svdmerge_units", "Units that ended: done, or failed for good.", "state")
RETRIES = _counter("svdmerge_retries", "Units tried again, by why they did not come back.", "cause")
MATRICES = _counter(
    "svdmerge_matrices", "Matrices computed, or reused from the store or an earlier try.", "state"
)
BYTES_READ = _counter("svdmerge_bytes_read", "Bytes of tensors that units read.")
FLOPS = _counter("svdmerge_flops", "Floating-point operations of solvers, by their formulas.")
STEP_SECONDS = _counter("svdmerge_step_seconds", "Wall time of steps, as the driver saw it.")
UNIT_SECONDS = _counter("svdmerge_unit_seconds", "Seconds of workers in units that were done.")
QUEUE_DEPTH = Metric(
    name="svdmerge_queue_depth",
    kind=Kind.GAUGE,
    help="Units that wait for their turn, and units handed to workers.",
    labels=("step", "state"),
)
METRICS = (
    UNITS, RETRIES, MATRICES, BYTES_READ, FLOPS, STEP_SECONDS, UNIT_SECONDS, QUEUE_DEPTH,
)  # fmt: skip


@runtime_checkable
class Reader(Protocol):
    """The receipt of a unit that tells what it read."""

    @property
    def bytes_read(self) -> int: ...


@runtime_checkable
class Solver(Protocol):
    """The receipt of a unit that tells what it computed."""

    @property
    def flops(self) -> float: ...


class Tally:
    """Counts of a run; with `export`, of a process that is connected to a Ray, its metrics too."""

    def __init__(self, *, export: bool = False) -> None:
        self._counts: Counter[tuple[Metric, tuple[str, ...]]] = Counter()
        self._lock = threading.Lock()  # several steps may run at once
        self._exported = {metric: _ray_metric(metric) for metric in METRICS} if export else {}

    def add(self, metric: Metric, value: float = 1.0, **labels: str) -> None:
        """Count more of a counter; nothing if the value is zero."""
        if not value:
            return
        with self._lock:
            self._counts[metric, _key(metric, labels)] += value  # pyright: ignore[reportArgumentType]
        if metric in self._exported:
            self._exported[metric].inc(value, tags=labels)

    def put(self, metric: Metric, value: float, **labels: str) -> None:
        """Tell what a gauge stands at."""
        if metric in self._exported:
            self._exported[metric].set(value, tags=labels)

    def add_unit(self, step: str, result: object, *, seconds: float) -> None:
        """Count a unit that is done, and what its receipt tells."""
        self.add(UNITS, step=step, state="done")
        self.add(UNIT_SECONDS, seconds, step=step)
        if isinstance(result, Reader):
            self.add(BYTES_READ, result.bytes_read, step=step)
        if isinstance(result, Solver):
            self.add(FLOPS, result.flops, step=step)

    def counts(self) -> "Counts":
        """What was counted so far."""
        with self._lock:
            return Counts(values=Counter(self._counts))


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """Counters at one time, or between two."""

    values: Mapping[tuple[Metric, tuple[str, ...]], float]

    def since(self, before: "Counts") -> "Counts":
        """What was added since an earlier time."""
        grown = {key: value - before.values.get(key, 0) for key, value in self.values.items()}
        return Counts(values={key: value for key, value in grown.items() if value})

    def by(self, label: str, metric: Metric) -> dict[str, float]:
        """A counter's values by one of its labels, over the others; sorted."""
        at, found = metric.labels.index(label), Counter[str]()
        for (counted, labels), value in self.values.items():
            if counted == metric:
                found[labels[at]] += value  # pyright: ignore[reportArgumentType]
        return dict(sorted(found.items()))

    def total(self, metric: Metric) -> float:
        """A counter over all labels."""
        return sum(self.by("step", metric).values())


@contextmanager
def counted_step(tally: Tally, step: str, num: int, progress: Progress) -> Generator[Stage]:
    """A step of so many units as progress shows it, its wall time counted and logged."""
    start = time.perf_counter()
    try:
        with progress.stage(step, num) as bar:
            yield bar
    finally:
        seconds = time.perf_counter() - start
        tally.add(STEP_SECONDS, seconds, step=step)
        for state in ("waiting", "running"):
            tally.put(QUEUE_DEPTH, 0, step=step, state=state)
    told = {"step": step, "num_units": num, "seconds": round(seconds, 3)}
    logger.info("%s: %d units in %.1f s", step, num, seconds, extra=told)


def count_retry(
    tally: Tally, unit: str, failure: Failure, retry: Retry, *, times: int, stage: str,
    error: Exception,
) -> None:  # fmt: skip
    """Count and log that a unit is tried again."""
    tally.add(RETRIES, step=stage, cause=failure.value)
    logger.warning(
        "%s: %s, tried again (%d): %s", unit, failure.value, times, last_line(error),
        extra={
            "step": stage, "unit": unit, "cause": failure.value, "times": times,
            "pause_s": retry.pause_s, "memory_bytes": retry.memory_bytes,
        },
    )  # fmt: skip


def last_line(error: Exception) -> str:
    """What an error says last: Ray's carry whole tracebacks."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]


def _key(metric: Metric, labels: Mapping[str, str]) -> tuple[str, ...]:
    return tuple(labels[name] for name in metric.labels)


def _ray_metric(metric: Metric) -> Any:
    from ray.util import metrics

    kinds = {Kind.COUNTER: metrics.Counter, Kind.GAUGE: metrics.Gauge}
    return kinds[metric.kind](metric.name, description=metric.help, tag_keys=metric.labels)
