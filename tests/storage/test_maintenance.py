"""Looking after a store beside drivers that are at work."""

from pathlib import Path

import pytest

from svdmerge.storage.filesystem import Folder
from svdmerge.storage.maintenance import collect_garbage


def test_what_a_driver_removes_meanwhile_is_no_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, honest = Folder.at(tmp_path), Folder.find
    for name in ("gone", "stays"):
        store.put_scratch(f"scratch/run/{name}", b"vectors")

    def listed_late(self: Folder, relative: str = "") -> dict[str, int]:
        found = honest(self, relative)
        (tmp_path / "scratch/run/gone").unlink(missing_ok=True)
        return found

    monkeypatch.setattr(Folder, "find", listed_late)
    # A day's grace spares the driver's own, whatever else is collected.
    assert collect_garbage(store) == []
    store.put_scratch("scratch/run/gone", b"vectors")
    assert collect_garbage(store, grace_s=0.0) == ["scratch/run/stays"]
