"""Matrices by stacks on a device: here a CPU, which must give what one at a time gives."""

from dataclasses import replace
from pathlib import Path

import bench_gpu
import numpy as np
import pytest
import tiny
import torch
from merging import Bench, matrices_done, micro_bench, numbers

from svdmerge.comparison.on_device import RANK, measure_device, synthetic_source
from svdmerge.core.blocks import next_block
from svdmerge.core.components import none
from svdmerge.core.delta import delta
from svdmerge.core.noise import noise_edge
from svdmerge.core.orthonormal import cholesky_qr
from svdmerge.core.ritz import by_subspace
from svdmerge.engine import tasks
from svdmerge.engine.device import Pair, deltas_on, device_class, full_float32, stacks
from svdmerge.engine.stacked import FirstBlock, first_blocks_on
from svdmerge.errors import ResourceError

CPU = torch.device("cpu")
HAS_GPU = torch.cuda.is_available()


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
    monkeypatch.setattr("svdmerge.core.lanczos.leading_pairs", by_subspace)
    assert_as_one_at_a_time(list(first_blocks_on(CPU, pairs)), pairs)


def test_a_change_under_the_rounding_of_bfloat16_is_found_whole(pairs: list[Pair]) -> None:
    cost = measure_device(pairs, device=CPU, repeats=1)
    assert (cost.num_matrices, cost.complete, cost.besides) == (7, 7, 0)
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


# `cpu:0` is a CPU that takes the path of a GPU.
@pytest.mark.parametrize(
    "device",
    ["cpu:0", pytest.param("cuda", marks=pytest.mark.skipif(not HAS_GPU, reason="no GPU"))],
)
def test_a_merge_whose_units_compute_on_a_device_is_the_cpus_merge(
    tmp_path: Path, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = {"a.weight": (160, 160), "b.weight": (160, 160), "c.weight": (40, 30), "d.bias": (9,)}
    generator = torch.Generator().manual_seed(0)

    def change(m: int, n: int = 1) -> torch.Tensor:
        u, s, vh = torch.linalg.svd(torch.randn(m, n, generator=generator), full_matrices=False)
        return (u * torch.arange(1, len(s) + 1) ** -0.7) @ vh

    def model(name: str, tensors: dict[str, torch.Tensor]) -> Path:
        return tiny.write_model(tmp_path / name, tensors)

    base = model("base", {name: torch.zeros(shape) for name, shape in shapes.items()})
    changes = [{n: change(*s).reshape(s) for n, s in shapes.items()} for _ in range(3)]
    sources = tuple(model(f"source-{i}", c) for i, c in enumerate(changes))
    on_cpu = Bench(root=tmp_path, base=base, sources=sources, admit=True)
    on_cpu.run()
    decompose = tasks.decompose
    monkeypatch.setattr(tasks, "decompose", lambda u: decompose(replace(u, device=device)))
    on_device = replace(on_cpu, root=tmp_path / "device")
    report = on_device.run()
    expected = numbers(on_cpu.out)
    assert matrices_done(report) >= 12
    for name, found in numbers(on_device.out).items():
        np.testing.assert_allclose(found, expected[name], atol=2e-5)


@pytest.mark.skipif(HAS_GPU, reason="there is a GPU")
def test_a_merge_that_wants_a_gpu_says_so_where_none_is(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match=r"--address none: no GPU\n.*\nUse a machine"):
        micro_bench(tmp_path).run(resources={"device": "cuda"})
