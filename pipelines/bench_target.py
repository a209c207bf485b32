"""Accuracy of tuning on one target, over several draws, beside the probes it must beat.

    python pipelines/bench_target.py MODELS --train T.parquet --test E.parquet
        [--per-class 32 64 all] [--draws 3] [--epochs 10] [--work DIR] [--address none]

MODELS is a folder with one Hugging Face folder `base` and one per source. For each number of
examples a class: a ridge probe on the base, on the source that leave-one-out picks, on the merge,
and the tuned model; mean and range over the draws. Draws of all examples differ in their order.
What an earlier call left in --work is not computed again.
"""

import argparse
import statistics
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console

from svdmerge.engine.runtime import Runtime, open_runtime
from svdmerge.progress import TerminalProgress
from svdmerge.recipe import Recipe, parse_recipe
from svdmerge.tables import table
from svdmerge.training.result import Row, TuneResult
from svdmerge.workflow import Run


def recipe(args: argparse.Namespace, *, per_class: int | None, seed: int) -> Recipe:
    """AXIS of all sources at the default budget, tuned for the target."""
    models: Path = args.models
    return parse_recipe(
        {
            "base_model": str(models / "base"),
            "models": sorted(str(p) for p in models.iterdir() if p.is_dir() and p.name != "base"),
            "store": str(args.work / "store"),
            "out": str(args.work / "merged"),
            "resources": {"threads": args.threads},
            "tune": {
                "train": str(args.train),
                "test": str(args.test),
                "per_class": per_class,
                "epochs": args.epochs,
                "seed": seed,
                "out": str(args.work / f"tuned-{per_class or 'all'}-{seed}"),
            },
        }
    )


def tuned(args: argparse.Namespace, runtime: Runtime, *, per_class: int | None) -> list[TuneResult]:
    """One result a draw."""
    results: list[TuneResult] = []
    for seed in range(args.draws):
        merge = recipe(args, per_class=per_class, seed=seed)
        report = Run(merge, runtime=runtime, progress=TerminalProgress()).all()
        results.append(report.tune)
    return results


def lines(results: Sequence[TuneResult]) -> Iterator[tuple[object, ...]]:
    """Mean, range, trained values and seconds of each kind of row."""
    rows: dict[str, list[Row]] = defaultdict(list)
    for result in results:
        for row in result.rows:
            rows[row.name.partition(":")[0]].append(row)
    for name, found in rows.items():
        accuracies = [row.accuracy for row in found]
        yield (
            name,
            f"{statistics.mean(accuracies):.3f}",
            f"{min(accuracies):.3f}..{max(accuracies):.3f}",
            found[0].trained,
            f"{statistics.mean(row.seconds for row in found):.0f}",
        )


def main() -> None:
    """Measure, and print a table per number of examples."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("models", type=Path)
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--per-class", nargs="+", default=["32", "64", "all"])
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--address", default="none")
    parser.add_argument("--work", type=Path, default=Path("svdmerge-bench"))
    args = parser.parse_args()
    console = Console()
    columns = ("model", "accuracy", "range", "trained", "seconds")
    with open_runtime(args.address) as runtime:
        for given in args.per_class:
            per_class = None if given == "all" else int(given)
            results = tuned(args, runtime, per_class=per_class)
            picked = ", ".join(r.best_source.rsplit("/", 1)[-1] for r in results)
            title = f"{given} examples a class, {args.draws} draws; picked: {picked}"
            console.print(table(title, columns=columns, rows=lines(results)))


if __name__ == "__main__":
    main()
