"""Matrices by stacks on a device: here a CPU, which must give what one at a time gives."""

from pathlib import Path

import bench_gpu
import pytest
import torch

from svdmerge.comparison.on_device import RANK, measure_device, synthetic_source
from svdmerge.core.blocks import next_block
from svdmerge.core.components import none
from svdmerge.core.delta import delta
from svdmerge.core.noise import noise_edge
from svdmerge.core.orthonormal import cholesky_qr
from svdmerge.engine.device import Pair, deltas_on, device_class, full_float32, stacks
from svdmerge.engine.stacked import FirstBlock, first_blocks_on

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def pairs() -> list[Pair]:
    return synthetic_source("small", device=CPU)


def assert_as_one_at_a_time(found: list[FirstBlock], pairs: list[Pair]) -> None:
    alone = {p.name: delta(p.source, base=p.base) for p in pairs}
    assert [f.name for f in found] == list(alone)
    for f in found:
        d = alone[f.name]
        fro = float(torch.linalg.vector_norm(d))
        block = next_block(d, stored=none(*d.shape), fro=fro, parameter=f.name)
        assert f.fro == pytest.approx(fro, rel=1e-6)
        assert f.noise == pytest.approx(noise_edge(d, leading=block.components), rel=1e-4)
        assert f.block.bound == pytest.approx(block.bound, rel=1e-3)
        largest = float(torch.linalg.matrix_norm(d, 2))
        for c in (f.block.components, block.components):
            assert torch.all((c.s[:RANK] - torch.linalg.svdvals(d)[:RANK]).abs() <= 1e-5 * largest)
            residual = d @ c.vh[:RANK].T - c.u[:, :RANK] * c.s[:RANK]
            assert float(torch.linalg.vector_norm(residual, dim=0).max()) <= 1e-4 * largest


def test_stacks_give_what_one_matrix_at_a_time_gives(pairs: list[Pair]) -> None:
    assert_as_one_at_a_time(list(first_blocks_on(CPU, pairs)), pairs)


def test_so_they_do_with_the_factorisations_of_a_gpu(
    pairs: list[Pair], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("svdmerge.core.lanczos.orthonormal", cholesky_qr)
    assert_as_one_at_a_time(list(first_blocks_on(CPU, pairs)), pairs)


def test_a_change_under_the_rounding_of_bfloat16_is_found_whole(pairs: list[Pair]) -> None:
    cost = measure_device(pairs, device=CPU, repeats=1)
    assert (cost.num_matrices, cost.complete) == (7, 7)
    assert cost.num_bytes == 2 * 2 * (4 * 160 * 160 + 3 * 400 * 160)


def test_stacks_hold_one_shape_and_no_more_than_fits(pairs: list[Pair]) -> None:
    shapes = [[tuple(p.source.shape) for p in alike] for alike in stacks(pairs, most=3 * 160 * 160)]
    square, tall, wide = (160, 160), (400, 160), (160, 400)
    assert shapes == [[square] * 3, [square], [tall], [tall], [wide]]
    assert [len(alike) for alike in stacks(pairs, most=1)] == [1] * 7


def test_differences_are_those_of_float64_rounded_once(pairs: list[Pair]) -> None:
    stacked = list(stacks(pairs))
    for alike, found in zip(stacked, deltas_on(CPU, stacked), strict=True):
        assert found.dtype == torch.float32
        for pair, d in zip(alike, found, strict=True):
            assert torch.equal(d, delta(pair.source, base=pair.base).float())


def test_products_are_in_full_float32_and_the_setting_comes_back() -> None:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        with full_float32():
            assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)


def test_the_numerics_class_names_the_device() -> None:
    assert device_class(CPU).startswith("cpu/")


def test_the_command_runs_without_a_gpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr("sys.argv", ["bench", "--device", "cpu", "--scale", "small"])
    bench_gpu.main()
    assert "| cpu/" in capsys.readouterr().out
