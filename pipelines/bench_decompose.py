"""What decomposing for a selection costs, beside full and sketched SVDs of every source.

    python pipelines/bench_decompose.py [--ranks 768,1024,2048,4096] [--num-sources 16]

Square matrices of power-law spectra, k = 10 % of the rank over all sources; everything in one
process and run, with the same threads, so that ratios mean something on a shared machine.
"""

import argparse
import os


def main() -> None:
    """The table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--ranks", default="768,1024,2048,4096")
    parser.add_argument("--num-sources", type=int, default=16)
    parser.add_argument("--k", type=float, default=0.1, help="share of the rank")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--full-of", type=int, default=2, help="sources that full SVDs are timed on"
    )
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    # After the thread count, which torch reads once.
    from svdmerge.comparison.decomposition import measure

    print("| rank | sources | full / ours | sketched / ours | ours / floor | kept | computed |")
    print("|---|---|---|---|---|---|---|")
    for rank in map(int, args.ranks.split(",")):
        cost = measure(
            rank,
            num_sources=args.num_sources,
            share=args.k,
            repeats=args.repeats,
            full_of=min(args.full_of, args.num_sources),
        )
        depths = ", ".join(f"{count} of {depth}" for depth, count in cost.depths.items())
        print(
            f"| {rank} | {cost.num_sources} | {cost.full / cost.ours:.1f} "
            f"| {cost.sketched / cost.ours:.1f} | {cost.ours / cost.floor:.1f} "
            f"| {cost.kept} | {cost.computed} ({depths}) |",
            flush=True,
        )


if __name__ == "__main__":
    main()
