"""Compare ways to use many sources for a new task, on several targets, over many draws.

    python pipelines/transfer_data.py TEXT_FOLDER DATA
    python pipelines/bench_transfer.py MODELS DATA OUT [--targets mr,cr] [--per-class 8,32]

MODELS holds Hugging Face models: `base` and one folder per source, named after the dataset it was
trained on (`sst2`, `clinc150-domain-travel`, `banking77-labels-0-14`). Every finished cell is kept
in OUT: the same command again goes on where it stopped, `--report` prints the tables alone.

`--entrants` takes names and groups by commas without a space: untrained (the default), trained,
ablations, singles, robust. `--alter KIND` damages sources or texts, `--num-sources N` takes some of
the sources; their cells count as a target of their own, `mr+pruned` or `mr@4`. `--plot FILE.png`
draws all cells.
"""

import argparse
import re
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from transfer_data import normalised

from svdmerge.comparison.ablations import ABLATIONS
from svdmerge.comparison.cells import (
    Cell,
    Cells,
    Paired,
    altered_pairs,
    best_single,
    means,
    paired,
    plain,
)
from svdmerge.comparison.problem import Problem
from svdmerge.comparison.robustness import (
    DROPPED_TOKENS,
    KINDS,
    altered_sources,
    drop_tokens,
    fewer,
)
from svdmerge.comparison.trained import TRAINED
from svdmerge.comparison.untrained import UNTRAINED, Entrant, single
from svdmerge.recipe import Recipe, TuneConfig, parse_recipe
from svdmerge.workflow import prepare, run_stage

# Sources that were trained on a target's own rows.
LEFT_OUT = {"cr": ("cr",), "trec": ("trec",), "banking77": ("banking77",)}
# Cuts of a dataset serve only the target that they are parts of.
PARTS = "banking77-labels"
# Targets that no single source suffices for: ours is compared with every one.
SEVERAL = ("clinc150", "banking77")
OURS = "svdmerge"
# What is run on damaged sources, and on fewer of them.
ROBUST = ("ridge probe", "best single source", "AXIS untuned", "average", OURS)


def sources_for(target: str, models: Path) -> list[Path]:
    """The sources a target may use."""
    return [
        path
        for path in sorted(models.iterdir())
        if path.is_dir()
        and path.name != "base"
        and path.name not in LEFT_OUT.get(target, ())
        and (target == "banking77" or not path.name.startswith(PARTS))
    ]


def clean(target: str, data: Path, sources: Sequence[Path], out: Path) -> tuple[Path, Path]:
    """The target's files without any row that one of the sources was trained on."""
    trained: set[str] = set()
    for name in {path.name.split("-")[0] for path in sources}:
        rows = pq.read_table(data / "sources" / f"{name}-train.parquet")["text"].to_pylist()
        trained.update(map(normalised, rows))
    paths: list[Path] = []
    for part in ("train", "test"):
        table = pq.read_table(data / "targets" / f"{target}-{part}.parquet")
        texts = table["text"].to_pylist()
        kept = [normalised(t) not in trained for t in texts]
        print(f"{target} {part}: {len(texts)} rows, {len(texts) - sum(kept)} seen by a source")
        path = out / f"{target}-{part}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table.filter(pa.array(kept)), path)
        paths.append(path)
    return paths[0], paths[1]


def labelled(target: str, args: argparse.Namespace) -> str:
    """What the target's cells are kept under: another name where its sources are others."""
    return target + (f"@{args.num_sources}" if args.num_sources else "") + (
        f"+{args.alter}" if args.alter else ""
    )  # fmt: skip


def altered(target: str, sources: list[Path], args: argparse.Namespace) -> list[Path]:
    """The sources as the options ask for them: fewer, or some of them damaged."""
    if args.num_sources:
        sources = fewer(sources, num=args.num_sources, target=target)
    if not args.alter or args.alter == DROPPED_TOKENS:
        return sources
    found = altered_sources(
        args.alter,
        base=args.models / "base",
        sources=sources,
        target=target,
        out=args.out / "altered",
    )
    damaged = sorted(p.name for p in set(found) - set(sources))
    print(f"{labelled(target, args)}: damaged {', '.join(damaged)}")
    return found


