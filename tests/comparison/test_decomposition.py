"""What the decomposition benchmark measures, on small matrices; no time is asserted."""

from pathlib import Path

import bench_decompose
import pytest

from svdmerge.comparison.cost_plot import draw_costs, lines
from svdmerge.comparison.decomposition import matrices, measure, needed_flops
from svdmerge.comparison.flat_spectra import flat_costs


def test_costs_count_what_was_kept_computed_and_read() -> None:
    every = [matrices(160, num_sources=3), matrices(144, num_sources=3)]
    cost = measure(every, share=0.1, repeats=1, full_of=1, float64=True)
    assert (cost.num_sources, cost.kept) == (3, 16 + 14)
    assert sum(cost.depths.values()) == 6
    assert cost.computed == sum(depth * count for depth, count in cost.depths.items())
    assert cost.reads >= 1.0
    assert cost.bytes_read >= 4 * 3 * (160**2 + 144**2)
    assert min(cost.ours, cost.full, cost.full_float64, cost.sketched, cost.floor) > 0.0


def test_flops_needed_grow_with_what_is_needed() -> None:
    assert needed_flops(10, 20, needed=5) == 4 * 10 * 20 * (13 * 6 + 56)


def test_flat_spectra_go_to_the_exact_solver() -> None:
    solvers = {c.kind: c.solvers for c in flat_costs(200, 160, share=0.25, repeats=1)}
    assert solvers["Gaussian noise"] == ["exact"]
    assert {found[-1] for found in solvers.values()} == {"exact"}


def test_the_plot_is_of_full_svds_over_each(tmp_path: Path) -> None:
    costs = {
        rank: measure([matrices(rank, num_sources=2)], share=0.1, repeats=1, full_of=1)
        for rank in (144, 160)
    }
    assert [rank for rank, _ in lines(costs)["svdmerge"]] == [144, 160]
    assert lines(costs)["svdmerge"][0][1] == costs[144].full / costs[144].ours
    draw_costs(costs, tmp_path / "costs.png")
    assert (tmp_path / "costs.png").stat().st_size > 1000


def test_the_command_prints_its_tables(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["bench", "--ranks", "144,160x2", "--flat", "150x140", "--repeats", "1"]
    monkeypatch.setattr("sys.argv", command)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    bench_decompose.main()
    printed = capsys.readouterr().out
    assert "| 144 | 16 |" in printed
    assert "| 160 | 2 |" in printed
    assert "| Gaussian noise | 150 x 140 |" in printed
