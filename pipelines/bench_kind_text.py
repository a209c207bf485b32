"""Decomposable text classifiers: on many intents, recombined, and carried to novel intents.

    python pipelines/bench_kind_text.py BASE TRAIN TEST OUT [--seeds 0,1,2] [--steps 600]
        [--transfer-steps 150] [--per-class 16] [--learngenes 0.5] [--groups 8] [--entrants kind]

BASE is a folder of a Hugging Face text model: its tokenizer and word embeddings are used, and its
features group labels into superclasses, which every entrant is told. TRAIN and TEST are parquet
tables of `text` and `label`. 50 labels are trained on, the others are novel. Everything is kept in
OUT, so the same command resumes. One thread.
"""

import argparse
from pathlib import Path

from rich.console import Console

from svdmerge.comparison.text_case import Sizes, write_case
from svdmerge.comparison.text_entrants import (
    Outcome,
    Study,
    dense_pretrained,
    entrants,
    interval,
    one_thread,
    pretrained,
)
from svdmerge.kind.recipe import parse_kind_recipe
from svdmerge.kind.recombine import RecombineResult
from svdmerge.kind.workflow import recombine
from svdmerge.tables import table


def smaller(study: Study, seed: int) -> RecombineResult:
    """The gated model recombined for the labels of its two first superclasses."""
    labels = [str(y) for group in list(study.case.old.groups.values())[:2] for y in group]
    return recombine(
        parse_kind_recipe(
            {
                "model": str(study.out / f"gated-{seed}"),
                "store": str(study.out / "store"),
                "recombine": {"classes": labels, "out": str(study.out / f"recombined-{seed}")},
            }
        )
    )


def row(name: str, outcomes: list[Outcome]) -> tuple[object, ...]:
    """An entrant's line: sizes, then accuracies at the measured steps."""
    first = outcomes[0]
    steps = [interval([o.accuracy[step] for o in outcomes]) for step in sorted(first.accuracy)]
    return name, f"{first.trained:,}", *steps


def show(console: Console, title: str, rows: list[tuple[object, ...]], steps: list[int]) -> None:
    """Print a table of accuracies."""
    columns = ("", "trained", *(f"step {step}" for step in steps))
    console.print(table(title, columns=columns, rows=rows))


def main() -> None:
    """Run all entrants for all seeds, then print."""
    parser = argparse.ArgumentParser(description="Decomposable text classifiers.")
    for name in ("base", "train", "test"):
        parser.add_argument(name)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--transfer-steps", type=int, default=150)
    parser.add_argument("--per-class", type=int, default=16)
    parser.add_argument("--learngenes", type=float, default=0.5)
    parser.add_argument("--groups", type=int, default=8)
    parser.add_argument("--entrants", choices=("all", "kind"), default="all")
    args = parser.parse_args()
    one_thread()
    sizes = Sizes(old_groups=args.groups)
    case = write_case(args.out, base=args.base, train=args.train, test=args.test, sizes=sizes)
    study = Study(
        case=case, out=args.out, steps=args.steps, transfer_steps=args.transfer_steps,
        per_class=args.per_class, learngenes=args.learngenes,
    )  # fmt: skip
    console, done = Console(width=120, highlight=False), list[int]()
    found: dict[str, list[Outcome]] = {}
    ways = entrants() if args.entrants == "all" else dict(list(entrants().items())[:2])
    old = {"gated": pretrained} | ({"dense": dense_pretrained} if args.entrants == "all" else {})
    for seed in (int(s) for s in args.seeds.split(",")):
        for name, entrant in {**old, **ways}.items():
            found.setdefault(name, []).append(entrant(study, seed))
        done.append(seed)
        console.print(f"\nSeeds {done}: accuracy in percent, superclass known; mean and range")
        steps = sorted(found["gated"][0].accuracy)
        show(console, "Old labels", [row(n, found[n]) for n in old], steps)
        steps = sorted(found[next(iter(ways))][0].accuracy)
        show(console, "Novel labels", [row(n, found[n]) for n in ways], steps)
    made = smaller(study, done[0])
    costs = [("full", made.full), ("two superclasses", made.recombined)]
    rows = [(n, f"{c.parameters:,}", f"{c.flops:,}", f"{c.latency_ms:.2f}") for n, c in costs]
    console.print(table("Recombined", columns=("", "parameters", "FLOPs", "ms"), rows=rows))
    console.print(f"Outputs differ by {made.max_difference:.2g} at most.")


if __name__ == "__main__":
    main()
