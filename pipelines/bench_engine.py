"""Overhead and memory of the engine, measured in one run.

    python pipelines/bench_engine.py MODELS [--replicas 64] [--work DIR]

MODELS is a folder with one Hugging Face folder `base` and one per source. Two tables:

- wall time of a whole run (without tuning) on an embedded Ray, against the same stages mapped over
  as many plain processes, and Ray's own start: the target is <= 1.5x of processes plus start;
- memory of the largest worker with all sources once, and with `--replicas` slightly perturbed
  copies of them: it must not grow with the number of sources.
"""

import argparse
import multiprocessing
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeVar

from rich.console import Console

from svdmerge.engine.runtime import Unit, call, open_runtime
from svdmerge.engine.tally import Tally
from svdmerge.progress import Progress, TerminalProgress
from svdmerge.recipe import Recipe, parse_recipe
from svdmerge.report.run_report import RunReport
from svdmerge.storage.checkpoint import open_checkpoint
from svdmerge.synthetic import perturbed_copy
from svdmerge.tables import size, table
from svdmerge.workflow import Run

U = TypeVar("U", bound=Unit)
R = TypeVar("R")
# A replica's noise: small beside the deltas, large beside float16's rounding.
NOISE = 1e-3


@dataclass(frozen=True, slots=True)
class PlainProcesses:
    """The engine's units over a pool of processes: what Ray is compared with."""

    pool: ProcessPoolExecutor
    address: str = "processes"
    tally: Tally = field(default_factory=Tally)

    def map(
        self,
        task: Callable[[U], R],
        units: Sequence[U],
        *,
        stage: str,
        progress: Progress,
        failed: object = None,
        num_gpus: float = 0,
    ) -> list[R]:
        """The task's results, in the order of the units."""
        return list(self.pool.map(partial(call, task), units))


def recipe(base: Path, sources: Sequence[Path], *, work: Path) -> Recipe:
    """A merge of all sources with a fresh store."""
    shutil.rmtree(work / "store", ignore_errors=True)
    return parse_recipe(
        {
            "base_model": str(base),
            "models": [str(s) for s in sources],
            "store": str(work / "store"),
            "out": str(work / "merged"),
        }
    )


def on_processes(merge: Recipe, *, num: int) -> tuple[RunReport, float]:
    """The run over plain processes, and its seconds, the processes' start included."""
    start = time.perf_counter()
    with ProcessPoolExecutor(num, mp_context=multiprocessing.get_context("spawn")) as pool:
        report = Run(merge, runtime=PlainProcesses(pool), progress=TerminalProgress()).all()
    return report, time.perf_counter() - start


def on_ray(merge: Recipe) -> tuple[RunReport, float, float]:
    """The run on an embedded Ray, its seconds from start to result, and those of Ray's start."""
    start = time.perf_counter()
    with open_runtime("local") as runtime:
        started = time.perf_counter() - start
        report = Run(merge, runtime=runtime, progress=TerminalProgress()).all()
        seconds = time.perf_counter() - start
    return report, seconds, started


def peak(report: RunReport) -> int:
    """Resident size of the largest worker of any stage."""
    return max(s.peak_worker_rss_bytes for s in report.stages)


def main() -> None:
    """Measure, and print both tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("models", type=Path)
    parser.add_argument("--replicas", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--work", type=Path, default=None)
    args = parser.parse_args()
    work = args.work or Path(tempfile.mkdtemp(prefix="svdmerge-bench-"))
    base = args.models / "base"
    sources = sorted(p for p in args.models.iterdir() if p.is_dir() and p != base)
    num = os.cpu_count() or 1

    rows: list[tuple[object, ...]] = []
    few = None
    for i in range(args.repeats):
        _, plain_s = on_processes(recipe(base, sources, work=work), num=num)
        few, ray_s, start_s = on_ray(recipe(base, sources, work=work))
        ratio = ray_s / (plain_s + start_s)
        rows.append((i + 1, f"{plain_s:.1f}", f"{start_s:.1f}", f"{ray_s:.1f}", f"{ratio:.2f}"))
    console = Console()
    columns = ("repeat", "processes, s", "Ray's start, s", "run on Ray, s", "ratio")
    console.print(table(f"{len(sources)} sources, {num} cores", columns=columns, rows=rows))

    copies = [
        perturbed_copy(
            open_checkpoint(str(sources[i % len(sources)])), work / f"replica-{i}", seed=i,
            noise=NOISE,
        )
        for i in range(args.replicas)
    ]  # fmt: skip
    many, many_s, _ = on_ray(recipe(base, copies, work=work))
    memory = [(len(sources), size(peak(few))) if few else ("", "")]
    memory.append((len(copies), size(peak(many))))
    console.print(table("Largest worker", columns=("sources", "resident"), rows=memory))
    console.print(f"{len(copies)} sources took {many_s:.0f} s")
    if args.work is None:
        shutil.rmtree(work)


if __name__ == "__main__":
    main()
