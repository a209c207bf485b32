"""How fast `svdmerge rank` is, and whether its order is that of the whole models.

    python pipelines/bench_rank.py MODELS DATA OUT [--targets mr,trec] [--per-class 32]

MODELS and DATA as for `bench_transfer.py`. Every source is scored by the command from its stored
components (k = 10 %), then whole: by the same held-out loss, and by test accuracy with that head.
"""

import argparse
import time
from pathlib import Path

from bench_transfer import clean, sources_for

from svdmerge.comparison.cells import rank_correlation
from svdmerge.comparison.problem import Problem
from svdmerge.comparison.untrained import source_fit, whole
from svdmerge.recipe import parse_recipe
from svdmerge.workflow import prepare, rank, run_stage


def measure(target: str, args: argparse.Namespace) -> None:
    """One line of the table."""
    sources = sources_for(target, args.models)[: args.num_sources]
    train, test = clean(target, args.data, sources, args.out / "clean")
    recipe = parse_recipe(
        {
            "base_model": str(args.models / "base"),
            "models": [str(path) for path in sources],
            "policies": [
                {"match": "*position_ids", "policy": "base"},
                {"match": "pooler.*", "policy": "base"},
            ],
            "store": str(args.out / f"rank-store-{time.time_ns()}"),
            "out": str(args.out / "unused"),
            "tune": {
                "train": str(train),
                "test": str(test),
                "per_class": args.per_class,
                "max_length": 40,
            },
        }
    )
    run_stage(recipe, "decompose", address=args.address)
    start = time.perf_counter()
    ranking = rank(recipe, address=args.address)
    seconds = time.perf_counter() - start
    assert recipe.tune is not None
    problem = Problem(
        target,
        prepare(recipe, address="none"),
        recipe.tune,
        cache=args.out,
        max_test=args.max_test,
        threads=1,
    )
    rows = list(range(len(problem.train)))
    names = [Path(source.name).name for source in ranking.sources]
    fits = {name: source_fit(problem, name, rows) for name in names}
    losses = [float(fits[name].log_loss.mean()) for name in names]
    hits = [problem.hits(*whole(problem, name), rows) for name in names]
    errors = [1.0 - float(h.double().mean()) for h in hits]
    stored = [source.loss for source in ranking.sources]
    print(
        f"| {target} | {len(names)} | {ranking.num_examples} | {seconds:.0f} "
        f"| {rank_correlation(stored, losses):.2f} | {rank_correlation(stored, errors):.2f} |",
        flush=True,
    )


def main() -> None:
    """Parse and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--targets", default="mr,cr,stance_feminist,trec")
    parser.add_argument("--per-class", type=int, default=32)
    parser.add_argument("--num-sources", type=int, default=18)
    parser.add_argument("--max-test", type=int, default=500)
    parser.add_argument("--address", default="local")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    print("| target | sources | examples | seconds | order as whole losses | as test errors |")
    print("|---|---|---|---|---|---|")
    for target in args.targets.split(","):
        measure(target, args)


if __name__ == "__main__":
    main()
