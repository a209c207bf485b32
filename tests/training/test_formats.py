"""Files of examples: what holds the same rows reads the same, what is wrong is told by line."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from svdmerge.errors import TrainingError
from svdmerge.storage.filesystem import Folder
from svdmerge.training.formats import read_table

ROWS: list[dict[str, Any]] = [{"text": "a\u2028b", "label": 0}, {"text": "c", "label": 1}]
COLUMNS = ("text", "label")


def lines(*rows: object) -> str:
    return "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)


def test_parquet_json_lines_a_json_list_and_folders_hold_the_same_rows(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    (tmp_path / "a.jsonl").write_text(lines(*ROWS) + "\n\n")
    (tmp_path / "a.json").write_text(json.dumps(ROWS, indent=1))
    (tmp_path / "parts").mkdir()
    for i, row in enumerate(ROWS):
        (tmp_path / "parts" / f"part-{i}.jsonl").write_text(lines(row | {f"extra-{i}": None}))
    (tmp_path / "parts" / "README.md").write_text("not read")
    for name in ("a.parquet", "a.jsonl", "a.json", "parts"):
        assert read_table(str(tmp_path / name), columns=COLUMNS).to_pylist() == ROWS, name


def test_json_lines_are_read_from_any_filesystem(memory_uri: str) -> None:
    Folder.at(memory_uri).put("a.jsonl", lines(*ROWS).encode())
    assert read_table(f"{memory_uri}/a.jsonl", columns=COLUMNS).num_rows == 2


FAULTS = [
    (lines(*ROWS) + '\n{"text": ', r"bad\.jsonl, line 3: not valid JSON"),
    (lines(*ROWS, [1]), r"bad\.jsonl, line 3: holds list"),
    (lines(*ROWS, {"text": "no label"}), r"bad\.jsonl, line 3: has no `label`"),
    (lines(*ROWS, {"text": None, "label": 0}), r"bad\.jsonl, line 3: has no `text`"),
    (lines({"label": 0}), r"has no column `text`"),
    (lines(*ROWS, {"text": 3, "label": 0}), "a column holds values of several kinds"),
    ("\n", "has no rows"),
    ("[1]", r"bad\.jsonl, element 1: holds int"),
]


@pytest.mark.parametrize(("content", "message"), FAULTS)
def test_a_wrong_line_is_told_by_number(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text(content)
    with pytest.raises(TrainingError, match=message):
        read_table(str(tmp_path / "bad.jsonl"), columns=COLUMNS)


def test_a_folder_without_tables_is_told(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(TrainingError, match="a folder without parquet or JSON-lines files"):
        read_table(str(tmp_path), columns=COLUMNS)


def test_files_of_a_folder_that_differ_in_their_columns_are_told(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(lines(ROWS[0]))
    (tmp_path / "b.jsonl").write_text(lines({"text": 3, "label": 0}))
    with pytest.raises(TrainingError, match="its files differ in their columns"):
        read_table(str(tmp_path), columns=COLUMNS)
