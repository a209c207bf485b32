"""What decomposing for a selection costs, beside full and sketched SVDs of every source.

    python pipelines/bench_decompose.py [--ranks 768,1024,2048x64] [--models DIR] [--plot FILE]

Square matrices of power-law spectra by sixteen sources, or as many as stand behind an `x`; k = 10 %
of the rank over all sources. With --models its `base` and folders beside it, every matrix that a
merge decomposes. Then what flat spectra cost. Everything in one process and run, with the same
threads, so that ratios mean something; CPU time, so that they do on a shared machine too.
"""

import argparse
import os
from pathlib import Path


def main() -> None:
    """The tables, and the plot."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--ranks", default="768,1024,2048,4096,2048x64")
    parser.add_argument("--flat", default="384x384,1536x384,768x768,2048x2048", help="shapes")
    parser.add_argument("--models", type=Path)
    parser.add_argument("--sources", default="agnews,banking77,cr,emotion,mpqa,sst2,subj,trec")
    parser.add_argument("--k", type=float, default=0.1, help="share of the rank")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--full-of", type=int, default=2, help="sources that full SVDs are timed on"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    # After the thread count, which torch reads once.
    from svdmerge.comparison.cost_plot import draw_costs
    from svdmerge.comparison.decomposition import Cost, matrices, measure, model_matrices
    from svdmerge.comparison.flat_spectra import flat_costs
    from svdmerge.storage.checkpoint import open_checkpoint

    def tell(name: str, cost: Cost) -> None:
        depths = ", ".join(f"{count} of {depth}" for depth, count in cost.depths.items())
        double = f"{cost.full_float64 / cost.ours:.1f}" if cost.full_float64 else ""
        print(
            f"| {name} | {cost.num_sources} | {cost.full / cost.ours:.1f} | {double} "
            f"| {cost.sketched / cost.ours:.1f} | {cost.ours / cost.floor:.1f} | {cost.kept} "
            f"| {cost.computed} ({depths}) | {cost.bytes_read >> 20} ({cost.reads:.2f}) |",
            flush=True,
        )

    print(
        "| rank | sources | full / ours | in float64 | sketched / ours | ours / floor | kept "
        "| computed | MiB read (times) |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    costs: dict[int, Cost] = {}
    for text in filter(None, args.ranks.split(",")):
        rank, _, sources = text.partition("x")
        num_sources = int(sources or 16)
        cost = measure(
            [matrices(int(rank), num_sources=num_sources)],
            share=args.k,
            repeats=args.repeats,
            full_of=min(args.full_of, num_sources),
        )
        tell(rank, cost)
        if not sources:
            costs[int(rank)] = cost
    if args.models:
        sources = [open_checkpoint(str(args.models / n)) for n in args.sources.split(",")]
        every = model_matrices(open_checkpoint(str(args.models / "base")), sources)
        tell(
            "models",
            measure(
                every,
                share=args.k,
                repeats=args.repeats,
                full_of=min(args.full_of, len(sources)),
                float64=True,
            ),
        )
    print("\n| flat | shape | ours / full | in float64 | solvers |\n|---|---|---|---|---|")
    for m, n in (map(int, shape.split("x")) for shape in filter(None, args.flat.split(","))):
        for flat in flat_costs(m, n, share=args.k, repeats=args.repeats):
            print(
                f"| {flat.kind} | {m} x {n} | {flat.float32:.2f} | {flat.float64:.2f} "
                f"| {', '.join(flat.solvers)} |",
                flush=True,
            )
    if args.plot and costs:
        draw_costs(costs, args.plot)


if __name__ == "__main__":
    main()
