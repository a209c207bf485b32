"""What `salience: denoised` makes of rounding and of noise, on real models.

    python pipelines/bench_noise.py MODELS [--sources sst2,trec] [--noisy sst2]

MODELS holds `base` and one folder per source. Each source is rounded to bfloat16, and then one is
replaced by Gaussian noise of its own norm, matrix by matrix, and competes with the others.
"""

import argparse
from pathlib import Path

from svdmerge.comparison.decomposition import decomposed_names
from svdmerge.comparison.rounding import rounding, slots
from svdmerge.storage.checkpoint import open_checkpoint


def main() -> None:
    """Both tables."""
    parser = argparse.ArgumentParser()
    parser.add_argument("models", type=Path)
    parser.add_argument("--sources", default="agnews,banking77,cr,emotion,mpqa,sst2,subj,trec")
    parser.add_argument("--noisy", default="sst2")
    parser.add_argument("--k", type=float, default=0.1, help="share of the rank")
    args = parser.parse_args()
    base = open_checkpoint(str(args.models / "base"))
    names = decomposed_names(base)
    sources = {n: open_checkpoint(str(args.models / n)) for n in args.sources.split(",")}
    print("| source | above the edge | of its bfloat16 copy | rounding above it | components |")
    print("|---|---|---|---|---|")
    for name, source in sources.items():
        found = rounding(base, source, names)
        print(
            f"| {name} | {found.above} | {found.kept} ({found.kept / found.above:.1%}) "
            f"| {found.noise_kept} | {found.in_all} |",
            flush=True,
        )
    taken = slots(base, sources, names, noisy=args.noisy, share=args.k)
    print("\n| salience | slots of a source that is noise |\n|---|---|")
    for salience, share in taken.items():
        print(f"| {salience} | {share:.1%} |")


if __name__ == "__main__":
    main()
