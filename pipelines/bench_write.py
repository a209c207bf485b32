"""Time and memory of writing a merged model in shards, against dd with sync of the same bytes.

    python pipelines/bench_write.py [--layers 8] [--shards 8] [--work FOLDER]

Needs thrice the model's size on the disk: by default 12 GB.
"""

import argparse
import tempfile
from pathlib import Path

from rich.console import Console

from svdmerge.comparison.planning import decoder
from svdmerge.comparison.writing import measure, prepare
from svdmerge.engine.runtime import open_runtime
from svdmerge.tables import size, table

# Targets: times dd's seconds, and GiB of one writer.
MOST_RATIO, MOST_GIB = 2.0, 1.5


def main() -> None:
    """Make the base and factors, write, and print what it took."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--layers", type=int, default=8, help="0.4 GB each, and 0.8 besides")
    parser.add_argument("--shards", type=int, default=8)
    parser.add_argument("--work", type=Path, default=None)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="svdmerge-write-", dir=args.work) as work:
        shapes = decoder(layers=args.layers, width=4096, hidden=11008)
        plan = prepare(Path(work), shapes, num_shards=args.shards)
        with open_runtime("local") as runtime:
            found = measure(plan, Path(work), runtime=runtime)
    rows = [
        ("written", f"{found.num_bytes / 1e9:.2f} GB in {found.num_files} files", ""),
        ("dd conv=fsync, before and after", ", ".join(f"{s:.1f} s" for s in found.copy_s), ""),
        ("written and checked", f"{found.seconds:.1f} s", ""),
        ("ratio", f"{found.ratio:.2f}", f"{MOST_RATIO:g}"),
        ("largest writer", size(found.peak_rss_bytes), f"{MOST_GIB} GiB"),
    ]
    Console().print(table("Writing", columns=("", "", "target"), rows=rows))


if __name__ == "__main__":
    main()
