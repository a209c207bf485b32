"""What one more source costs, and what a tick with nothing new does, in one process of one thread.

    python pipelines/bench_tick.py MODELS [--replicas 100] [--work DIR]

MODELS is a folder with one Hugging Face folder `base` and one per source. Slightly perturbed copies
of the sources are merged, then with one more, stage by stage: one source moves every average and
most cuts, so merging and writing are told apart from decomposing and selecting, whose target is at
most 3 % of the first time. CPU seconds mean more than the wall's where a machine is shared. Then
`svdmerge tick` releases it, and again with nothing new, start-up included: at most 5 s.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from svdmerge.engine.runtime import InProcess
from svdmerge.recipe import parse_recipe
from svdmerge.storage.checkpoint import open_checkpoint
from svdmerge.synthetic import perturbed_copy
from svdmerge.tables import table
from svdmerge.workflow import Run

# A replica's noise: small beside the deltas, large beside float16's rounding.
NOISE = 1e-3
STAGES = ("plan", "decompose", "select", "merge and write")


def merge(
    base: Path, sources: Sequence[Path], *, work: Path, earlier: str | None = None
) -> tuple[str, dict[str, tuple[float, float]]]:
    """The plan's hash, and CPU and wall seconds by stage."""
    seconds: dict[str, tuple[float, float]] = {}

    def timed(stage: str, do: Callable[[], Any]) -> Any:
        cpu, wall = time.process_time(), time.perf_counter()
        found = do()
        seconds[stage] = (time.process_time() - cpu, time.perf_counter() - wall)
        return found

    recipe = parse_recipe(raw(base, [str(s) for s in sources], work=work))
    run: Run = timed("plan", lambda: Run(recipe, runtime=InProcess(), earlier=earlier))
    timed("decompose", run.decompose)
    selection = timed("select", run.select)
    timed("merge and write", lambda: run.assemble(selection))
    return run.plan.hash, seconds


def raw(base: Path, models: Sequence[str], *, work: Path, out: str = "merged") -> dict[str, Any]:
    """The recipe of these models."""
    return {
        "base_model": str(base),
        "models": list(models),
        "store": str(work / "store"),
        "out": str(work / out),
    }


def tick(recipe: Path) -> float:
    """Wall seconds of the command, start-up included."""
    program = [sys.executable, "-c", "from svdmerge.cli import main; main()"]
    start = time.perf_counter()
    subprocess.run(
        [*program, "tick", str(recipe), "--address", "none"], check=True, capture_output=True
    )
    return time.perf_counter() - start


def main() -> None:
    """Measure, and print both tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("models", type=Path)
    parser.add_argument("--replicas", type=int, default=100)
    parser.add_argument("--work", type=Path, default=None)
    args = parser.parse_args()
    work = args.work or Path(tempfile.mkdtemp(prefix="svdmerge-bench-"))
    base = args.models / "base"
    real = sorted(p for p in args.models.iterdir() if p.is_dir() and p != base)
    copies = [
        perturbed_copy(
            open_checkpoint(str(real[i % len(real)])), work / f"models/replica-{i:03d}", seed=i,
            noise=NOISE,
        )
        for i in range(args.replicas + 1)
    ]  # fmt: skip
    earlier, first = merge(base, copies[:-1], work=work)
    _, second = merge(base, copies, work=work, earlier=earlier)
    rows = [
        (stage, *(f"{s:.2f}" for s in (*first[stage], *second[stage])),
         f"{second[stage][0] / max(first[stage][0], 1e-9):.1%}")
        for stage in STAGES
    ]  # fmt: skip
    both = [sum(s[stage][0] for stage in ("decompose", "select")) for s in (first, second)]
    rows.append(("decompose + select", f"{both[0]:.2f}", "", f"{both[1]:.2f}", "",
                 f"{both[1] / both[0]:.2%}"))  # fmt: skip
    console = Console(width=100)
    columns = (
        "",
        f"{args.replicas}: CPU, s",
        "wall, s",
        "one more: CPU, s",
        "wall, s",
        "CPU ratio",
    )
    console.print(table("One more source", columns=columns, rows=rows))

    recipe = work / "recipe.yml"
    recipe.write_text(yaml.safe_dump(raw(base, [f"{work}/models/*"], work=work, out="releases")))
    seconds = [tick(recipe) for _ in range(3)]
    console.print(f"svdmerge tick: {seconds[0]:.1f} s to release, with nothing new "
                  f"{seconds[1]:.1f} and {seconds[2]:.1f} s")  # fmt: skip
    if args.work is None:
        shutil.rmtree(work)


if __name__ == "__main__":
    main()
