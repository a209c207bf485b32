"""What the benchmark sums up from cells, and its figure."""

from pathlib import Path

import pytest

from svdmerge.comparison.cells import Cell, altered_pairs, best_single, plain
from svdmerge.comparison.plots import by_sources, by_trained, draw


def cell(
    target: str, entrant: str, accuracy: float, *, seed: int = 0, trained: int = 0, num: int = 1
) -> Cell:
    return Cell(
        target=target, per_class=8, draw=seed, entrant=entrant, accuracy=accuracy, num_test=100,
        trained=trained, num_sources=num, detail="", steps=0, seconds=0.0,
    )  # fmt: skip


CELLS = [
    cell("mr", "svdmerge", 0.8, num=2),
    cell("mr", "AXIS untuned", 0.7, num=9),
    cell("mr", "LoRA", 0.75, trained=100),
    cell("mr", "source a", 0.6),
    cell("mr", "source b", 0.65),
    cell("mr@4", "AXIS untuned", 0.72, num=4),
    cell("mr+pruned", "svdmerge", 0.78, num=2),
    cell("mr+noise-norm", "AXIS untuned", 0.5, num=9),
]


def test_altered_targets_are_told_from_plain_ones() -> None:
    assert {c.target for c in plain(CELLS)} == {"mr"}
    assert {c.target_alone for c in CELLS} == {"mr"}


def test_an_alteration_is_paired_with_the_same_draw_unaltered() -> None:
    found = altered_pairs([*CELLS, cell("mr+pruned", "svdmerge", 0.1, seed=1)])
    assert found.keys() == {
        ("@4", "AXIS untuned"),
        ("+pruned", "svdmerge"),
        ("+noise-norm", "AXIS untuned"),
    }
    assert found["+pruned", "svdmerge"].mean == pytest.approx(-2.0)
    assert found["+pruned", "svdmerge"].num_draws == 1


def test_the_best_single_source_is_that_of_the_highest_mean() -> None:
    more = [cell("mr", "source a", 1.0, seed=1), cell("mr", "source b", 0.65, seed=1)]
    assert best_single([*CELLS, *more]) == "source a"
    assert best_single([cell("mr", "svdmerge", 0.8)]) is None


def test_points_are_of_targets_that_can_be_compared() -> None:
    assert by_trained(CELLS) == {
        "svdmerge": (0, pytest.approx(80.0)),
        "AXIS untuned": (0, pytest.approx(70.0)),
        "LoRA": (100, pytest.approx(75.0)),
    }
    assert by_sources(CELLS)["AXIS untuned"] == [
        (4, pytest.approx(72.0)),
        (9, pytest.approx(70.0)),
    ]


def test_the_figure_is_written(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    draw(CELLS, tmp_path / "f.png")
    assert (tmp_path / "f.png").stat().st_size > 1000
