"""Time and memory of selecting, in one run on an embedded Ray of two workers.

    python pipelines/bench_select.py [--sources 100] [--matrices 560] [--rank 1024]
        [--streamed 1000000000] [--work DIR]

First a store of made-up spectra, as an exact decomposition of every source leaves it, is selected
from by the code that a run uses, in both scopes: the inventory of the store, the check that nothing
is missing, and the choice. Then the cut of a scope `global` is found over as many made-up values as
`--streamed` says, of 1,000 sources; 0 leaves that out. CPU seconds are those of the driver and both
workers: on a busy machine they mean more than the wall's.
"""

import argparse
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from svdmerge.comparison.selecting import (
    Question,
    contest,
    fill,
    hollow_model,
    stream_units,
    usage,
    weigh,
)
from svdmerge.engine.decompose import pending
from svdmerge.engine.inventory import take_inventory
from svdmerge.engine.plan import Plan, make_plan
from svdmerge.engine.runtime import Runtime, open_runtime
from svdmerge.engine.select import choose_components, common_cut
from svdmerge.engine.whatif import asked
from svdmerge.progress import SILENT
from svdmerge.recipe import parse_recipe
from svdmerge.tables import size, table

COLUMNS = ("", "values", "kept", "wall, s", "CPU, s", "driver", "largest worker", "load")


def made_plan(work: Path, *, num_sources: int, num_matrices: int, rank: int) -> Plan:
    """A plan of hollow models, and its store filled."""
    names = ["base", *(f"source-{i:03d}" for i in range(num_sources))]
    models = [hollow_model(work / n, num_matrices=num_matrices, rank=rank) for n in names]
    recipe = {
        "base_model": str(models[0]),
        "models": [str(m) for m in models[1:]],
        "parameters": {"svd": "exact"},
        "store": str(work / "store"),
        "out": str(work / "out"),
    }
    plan = make_plan(parse_recipe(recipe))
    fill(plan)
    return plan


def selected(plan: Plan, runtime: Runtime) -> int:
    """Number of components chosen, from what the store holds."""
    inventory = take_inventory(plan, runtime=runtime, progress=SILENT)
    assert next(pending(plan, inventory), None) is None
    return choose_components(plan, inventory, runtime=runtime, progress=SILENT).num_rows


def cut_of_streamed(num_values: int, runtime: Runtime) -> int:
    """Number of components above the common cut of so many values."""
    units = stream_units(num_values, num_sources=1000, rank=1000)
    total = 100 * sum(unit.num_matrices for unit in units)
    cut = common_cut(
        units, total=total, weigh=weigh, contest=contest, runtime=runtime, progress=SILENT
    )
    return sum(cut.kept.values())


def measured(
    name: str, num_values: int, work: Callable[[Runtime], int], *, runtime: Runtime
) -> tuple[object, ...]:
    """A row of the table."""

    def used() -> tuple[float, int, int]:
        asked_of = runtime.map(usage, [Question()] * 8, stage="usage", progress=SILENT)
        workers = {u.pid: u for u in asked_of}.values()
        peak = max(u.peak_bytes for u in workers)
        return sum(u.cpu_s for u in [usage(), *workers]), usage().peak_bytes, peak

    before, start = used()[0], time.perf_counter()
    kept = work(runtime)
    wall = time.perf_counter() - start
    cpu, driver, worker = used()
    load = f"{os.getloadavg()[0]:.1f}"
    return (name, f"{num_values:.2e}", kept, f"{wall:.1f}", f"{cpu - before:.1f}", size(driver),
            size(worker), load)  # fmt: skip


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--sources", type=int, default=100)
    parser.add_argument("--matrices", type=int, default=560)
    parser.add_argument("--rank", type=int, default=1024)
    parser.add_argument("--streamed", type=int, default=10**9)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--work", type=Path, default=None)
    args = parser.parse_args()
    work = args.work or Path(tempfile.mkdtemp(prefix="svdmerge-bench-"))
    plan = made_plan(work, num_sources=args.sources, num_matrices=args.matrices, rank=args.rank)
    stored = args.sources * args.matrices * args.rank
    rows: list[tuple[object, ...]] = []
    with open_runtime("local") as runtime:
        for scope in ("layer", "global"):
            asked_plan = asked(plan, scope=scope)
            rows += [
                measured(scope, stored, lambda r, p=asked_plan: selected(p, r), runtime=runtime)
                for _ in range(args.repeats)
            ]
        if args.streamed:
            rows.append(
                measured(
                    "global, streamed", args.streamed,
                    lambda r: cut_of_streamed(args.streamed, r), runtime=runtime,
                )
            )  # fmt: skip
    Console(width=120).print(table("Selecting", columns=COLUMNS, rows=rows))
    if args.work is None:
        shutil.rmtree(work)


if __name__ == "__main__":
    main()
