"""Time and memory of planning a merge of large sharded checkpoints, from headers alone.

    python pipelines/bench_plan.py [--sources 4] [--shards 20] [--layers 48]

Files are sparse: the 40 GB of each checkpoint are holes and take no place on the disk.
"""

import argparse
import tempfile
from pathlib import Path

from rich.console import Console

from svdmerge.comparison.planning import decoder, time_plan, write_sparse
from svdmerge.tables import size, table

# Targets: seconds, and MiB of the whole command.
MOST_S, MOST_MIB = 5.0, 300


def main() -> None:
    """Make the checkpoints, plan, and print what it took."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--sources", type=int, default=4)
    parser.add_argument("--shards", type=int, default=20)
    parser.add_argument("--layers", type=int, default=48)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="svdmerge-plan-") as work:
        shapes = decoder(layers=args.layers)
        for name in ("base", *(f"source-{i}" for i in range(args.sources))):
            write_sparse(Path(work) / name, shapes, num_shards=args.shards)
        found = time_plan(Path(work), num_sources=args.sources)
    rows = [
        ("each checkpoint", f"{found.num_bytes / 1e9:.1f} GB, {found.num_tensors} tensors", ""),
        ("sources", found.num_sources, ""),
        ("seconds", f"{found.seconds:.2f} ({found.cpu_seconds:.2f} of a core)", f"{MOST_S:g}"),
        ("peak memory", size(found.peak_rss_bytes), f"{MOST_MIB} MiB"),
    ]
    title = f"svdmerge plan, {args.shards} shards each"
    Console().print(table(title, columns=("", "", "target"), rows=rows))


if __name__ == "__main__":
    main()
