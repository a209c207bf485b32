"""What the class gate costs: training a gated layer beside dense ones.

    python pipelines/bench_kind_layer.py [--batch 16] [--tokens 64] [--repeats 21]

Half of the components are learngenes, half tailors of eight groups, and every sample is of another
class. The rank makes the factors as many values as a dense layer's. Threads as torch finds them.
"""

import argparse

from rich.console import Console

from svdmerge.comparison.layer_cost import layer_cost
from svdmerge.tables import table

SHAPES = ((384, 384), (1536, 384), (384, 1536), (768, 768), (3072, 768))


def main() -> None:
    """Measure every shape, then print."""
    parser = argparse.ArgumentParser(description="What the class gate costs in training.")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=21)
    args = parser.parse_args()
    found = [
        layer_cost(m, n, batch=args.batch, tokens=args.tokens, repeats=args.repeats)
        for m, n in SHAPES
    ]
    rows = [
        (
            f"{c.m} x {c.n}", c.rank, f"{c.dense_ms:.2f}", f"{c.ungated_ms:.2f}",
            f"{c.gated_ms:.2f}", f"{c.gated_ms / c.ungated_ms:.2f}",
            f"{c.gated_ms / c.dense_ms:.2f}",
        )
        for c in found
    ]  # fmt: skip
    columns = ("layer", "rank", "dense ms", "factors ms", "gated ms", "gate", "to dense")
    Console(highlight=False).print(table("Forward and backward", columns=columns, rows=rows))


if __name__ == "__main__":
    main()
