"""A larger budget later: only what is missing is computed, and nothing tells that it was later."""

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from merging import Bench, matrices_done, outcome, stored_blocks, tree

SHAPES = {"a.weight": (220, 200), "b.weight": (160, 240), "c.weight": (30, 40)}


def made(root: Path) -> Bench:
    """Four sources of power laws: two matrices to iterate on and a small one."""
    base = {n: torch.zeros(s) for n, s in SHAPES.items()}

    def change(i: int, j: int, m: int, n: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(10 * i + j)
        u, s, vh = torch.linalg.svd(torch.randn(m, n, generator=generator), full_matrices=False)
        loud = 4.0 if i == 0 else 1.0
        return (u * loud * torch.arange(1, len(s) + 1) ** -(0.6 + 0.1 * i)) @ vh

    sources = tuple(
        tiny.write_model(
            root / f"source-{i}",
            {n: change(i, j, *shape) for j, (n, shape) in enumerate(SHAPES.items())},
        )
        for i in range(4)
    )
    base_model = tiny.write_model(root / "base", base)
    return Bench(root=root, base=base_model, sources=sources, admit=True)


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_raising_k_from_5_to_20_percent_recomputes_no_stored_block(
    tmp_path: Path, scope: str
) -> None:
    bench = made(tmp_path)
    low: dict[str, Any] = {"parameters": {"k": "5%", "scope": scope}}
    high: dict[str, Any] = {"parameters": {"k": "20%", "scope": scope}}
    bench.run(**low)
    before, files = stored_blocks(bench.store), tree(bench.store, below="components")
    report = bench.run(**high)
    after = stored_blocks(bench.store)
    assert set(after.values()) == {1}
    assert before.keys() < after.keys()
    assert files.items() <= tree(bench.store, below="components").items()
    deepened = {(source, matrix) for source, matrix, _ in after.keys() - before.keys()}
    assert matrices_done(report) >= len(deepened)
    fresh = high | {"store": str(tmp_path / "fresh"), "out": str(tmp_path / "fresh-out")}
    bench.run(**fresh)
    assert outcome(bench.out) == outcome(tmp_path / "fresh-out")
    assert matrices_done(bench.run(**high | {"out": str(tmp_path / "again")})) == 0
