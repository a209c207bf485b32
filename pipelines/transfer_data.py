"""Cut datasets so that no target row was ever a source's training row.

    python pipelines/transfer_data.py TEXT_FOLDER OUT

TEXT_FOLDER holds NAME-train.parquet and NAME-test.parquet with columns text, label. OUT/sources
gets the rows that sources may be trained on, OUT/targets those that targets draw examples from;
test rows are copied unchanged. Only the datasets that are both source and target (clinc150,
banking77) are cut: of every class, at most POOL rows and at most half go to the target.
"""

import hashlib
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

POOL = 40  # room for 32 examples a class; a source keeps 60 of clinc150's 100
SHARED = ("clinc150", "banking77")


def normalised(text: str) -> str:
    """The text in lower case with single spaces: two rows are the same row if these agree."""
    return " ".join(text.lower().split())


def cut(table: pa.Table) -> tuple[pa.Table, pa.Table]:
    """(rows for sources, rows for the target), split within each class by the hash of the text."""
    texts = [normalised(text) for text in table["text"].to_pylist()]
    order = sorted(range(len(texts)), key=lambda i: hashlib.sha256(texts[i].encode()).digest())
    labels = table["label"].to_pylist()
    target: set[int] = set()
    for label in set(labels):
        rows = [i for i in order if labels[i] == label]
        target.update(rows[: min(POOL, len(rows) // 2)])
    held = {texts[i] for i in target}
    source = [i for i, text in enumerate(texts) if text not in held]
    return table.take(source), table.take(sorted(target))


def main(data: Path, out: Path) -> None:
    """Write both halves of every dataset in `data`."""
    for folder in ("sources", "targets"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    for path in sorted(data.glob("*.parquet")):
        table = pq.read_table(path)
        name, _, part = path.stem.rpartition("-")
        halves = cut(table) if part == "train" and name in SHARED else (table, table)
        for folder, half in zip(("sources", "targets"), halves, strict=True):
            pq.write_table(half, out / folder / path.name)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
