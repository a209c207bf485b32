"""What tuning costs: a step beside the frozen model's, and time and memory as sources grow.

    python pipelines/bench_tune.py MODEL_FOLDER [--threads 1] [--shares 0.1,0.4]

Works on factors of made-up sources: cost depends on shapes alone. aTLAS, which keeps all sources'
differences while it tunes, stands beside it. Every row of the second table is a process of its own,
in which the frozen model's step takes turns with the one measured.
"""

import json
import subprocess
import sys
from dataclasses import asdict
from typing import Annotated

import typer

from svdmerge.comparison.growth import Growth, growth
from svdmerge.storage.checkpoint import open_checkpoint
from svdmerge.training.step_cost import Workload, step_costs

app = typer.Typer(add_completion=False)
NAMES = {"ours": "svdmerge", "atlas": "aTLAS"}


@app.command()
def bench(
    model: Annotated[str, typer.Argument(help="Folder of a Hugging Face text model.")],
    threads: int = 1,
    shares: Annotated[str, typer.Option(help="Trained shares of the rank.")] = "0.1,0.4",
    texts: int = 32,
    tokens: int = 40,
    repeats: int = 7,
    sources: Annotated[str, typer.Option(help="Numbers of sources.")] = "8,16,32,64",
    child: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    """Measure and print two tables."""
    workload = Workload(num_texts=texts, num_tokens=tokens, repeats=repeats)
    base, parts = open_checkpoint(model), [float(s) for s in shares.split(",")]
    if child:
        kind, number = child.split(",")
        found = growth(
            base, kind=kind, num_sources=int(number), share=parts[0], workload=workload,
            threads=threads,
        )  # fmt: skip
        print(json.dumps(asdict(found)))
        return
    print(f"{texts} x {tokens} tokens, {threads} threads, {repeats} repeats in turns")
    print(f"{'step':42}{'values':>8}{'seconds':>10}{'ratio':>8}")
    for cost in step_costs(base, shares=parts, workload=workload, threads=threads):
        print(f"{cost.name:42}{cost.trained:>8}{cost.seconds:>10.3f}{cost.ratio:>8.3f}")
    titles = ("seconds", "ratio", "held MiB", "peak MiB")
    print(f"\n{'sources':>8} {'stage 2':10}" + "".join(f"{title:>10}" for title in titles))
    for number in sources.split(","):
        for kind, name in NAMES.items():
            g = _in_own_process(f"{kind},{number}")
            print(
                f"{number:>8} {name:10}{g.seconds:>10.3f}{g.ratio:>10.3f}"
                f"{g.held_bytes / 2**20:>10.0f}{g.peak_bytes / 2**20:>10.0f}",
                flush=True,
            )


def _in_own_process(child: str) -> Growth:
    """What a fresh process of the same command finds."""
    command = [sys.executable, *sys.argv, "--child", child]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return Growth(**json.loads(done.stdout.splitlines()[-1]))


if __name__ == "__main__":
    app()
