"""Strong and weak scaling on the cluster at hand, and what the simulator makes of it.

    python pipelines/scaling.py measure MODELS [--workers 1,2] [--sources 4,8] [--plot FILE]
    python pipelines/scaling.py forecast [--k 0.1]

MODELS is a folder with one Hugging Face folder `base` and one per source. `measure` merges the
first so many sources on so many workers of a Ray (`--address`), each time from an empty store, and
prints wall time, efficiency and machine-seconds; then what the simulator says, fed with the units
of the runs on one worker, beside what was measured. `forecast` is 500 sources of 70B parameters on
1,000 GPUs, and what each limit costs.
"""

import argparse
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from svdmerge.comparison.forecast import Cluster, Rates, alternatives, cpu_rate, forecast, host_rate
from svdmerge.comparison.scaling import (
    Measured,
    draw_scaling,
    driver_rate,
    measure,
    predicted_seconds,
    with_sources,
)
from svdmerge.engine.runtime import open_runtime
from svdmerge.tables import table

# Units for the driver's rate: seconds of them.
NUM_NOTHING = 2000


def scaling_rows(runs: Sequence[Measured]) -> list[tuple[object, ...]]:
    """By run: strong efficiency (the same sources on one worker), weak (as many a worker)."""
    seconds = {(r.num_workers, r.num_sources): r.seconds for r in runs}
    rows: list[tuple[object, ...]] = []
    for run in runs:
        w, s = run.num_workers, run.num_sources
        strong, weak = seconds.get((1, s)), seconds.get((1, s // w)) if s % w == 0 else None
        rows.append(
            (
                w, s, f"{run.seconds:.1f}", f"{run.unit_seconds:.1f}", f"{run.driver_seconds:.1f}",
                f"{run.machine_seconds:.1f}",
                f"{strong / (w * run.seconds):.2f}" if strong else "",
                f"{weak / run.seconds:.2f}" if weak else "",
            )
        )  # fmt: skip
    return rows


def predicted_rows(runs: Sequence[Measured]) -> list[tuple[object, ...]]:
    """By run: what the simulator says of it from the runs on one worker, and how far off it is.

    From its own sources' run if it is on more workers; else from the line through the two smallest.
    """
    alone = sorted((r for r in runs if r.num_workers == 1), key=lambda r: r.num_sources)
    rows: list[tuple[object, ...]] = []
    for run in runs:
        same = next((r for r in alone if r.num_sources == run.num_sources), None)
        if same is not None and run is not same:
            costs, source = same, f"1 worker, {same.num_sources} sources"
        elif len(alone) > 2 and run not in alone[:2]:
            costs = with_sources(alone[0], alone[1], num_sources=run.num_sources)
            source = f"1 worker, {alone[0].num_sources} and {alone[1].num_sources} sources"
        else:
            continue
        found = predicted_seconds(costs, num_workers=run.num_workers)
        rows.append(
            (run.num_workers, run.num_sources, source, f"{found:.1f}", f"{run.seconds:.1f}",
             f"{100 * (found / run.seconds - 1):+.0f} %")
        )  # fmt: skip
    return rows


def measured(args: argparse.Namespace) -> None:
    """Measure, and print both tables."""
    base = args.models / "base"
    found = sorted(p for p in args.models.iterdir() if p.is_dir() and p != base)
    work = args.work or Path(tempfile.mkdtemp(prefix="svdmerge-scaling-"))
    runs: list[Measured] = []
    with open_runtime(args.address) as runtime:
        # Not counted: workers start and import.
        measure(base, found[:2], work=work / "warm", runtime=runtime, num_workers=args.workers[-1])
        for num_sources in args.sources:
            for num_workers in args.workers:
                runs.append(
                    measure(
                        base, found[:num_sources], work=work / "run", runtime=runtime,
                        num_workers=num_workers,
                    )
                )  # fmt: skip
        rate = driver_rate(runtime, num=NUM_NOTHING)
    if args.work is None:
        shutil.rmtree(work)
    console = Console(width=140)
    columns = ("workers", "sources", "wall, s", "in units, s", "driver alone, s",
               "machine-seconds", "strong efficiency", "weak efficiency")  # fmt: skip
    console.print(table("Measured", columns=columns, rows=scaling_rows(runs)))
    steps = [
        (r.num_workers, r.num_sources, s.name, len(s.unit_seconds), f"{s.seconds:.2f}",
         f"{sum(s.unit_seconds):.2f}", f"{max(s.unit_seconds, default=0.0):.2f}")
        for r in runs
        for s in r.steps
    ]  # fmt: skip
    columns = ("workers", "sources", "step", "units", "wall, s", "in units, s", "largest, s")
    console.print(table("Steps", columns=columns, rows=steps))
    columns = ("workers", "sources", "costs from", "predicted, s", "measured, s", "off by")
    console.print(table("Simulated", columns=columns, rows=predicted_rows(runs)))
    console.print(f"{rate:.0f} units that do nothing a second through the driver")
    if args.plot:
        draw_scaling(runs, args.plot)


def forecasts(args: argparse.Namespace) -> None:
    """Print the forecast, each limit lifted alone."""
    rates = Rates(host_bytes=host_rate(), cpu_flops=args.threads * cpu_rate())
    rows: list[tuple[object, ...]] = []
    for name, cluster in alternatives(Cluster()).items():
        told = forecast(cluster, rates, k=args.k)
        rows.append(
            (name, *(f"{s:.0f}" for s in told.seconds.values()), f"{told.total_s / 60:.1f}",
             f"{told.gpu_hours:.0f}", f"{100 * told.lost_share:.1f} %")
        )  # fmt: skip
    console = Console(width=140)
    columns = ("", "decompose, s", "merge, s", "write, s", "all, min", "GPU hours", "done twice")
    title = (
        f"500 sources of 70B on 1,000 GPUs; a core hashes and decodes {rates.host_bytes / 1e9:.2f} "
        f"GB/s (measured), a task of {args.threads} threads {rates.cpu_flops / 1e9:.0f} Gflop/s"
    )
    console.print(table(title, columns=columns, rows=rows))


def numbers(text: str) -> list[int]:
    """Whole numbers by commas, in order."""
    return sorted(int(part) for part in text.split(","))


def main() -> None:
    """One of the two."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    commands = parser.add_subparsers(required=True)
    measuring = commands.add_parser("measure")
    measuring.add_argument("models", type=Path)
    measuring.add_argument("--address", default="local")
    measuring.add_argument("--workers", type=numbers, default=[1, 2])
    measuring.add_argument("--sources", type=numbers, default=[4, 8])
    measuring.add_argument("--work", type=Path, default=None)
    measuring.add_argument("--plot", type=Path, default=None)
    measuring.set_defaults(work_of=measured)
    forecasting = commands.add_parser("forecast")
    forecasting.add_argument("--k", type=float, default=0.1)
    forecasting.add_argument("--threads", type=int, default=8)
    forecasting.set_defaults(work_of=forecasts)
    args = parser.parse_args()
    args.work_of(args)


if __name__ == "__main__":
    main()