def problem_for(target: str, args: argparse.Namespace) -> Problem:
    """A target with its sources, decomposed to their full rank."""
    sources = sources_for(target, args.models)
    train, test = clean(target, args.data, sources, args.out / "clean")
    sources = altered(target, sources, args)
    recipe: Recipe = parse_recipe(
        {
            "base_model": str(args.models / "base"),
            "models": [str(path) for path in sources],
            "parameters": {"k": "100%"},
            "policies": [
                {"match": "*position_ids", "policy": "base"},
                {"match": "pooler.*", "policy": "base"},
            ],
            "store": str(args.out / "store"),
            "out": str(args.out / "unused"),
        }
    )
    run_stage(recipe, "decompose", address="none")
    config = TuneConfig(train=str(train), test=str(test), max_length=40)
    cache = args.out / "features"
    cache.mkdir(parents=True, exist_ok=True)
    return Problem(
        labelled(target, args),
        prepare(recipe, address="none"),
        config,
        cache=cache,
        max_test=args.max_test,
        threads=args.threads,
        max_steps=args.max_steps,
        **({"alter": drop_tokens} if args.alter == DROPPED_TOKENS else {}),
    )


def entrants_of(problem: Problem, wanted: str) -> dict[str, Entrant]:
    """The entrants asked for by name or group, for a target."""
    singles = {f"source {n}": single(n) for n in sorted(problem.sources)}
    every = UNTRAINED | TRAINED | ABLATIONS | singles
    groups: dict[str, Iterable[str]] = {
        "untrained": UNTRAINED,
        "trained": TRAINED,
        "ablations": ABLATIONS,
        "singles": singles,
        "robust": ROBUST,
    }
    usual = "robust" if set("@+") & set(problem.name) else "untrained"
    names = re.split(",(?! )", wanted or usual)
    if not wanted and problem.name in SEVERAL:
        names.append("singles")
    found = dict.fromkeys(entrant for name in names for entrant in groups.get(name, (name,)))
    if unknown := sorted(set(found) - set(every)):
        raise SystemExit(f"No entrant or group {unknown[0]!r}. There are: {', '.join(every)}.")
    return {name: every[name] for name in found}


def measure(problem: Problem, cells: Cells, args: argparse.Namespace) -> None:
    """Every cell of a target that is not there yet."""
    entrants = entrants_of(problem, args.entrants)
    for per_class in map(int, args.per_class.split(",")):
        for draw in range(args.first_draw, args.draws):
            rows = problem.drawn(per_class=per_class or None, seed=draw)
            for name, entrant in entrants.items():
                path = cells.path(target=problem.name, per_class=per_class, draw=draw, entrant=name)
                if path.exists():
                    continue
                start = time.perf_counter()
                found = entrant(problem, rows)
                cell = Cell(
                    target=problem.name,
                    per_class=per_class,
                    draw=draw,
                    entrant=name,
                    accuracy=float(found.hits.double().mean()),
                    num_test=len(found.hits),
                    trained=found.trained,
                    num_sources=len(found.sources),
                    detail=found.detail,
                    steps=found.steps,
                    seconds=time.perf_counter() - start,
                )
                cells.put(cell)
                print(
                    f"{problem.name} {per_class} {draw} {name}: {cell.accuracy:.4f} "
                    f"({cell.seconds:.0f} s) {cell.detail}",
                    flush=True,
                )


