"""Runs on few and on many workers, unit by unit: what they took, and what the simulator, fed with
the costs of a run on one worker, says they would take."""

import shutil
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar, cast

from svdmerge.comparison.simulator import Machines, UnitCost, simulate
from svdmerge.engine.runtime import Runtime, Unit
from svdmerge.engine.tally import Tally
from svdmerge.progress import SILENT, Progress
from svdmerge.recipe import parse_recipe
from svdmerge.workflow import Run

U = TypeVar("U", bound=Unit)
R = TypeVar("R")


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One map of a run: seconds until its last result was there, and of each unit at its worker."""

    name: str
    seconds: float
    unit_seconds: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """A whole run without tuning, its cluster up and warm."""

    num_workers: int
    num_sources: int
    seconds: float
    steps: tuple[Step, ...]

    @property
    def machine_seconds(self) -> float:
        """Of all workers, idle or not."""
        return self.num_workers * self.seconds

    @property
    def unit_seconds(self) -> float:
        """Of all workers in units."""
        return sum(sum(step.unit_seconds) for step in self.steps)

    @property
    def driver_seconds(self) -> float:
        """Of the driver between its maps, when no worker has anything to do."""
        return self.seconds - sum(step.seconds for step in self.steps)


@dataclass(slots=True)
class Timed:
    """A runtime that notes what each unit takes at its worker, and each map."""

    inner: Runtime
    steps: list[Step] = field(default_factory=list[Step])

    @property
    def address(self) -> str:
        """Where units run."""
        return self.inner.address

    @property
    def tally(self) -> Tally:
        """What the units come to."""
        return self.inner.tally

    def map(
        self,
        task: Callable[[U], R],
        units: Sequence[U],
        *,
        stage: str,
        progress: Progress,
        failed: Any = None,
        num_gpus: float = 0,
    ) -> list[R]:
        """The task's results, in the order of the units."""
        start = time.perf_counter()
        found = self.inner.map(
            partial(_timed, task), units, stage=stage, progress=progress, num_gpus=num_gpus,
            failed=failed and (lambda unit, error: (failed(unit, error), 0.0)),
        )  # fmt: skip
        step = Step(
            name=stage,
            seconds=time.perf_counter() - start,
            unit_seconds=tuple(seconds for _, seconds in found),
        )
        self.steps.append(step)
        return [result for result, _ in found]


def _timed(task: Callable[[U], R], unit: U) -> tuple[R, float]:
    start = time.perf_counter()
    return task(unit), time.perf_counter() - start


@contextmanager
def only(num_workers: int) -> Generator[None]:
    """So many CPUs of the Ray that runs for the block's tasks: idle actors hold the others."""
    import ray

    @ray.remote(num_cpus=1)
    class Holder:
        def ready(self) -> None:
            """Answer, once there."""

    spare = int(ray.cluster_resources()["CPU"]) - num_workers
    holders: list[Any] = [Holder.remote() for _ in range(spare)]
    ray.get([holder.ready.remote() for holder in holders])
    try:
        yield
    finally:
        for holder in holders:
            ray.kill(holder)


def measure(
    base: Path, sources: Sequence[Path], *, work: Path, runtime: Runtime, num_workers: int
) -> Measured:
    """A run over the sources on so many of the runtime's workers, from an empty store."""
    shutil.rmtree(work, ignore_errors=True)
    recipe = parse_recipe(
        {
            "base_model": str(base),
            "models": [str(s) for s in sources],
            "store": str(work / "store"),
            "out": str(work / "merged"),
        }
    )
    timed = Timed(runtime)
    with only(num_workers):
        start = time.perf_counter()
        Run(recipe, runtime=timed, progress=SILENT).all()
        seconds = time.perf_counter() - start
    shutil.rmtree(work)
    return Measured(
        num_workers=num_workers,
        num_sources=len(sources),
        seconds=seconds,
        steps=tuple(timed.steps),
    )


def driver_rate(runtime: Runtime, *, num: int) -> float:
    """Units a second that do nothing, through the driver and its workers."""
    units = [SimpleNamespace(name="nothing", memory_bytes=1 << 20, threads=1)] * num
    start = time.perf_counter()
    runtime.map(_nothing, cast("list[Any]", units), stage="nothing", progress=SILENT)
    return num / (time.perf_counter() - start)


def _nothing(unit: Any) -> None:
    del unit


def predicted_seconds(measured: Measured, *, num_workers: int) -> float:
    """What a run measured on one worker would take on so many.

    What a map took beyond its units is shared out over them: it is the way of a task to its worker
    and back. The driver's own seconds stay as they are.
    """
    machines = Machines(num_workers=num_workers)
    found = measured.driver_seconds
    for step in measured.steps:
        if step.unit_seconds:
            way = (step.seconds - sum(step.unit_seconds)) / len(step.unit_seconds)
            costs = [UnitCost(seconds=max(0.0, s + way)) for s in step.unit_seconds]
            found += simulate(costs, machines).seconds
        else:
            found += step.seconds
    return found


def with_sources(few: Measured, many: Measured, *, num_sources: int) -> Measured:
    """A run on one worker over another number of sources, on the straight line through two.

    By step: how many units there are, what they take on average, and what the step takes beyond
    them; the spread of units is that of the larger run.
    """
    share = (num_sources - few.num_sources) / (many.num_sources - few.num_sources)

    def between(a: float, b: float) -> float:
        return max(0.0, a + share * (b - a))

    steps: list[Step] = []
    for name in dict.fromkeys(step.name for step in many.steps):
        a, b = _of(few, name), _of(many, name)
        num = round(between(len(a.unit_seconds), len(b.unit_seconds)))
        mean = between(_mean(a), _mean(b))
        spread = [s / _mean(b) for s in b.unit_seconds] or [1.0]
        units = tuple(mean * spread[i % len(spread)] for i in range(num))
        beyond = between(a.seconds - sum(a.unit_seconds), b.seconds - sum(b.unit_seconds))
        steps.append(Step(name=name, seconds=sum(units) + beyond, unit_seconds=units))
    return Measured(
        num_workers=many.num_workers,
        num_sources=num_sources,
        seconds=sum(s.seconds for s in steps) + between(few.driver_seconds, many.driver_seconds),
        steps=tuple(steps),
    )


def _of(measured: Measured, name: str) -> Step:
    """All maps of one stage as one."""
    found = [step for step in measured.steps if step.name == name]
    return Step(
        name=name,
        seconds=sum(step.seconds for step in found),
        unit_seconds=tuple(s for step in found for s in step.unit_seconds),
    )


def _mean(step: Step) -> float:
    return sum(step.unit_seconds) / max(1, len(step.unit_seconds))


def draw_scaling(runs: Sequence[Measured], path: Path) -> None:
    """Write the figure: wall time by workers, a line for each number of sources, and the ideal."""
    from matplotlib.figure import Figure

    figure: Any = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.subplots()
    for num_sources in sorted({run.num_sources for run in runs}):
        points = sorted(
            (run.num_workers, run.seconds) for run in runs if run.num_sources == num_sources
        )
        workers, seconds = zip(*points, strict=True)
        (line,) = axes.plot(workers, seconds, "o-", label=f"{num_sources} sources")
        ideal = [seconds[0] * workers[0] / w for w in workers]
        axes.plot(workers, ideal, ":", color=line.get_color())
    axes.set(
        xscale="log", yscale="log", xlabel="workers", ylabel="wall time, s (dotted: ideal)",
        title="a merge on few and on many workers",
    )  # fmt: skip
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=150)
