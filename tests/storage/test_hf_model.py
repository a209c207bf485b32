"""The output's tensors, streamed by tiles: the same bytes however small the tiles are."""

import pytest
import torch
from merging import Bench, tiny_bench, weights

from svdmerge.storage.hf_model import (
    load_factors,
    merged_tiles,
    output_tensors,
    output_tiles,
    read_factors,
)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    bench = tiny_bench(tmp_path_factory.mktemp("tiles"), num_sources=2)
    bench.run()
    return bench


@pytest.mark.parametrize("tile", [7, 40, 1 << 22])
@pytest.mark.parametrize("out_dtype", ["base", "bfloat16"])
def test_tiles_hold_every_entry_once_in_order(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, tile: int, out_dtype: str
) -> None:
    monkeypatch.setattr("svdmerge.storage.hf_model.TILE", tile)
    plan = bench.plan()
    factors = load_factors(plan.run_folder.child("factors"))
    tensors = output_tensors(plan.base, parameters=plan.parameters, out_dtype=out_dtype)
    for tensor in tensors:
        if tensor.base.numel > 1500:
            continue  # entry by entry it takes its time
        expected = tensor.base.read().double().reshape(-1)
        for p in tensor.matrices:
            expected[p.start : p.start + p.numel] += read_factors(factors, p).dense().reshape(-1)
        data = b"".join(output_tiles(tensor, factors=factors))
        assert len(data) == tensor.nbytes
        if tensor.matrices:
            tiles = list(merged_tiles(tensor, factors=factors))
            sizes = [len(part) for _, part in tiles]
            assert [start for start, _ in tiles] == [sum(sizes[:i]) for i in range(len(sizes))]
            assert max(sizes, default=0) <= tile
            found = torch.cat([part for _, part in tiles])
            assert torch.allclose(found, expected, rtol=0, atol=1e-12)
        elif out_dtype == "base":
            assert data == tensor.base.read_bytes()


def test_small_tiles_give_the_same_files(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = weights(bench.out)
    monkeypatch.setattr("svdmerge.storage.hf_model.TILE", 300)
    bench.run(out=str(bench.root / "out-tiles"))
    assert weights(bench.root / "out-tiles") == whole