def report(cells: Sequence[Cell]) -> None:
    """The tables: means by target, paired differences to ours, and what damage costs."""
    table = means(cells)
    groups = sorted(table)
    entrants = list(dict.fromkeys(c.entrant for c in cells))
    print("\n| entrant |" + "".join(f" {t} {s or 'all'} |" for t, s in groups) + " trained |")
    print("|---|" + "---|" * (len(groups) + 1))
    for entrant in entrants:
        values = (f"{table[g][entrant]:.1f}" if entrant in table[g] else "" for g in groups)
        trained = max(c.trained for c in cells if c.entrant == entrant)
        print(f"| {entrant} |" + "".join(f" {v} |" for v in values) + f" {trained} |")
    _report_differences(plain(cells), entrants=entrants)
    _report_several(cells)
    _report_altered(cells)


def _report_differences(cells: Sequence[Cell], *, entrants: Sequence[str]) -> None:
    groups = sorted({(c.target, c.per_class) for c in cells})
    print(f"\n{OURS} minus, in points, 95 % interval over draws:\n")
    print("| entrant |" + "".join(f" {t} {s or 'all'} |" for t, s in groups) + " pooled |")
    print("|---|" + "---|" * (len(groups) + 1))
    for entrant in entrants:
        if entrant == OURS:
            continue
        parts = [[c for c in cells if (c.target, c.per_class) == g] for g in groups]
        found = [paired(p, entrant=OURS, other=entrant) for p in [*parts, cells]]
        print(f"| {entrant} |" + "".join(f" {_interval(x)} |" for x in found))


def _report_several(cells: Sequence[Cell]) -> None:
    """Ours against the single source that is best by mean test accuracy: an oracle's pick."""
    for target, per_class in sorted(means(cells)):
        part = [c for c in cells if (c.target, c.per_class) == (target, per_class)]
        best = best_single(part) if target in SEVERAL else None
        if best and (found := paired(part, entrant=OURS, other=best)):
            print(
                f"\n{target} {per_class or 'all'}: {OURS} minus the best of all single sources "
                f"({best}, picked on test): {_interval(found)}, {found.num_draws} draws"
            )


def _report_altered(cells: Sequence[Cell]) -> None:
    pairs = altered_pairs(cells)
    kinds = sorted({kind for kind, _ in pairs})
    if not kinds:
        return
    print("\nDamaged or fewer sources minus as they are, in points, pooled over targets:\n")
    print("| entrant |" + "".join(f" {kind} |" for kind in kinds))
    print("|---|" + "---|" * len(kinds))
    for entrant in dict.fromkeys(entrant for _, entrant in pairs):
        found = (pairs.get((kind, entrant)) for kind in kinds)
        print(f"| {entrant} |" + "".join(f" {_interval(x)} |" for x in found))


def _interval(x: Paired | None) -> str:
    return f"{x.mean:+.1f} ({x.low:+.1f}..{x.high:+.1f})" if x else ""


def main() -> None:
    """Parse, measure, report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--targets", default="mr,cr,stance_feminist,trec,clinc150,banking77")
    parser.add_argument("--per-class", default="8,32", help="0: all training rows, 3,000 at most")
    parser.add_argument("--draws", type=int, default=10)
    parser.add_argument("--first-draw", type=int, default=0)
    parser.add_argument("--entrants", default="", help="names or groups, by `,` without a space")
    parser.add_argument("--alter", default="", choices=("", *KINDS), help="damage done")
    parser.add_argument("--num-sources", type=int, default=0, help="at most; 0: all")
    parser.add_argument("--max-test", type=int, default=500)
    parser.add_argument("--max-steps", type=int, help="of training, in place of the entrants' own")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--report", action="store_true", help="print the tables and stop")
    parser.add_argument("--plot", type=Path, help="file of the figure; from the cells alone")
    args = parser.parse_args()
    cells = Cells(args.out / "cells")
    if args.plot:
        from svdmerge.comparison.plots import draw  # matplotlib is an extra

        draw(cells.all(), args.plot)
        return
    if not args.report:
        for target in args.targets.split(","):
            measure(problem_for(target, args), cells, args)
    report(cells.all())


if __name__ == "__main__":
    main()
