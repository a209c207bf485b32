"""Cells are kept and found again; paired differences and their intervals."""

from pathlib import Path

import numpy as np
import pytest

from svdmerge.comparison.cells import Cell, Cells, means, paired


def cell(
    entrant: str, accuracy: float, *, draw: int = 0, target: str = "mr", per_class: int = 8
) -> Cell:
    return Cell(
        target=target, per_class=per_class, draw=draw, entrant=entrant, accuracy=accuracy,
        num_test=100, trained=0, num_sources=2, detail="", steps=0, seconds=0.1,
    )  # fmt: skip


def test_cells_are_read_as_they_were_put(tmp_path: Path) -> None:
    cells = Cells(tmp_path / "cells")
    kept = [cell("source a/b", 0.5), cell("ours", 0.75, draw=1)]
    for one in kept:
        cells.put(one)
    assert sorted(Cells(tmp_path / "cells").all(), key=lambda c: c.draw) == kept
    assert cells.path(target="mr", per_class=8, draw=0, entrant="source a/b").exists()
    assert not cells.path(target="mr", per_class=8, draw=1, entrant="source a/b").exists()


def test_a_cell_that_was_being_written_is_no_cell(tmp_path: Path) -> None:
    (tmp_path / "mr-8-0-ours.partial").write_text("{")
    assert Cells(tmp_path).all() == []


def test_a_cell_put_twice_is_the_later_one(tmp_path: Path) -> None:
    cells = Cells(tmp_path)
    cells.put(cell("ours", 0.5))
    cells.put(cell("ours", 0.6))
    assert [c.accuracy for c in cells.all()] == [0.6]


def test_the_paired_difference_counts_draws_that_both_have() -> None:
    cells = [cell("ours", 0.8, draw=d) for d in range(3)] + [cell("other", 0.7, draw=0)]
    found = paired(cells, entrant="ours", other="other")
    assert found is not None
    assert (found.num_draws, found.mean) == (1, pytest.approx(10.0))
    assert paired(cells, entrant="ours", other="nobody") is None


def test_pairing_takes_out_what_draws_share() -> None:
    rng = np.random.default_rng(0)
    cells: list[Cell] = []
    for draw, luck in enumerate(rng.normal(0, 0.1, size=10)):
        cells += [cell("ours", 0.62 + luck, draw=draw), cell("other", 0.6 + luck, draw=draw)]
    found = paired(cells, entrant="ours", other="other")
    assert found is not None
    assert found.low == pytest.approx(2.0)
    assert found.high == pytest.approx(2.0)


def test_the_interval_is_the_same_every_time_and_holds_the_mean() -> None:
    rng = np.random.default_rng(1)
    gaps = rng.normal(0.01, 0.05, size=20)
    cells = [cell("other", 0.5, draw=d) for d in range(20)]
    cells += [cell("ours", 0.5 + g, draw=d) for d, g in enumerate(gaps)]
    found = paired(cells, entrant="ours", other="other")
    assert found == paired(cells, entrant="ours", other="other")
    assert found is not None
    half = 196 * gaps.std() / np.sqrt(20)
    assert found.mean == pytest.approx(100 * gaps.mean())
    assert found.high - found.low == pytest.approx(2 * half, rel=0.15)


def test_targets_count_alike_however_many_draws_they_have() -> None:
    cells = [cell(e, a, draw=d) for d in range(9) for e, a in (("ours", 0.6), ("other", 0.5))]
    cells += [cell("ours", 0.5, target="cr"), cell("other", 0.8, target="cr")]
    found = paired(cells, entrant="ours", other="other")
    assert found is not None
    assert found.mean == pytest.approx((10.0 - 30.0) / 2)


def test_means_are_by_target_and_shots() -> None:
    cells = [cell("ours", 0.5), cell("ours", 0.7, draw=1), cell("ours", 1.0, per_class=32)]
    found = means(cells)
    assert found["mr", 8]["ours"] == pytest.approx(60.0)
    assert found["mr", 32]["ours"] == pytest.approx(100.0)
