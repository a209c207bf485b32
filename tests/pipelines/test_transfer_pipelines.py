"""No row a source was trained on reaches a target, and a comparison goes on where it stopped."""

import argparse
from pathlib import Path
from typing import Any, cast

import bench_transfer
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transfer_data import POOL, cut, main, normalised

from svdmerge.comparison.cells import Cells
from svdmerge.comparison.problem import Problem
from svdmerge.comparison.untrained import Result


def table(texts: list[str], labels: list[int] | None = None) -> pa.Table:
    return pa.table({"text": texts, "label": labels or [i % 2 for i in range(len(texts))]})


def texts_of(path: Path) -> list[str]:
    return pq.read_table(path)["text"].to_pylist()


def test_spelling_and_spaces_do_not_make_another_row() -> None:
    assert normalised("  Please  HELP\tme ") == "please help me"


def test_halves_share_no_row_even_where_one_is_repeated() -> None:
    texts = [f"row {i}" for i in range(60)]
    texts += [text.upper() + " " for text in texts[:20]]
    source, target = cut(table(texts))
    seen, kept = ({normalised(t) for t in half["text"].to_pylist()} for half in (source, target))
    assert not seen & kept
    assert seen | kept == {normalised(t) for t in texts}


def test_the_target_gets_at_most_half_of_a_class_and_no_more_than_the_pool() -> None:
    labels = [0] * (3 * POOL) + [1] * 10
    _, target = cut(table([f"row {i}" for i in range(len(labels))], labels))
    found = target["label"].to_pylist()
    assert (found.count(0), found.count(1)) == (POOL, 5)


def test_the_cut_does_not_depend_on_the_order_of_rows() -> None:
    texts, labels = [f"row {i}" for i in range(30)], [i % 3 for i in range(30)]
    first = cut(table(texts, labels))
    again = cut(table(texts[::-1], labels[::-1]))
    for one, other in zip(first, again, strict=True):
        assert set(one["text"].to_pylist()) == set(other["text"].to_pylist())


def test_only_shared_datasets_are_cut_and_test_rows_are_copied(tmp_path: Path) -> None:
    data, out = tmp_path / "data", tmp_path / "out"
    data.mkdir()
    for name in ("clinc150-train", "clinc150-test", "mr-train"):
        pq.write_table(table([f"{name} {i}" for i in range(8)]), data / f"{name}.parquet")
    main(data, out)
    for name in ("clinc150-test", "mr-train"):
        for half in ("sources", "targets"):
            assert texts_of(out / half / f"{name}.parquet") == texts_of(data / f"{name}.parquet")
    halves = [set(texts_of(out / h / "clinc150-train.parquet")) for h in ("sources", "targets")]
    assert not halves[0] & halves[1]
    assert len(halves[0] | halves[1]) == 8


def test_a_planted_row_of_a_source_is_dropped_from_train_and_test(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder in ("sources", "targets"):
        (tmp_path / folder).mkdir()
    pq.write_table(table(["good film", "bad film"]), tmp_path / "sources/sst2-train.parquet")
    for part in ("train", "test"):
        rows = [f"{part} a", f"{part} b", " Good  FILM"]
        pq.write_table(table(rows), tmp_path / f"targets/mr-{part}.parquet")
    sources = [tmp_path / "models/sst2-small"]
    train, test = bench_transfer.clean("mr", tmp_path, sources, tmp_path / "clean")
    assert texts_of(train) == ["train a", "train b"]
    assert texts_of(test) == ["test a", "test b"]
    assert "mr train: 3 rows, 1 seen by a source" in capsys.readouterr().out


def test_a_target_gets_neither_its_own_source_nor_parts_of_another_target(tmp_path: Path) -> None:
    for name in ("base", "cr", "sst2", "banking77", "banking77-labels-0-14"):
        (tmp_path / name).mkdir()
    (tmp_path / "notes.txt").touch()

    def found(target: str) -> list[str]:
        return [path.name for path in bench_transfer.sources_for(target, tmp_path)]

    assert found("cr") == ["banking77", "sst2"]
    assert found("mr") == ["banking77", "cr", "sst2"]
    assert found("banking77") == ["banking77-labels-0-14", "cr", "sst2"]


class Drawing:
    """A problem that only draws."""

    name = "mr"

    def __init__(self) -> None:
        self.sources: dict[str, Any] = {}

    def drawn(self, *, per_class: int | None, seed: int) -> list[int]:
        return [per_class or 0, seed]


def test_cells_that_are_there_are_not_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[list[int]] = []

    def entrant(problem: Problem, rows: list[int]) -> Result:
        del problem
        measured.append(rows)
        return Result(hits=torch.tensor([True, False]))

    monkeypatch.setattr(bench_transfer, "UNTRAINED", {"probe": entrant})
    args = argparse.Namespace(entrants="", per_class="8,0", draws=2, first_draw=0)
    cells, problem = Cells(tmp_path), cast(Problem, Drawing())
    bench_transfer.measure(problem, cells, args)
    assert measured == [[8, 0], [8, 1], [0, 0], [0, 1]]
    next(tmp_path.glob("mr-8-1-*.json")).unlink()
    bench_transfer.measure(problem, cells, args)
    assert measured[4:] == [[8, 1]]
    assert [c.accuracy for c in cells.all()] == [0.5] * 4


def test_the_report_pairs_every_entrant_with_ours(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cells = Cells(tmp_path)
    for name, hits in (("probe", [True, False]), (bench_transfer.OURS, [True, True])):
        args = argparse.Namespace(entrants=name, per_class="8", draws=2, first_draw=0)
        result = Result(hits=torch.tensor(hits))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(bench_transfer, "UNTRAINED", {name: lambda p, r, x=result: x})
            bench_transfer.measure(cast(Problem, Drawing()), cells, args)
    capsys.readouterr()
    bench_transfer.report(cells.all())
    told = capsys.readouterr().out
    assert "| probe | +50.0 (+50.0..+50.0) | +50.0 (+50.0..+50.0) |" in told
