"""Files of examples as tables: parquet, JSON lines, folders of these, one folder per class."""

import io
import json
from collections.abc import Iterator, Sequence
from typing import Any, cast

import pyarrow as pa
import pyarrow.parquet as pq

from svdmerge.errors import SvdmergeError, TrainingError
from svdmerge.storage.filesystem import Folder

PARQUET, JSON_LINES = (".parquet", ".pq"), (".jsonl", ".json", ".ndjson")
IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")


def read_table(path: str, *, columns: Sequence[str]) -> pa.Table:
    """The named columns of a file, or of the parquet or JSON-lines files of a folder in the order
    of their names; a file of any other ending is taken for parquet.

    Raises:
        TrainingError: a file cannot be read, a column is missing or holds nulls, or no row is left.
    """
    tables = [_read_file(file, columns=columns) for file in _files(path)]
    try:
        table = pa.concat_tables(tables)
    except pa.ArrowException as error:
        raise TrainingError(
            f"{path}: its files differ in their columns", str(error), "Give files of one kind."
        ) from error
    if not table.num_rows:
        raise TrainingError(f"{path}: has no rows", "", "Give a file with examples.")
    return table


def _files(path: str) -> list[str]:
    folder = Folder.at(path)
    try:
        # A file in an object store may have no ending, and listing one costs a request.
        if path.endswith(PARQUET + JSON_LINES) or not folder.fs.isdir(folder.path()):
            return [path]
    except OSError:  # told when the file is read
        return [path]
    held = folder.names()
    # JSON beside parquet tells about it, as `dataset_info.json` does.
    kind = PARQUET if any(n.endswith(PARQUET) for n in held) else JSON_LINES
    names = [n for n in held if n.endswith(kind)]
    if not names:
        raise TrainingError(
            f"{path}: a folder without parquet or JSON-lines files",
            f"It holds {', '.join(held[:3]) or 'nothing'}.",
            "Give a file, or set `task: image` for a folder of images.",
        )
    return [f"{path.rstrip('/')}/{name}" for name in names]


def _read_file(path: str, *, columns: Sequence[str]) -> pa.Table:
    is_json = path.endswith(JSON_LINES)
    file = Folder.at(path)
    try:
        data = file.read("")
        table = _json_table(path, data, columns=columns) if is_json else _parquet(data)
    except (OSError, pa.ArrowException, SvdmergeError) as error:
        if isinstance(error, TrainingError):
            raise
        kind = "JSON lines" if is_json else "parquet"
        raise TrainingError(
            f"{path}: cannot be read as {kind}", str(error), "Check the path."
        ) from error
    return _checked(path, table, columns=columns)


def _parquet(data: bytes) -> pa.Table:
    return pq.read_table(io.BytesIO(data))


def _checked(path: str, table: pa.Table, *, columns: Sequence[str]) -> pa.Table:
    for name in columns:
        if name not in table.column_names:
            raise TrainingError(
                f"{path}: has no column `{name}`",
                f"Its columns: {', '.join(table.column_names)}.",
                "Set `input` and `label` to the columns of your file.",
            )
        if nulls := table.column(name).null_count:
            raise TrainingError(
                f"{path}: column `{name}` holds {nulls} nulls", "", "Fill or drop those rows."
            )
    # Metadata apart, in which files of one kind may differ.
    return table.select(list(columns)).replace_schema_metadata(None)


def _json_table(path: str, data: bytes, *, columns: Sequence[str]) -> pa.Table:
    rows = list(_json_rows(path, data))
    if not rows:
        raise TrainingError(f"{path}: has no rows", "", "Give a file with examples.")
    known = sorted({key for _, row in rows for key in row})
    for name in columns:
        number = next((line for line, row in rows if row.get(name) is None), None)
        if name in known and number is not None:
            raise TrainingError(
                f"{path}, line {number}: has no `{name}`", "", "Fill or drop that line."
            )
    found = [name for name in columns if name in known]
    try:
        return pa.table({name: pa.array([row[name] for _, row in rows]) for name in found} or {})
    except pa.ArrowException as error:
        raise TrainingError(
            f"{path}: a column holds values of several kinds", str(error), "Give one kind."
        ) from error


def _json_rows(path: str, data: bytes) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line numbers and objects. A file that is one JSON list counts its elements instead."""
    if data.lstrip()[:1] == b"[":
        rows = cast(list[object], _parse(f"{path}", data))
        yield from ((i, _object(f"{path}, element {i}", row)) for i, row in enumerate(rows, 1))
        return
    for number, line in enumerate(data.splitlines(), 1):
        if line.strip():
            place = f"{path}, line {number}"
            yield number, _object(place, _parse(place, line))


def _parse(place: str, text: bytes) -> object:
    try:
        return json.loads(text)
    except ValueError as error:
        raise TrainingError(
            f"{place}: not valid JSON", str(error), "Write one JSON object per line."
        ) from None


def _object(place: str, row: object) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise TrainingError(
            f"{place}: holds {type(row).__name__}", "", "Write one JSON object per line."
        )
    return cast(dict[str, Any], row)


def is_image_folder(path: str) -> bool:
    """Whether the path is a folder, and not one of tables."""
    folder = Folder.at(path)
    if path.endswith(PARQUET + JSON_LINES) or not folder.fs.isdir(folder.path()):
        return False
    return not any(n.endswith(PARQUET + JSON_LINES) for n in folder.names())


def list_images(path: str) -> tuple[list[str], list[str]]:
    """Paths of all images below a folder, and the sub-folder, hence the class, of each.

    Other files, and names that begin with a dot, are passed over; sorted, so that rows are stable.

    Raises:
        TrainingError: an image lies in no sub-folder, or there is none.
    """
    folder = Folder.at(path)
    names = [n for n in folder.find() if n.lower().endswith(IMAGES) and "/." not in f"/{n}"]
    stray = next((n for n in names if "/" not in n), None)
    if stray is not None or not names:
        raise TrainingError(
            f"{path}: holds {f'{stray} in no sub-folder' if stray else 'no image in a sub-folder'}",
            f"A folder of images has one sub-folder per class; files end in {', '.join(IMAGES)}.",
            "Move each image into the folder of its class.",
        )
    uris = [folder.child(name).uri for name in sorted(names)]
    return uris, [name.split("/", 1)[0] for name in sorted(names)]
