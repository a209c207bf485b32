"""Memory, passes and bytes of decomposing, merging and writing one large matrix.

    python pipelines/bench_large.py [--rows 8192] [--columns 28672] [--k 160] [--memory 1GiB]

Makes a base and a fine-tune of one bfloat16 matrix in a temporary folder, and runs the whole
workflow on an embedded Ray. Tasks hold blocks of rows; the driver, Lanczos's basis.
"""

import argparse
import multiprocessing
import shutil
import tempfile
import time
from pathlib import Path

from rich.console import Console

from svdmerge.comparison.large import NAME, Watched, make_pair, own_rss_bytes
from svdmerge.engine.decompose import load_source
from svdmerge.engine.runtime import open_runtime
from svdmerge.engine.tasks import peak_rss_bytes
from svdmerge.progress import TerminalProgress
from svdmerge.recipe import parse_recipe
from svdmerge.tables import size, table
from svdmerge.workflow import Run


def main() -> None:
    """Make the pair, run, and print what it took."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument("--columns", type=int, default=28672)
    parser.add_argument("--k", default="160")
    parser.add_argument("--memory", default="1GiB")
    parser.add_argument("--work", type=Path, default=None)
    args = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="svdmerge-large-", dir=args.work))
    try:
        measure(work, rows=args.rows, columns=args.columns, k=args.k, memory=args.memory)
    finally:
        shutil.rmtree(work)


def measure(work: Path, *, rows: int, columns: int, k: str, memory: str) -> None:
    """One run, and its tables."""
    # In a process of its own: the driver's peak is not that of making the models.
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        base, source = pool.apply(make_pair, (work / "models",), {"m": rows, "n": columns})
    recipe = parse_recipe(
        {
            "base_model": str(base),
            "models": [str(source)],
            "parameters": {"k": k},
            "store": str(work / "store"),
            "out": str(work / "merged"),
            "resources": {"memory": memory},
        }
    )
    with open_runtime("local") as inner:
        runtime = Watched(inner)
        own, before = own_rss_bytes(runtime, num=8), peak_rss_bytes()
        start = time.perf_counter()
        run = Run(recipe, runtime=runtime, progress=TerminalProgress())
        report = run.all()
        seconds = time.perf_counter() - start
    tensors = 2 * run.plan.base.nbytes
    lines: list[tuple[object, ...]] = [
        (
            name, stage.tasks, stage.passes, f"{stage.bytes_read / stage.passes / tensors:.3f}",
            size(stage.peak_rss_bytes), size(stage.peak_rss_bytes - own),
        )
        for name, stage in runtime.stages.items()
        if stage.bytes_read
    ]  # fmt: skip
    lines.append(("driver", "", "", "", size(peak_rss_bytes()), size(peak_rss_bytes() - before)))
    console = Console(width=120)
    heads = ("stage", "tasks", "passes", "read per pass / tensors", "largest", "less its own")
    console.print(table(f"{rows} x {columns}, k = {k}, {memory}", columns=heads, rows=lines))
    for stage in report.stages:
        console.print(
            f"{stage.name}: {stage.seconds:.0f} s, largest worker so far "
            f"{size(stage.peak_worker_rss_bytes)}"
        )
    console.print(f"an idle worker: {size(own)}; all: {seconds:.0f} s; kept {report.kept}")
    for block in load_source(run.plan, run.plan.sources[0]).spectra()[NAME]:
        console.print(
            f"components {block.first}-{block.first + len(block.s) - 1}: s {block.s[0]:.5f} to "
            f"{block.s[-1]:.5f}, nothing after them above {block.bound:.5f} ({block.solver})"
        )


if __name__ == "__main__":
    main()
