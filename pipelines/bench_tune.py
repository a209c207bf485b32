"""What tuning costs: a step beside the frozen model's, and memory against the number of sources.

    python pipelines/bench_tune.py MODEL_FOLDER [--threads 1] [--shares 0.1,0.4]

Works on factors of made-up sources: cost depends on shapes alone.
"""

import subprocess
import sys
from typing import Annotated

import typer

from svdmerge.storage.checkpoint import open_checkpoint
from svdmerge.training.step_cost import Workload, peak_memory_bytes, random_factors, step_costs

app = typer.Typer(add_completion=False)


@app.command()
def bench(
    model: Annotated[str, typer.Argument(help="Folder of a Hugging Face text model.")],
    threads: int = 1,
    shares: Annotated[str, typer.Option(help="Trained shares of the rank.")] = "0.1,0.4",
    texts: int = 32,
    tokens: int = 40,
    repeats: int = 7,
    sources: Annotated[str, typer.Option(help="Numbers of sources for memory.")] = "1,4,16",
    memory_of: Annotated[int, typer.Option(hidden=True)] = 0,
) -> None:
    """Measure in one interleaved run and print two tables."""
    workload = Workload(num_texts=texts, num_tokens=tokens, repeats=repeats)
    base, parts = open_checkpoint(model), [float(s) for s in shares.split(",")]
    if memory_of:
        factors = random_factors(base, share=parts[0], num_sources=memory_of)
        peak = peak_memory_bytes(base, factors=factors, workload=workload, threads=threads)
        print(peak)
        return
    print(f"{texts} x {tokens} tokens, {threads} threads, {repeats} repeats in turns")
    print(f"{'step':42}{'values':>8}{'seconds':>10}{'ratio':>8}")
    for cost in step_costs(base, shares=parts, workload=workload, threads=threads):
        print(f"{cost.name:42}{cost.trained:>8}{cost.seconds:>10.3f}{cost.ratio:>8.3f}")
    print(f"\n{'sources merged':42}{'peak MiB':>8}")
    for number in sources.split(","):
        print(f"{number:42}{_in_own_process(number) / 2**20:>8.0f}")


def _in_own_process(num_sources: str) -> int:
    """Peak resident bytes of a fresh process that tunes factors merged from so many sources."""
    command = [sys.executable, *sys.argv, "--memory-of", num_sources]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return int(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    app()
