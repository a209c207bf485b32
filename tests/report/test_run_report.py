"""A run's report in the store, while it goes on and afterwards."""

import contextlib
import json
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
from merging import Bench, tiny_bench

from svdmerge import workflow
from svdmerge.errors import StoreError
from svdmerge.storage.filesystem import Folder


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return tiny_bench(tmp_path)


class Watcher:
    """Progress that looks into the store's report at every unit."""

    def __init__(self, store: Path) -> None:
        self._store, self.seen = store, list[dict[str, Any]]()

    def advance(self, num: int = 1) -> None:
        del num
        self.look()

    def look(self) -> None:
        for path in self._store.glob("runs/*/attempts/*/run.json"):
            self.seen.append(json.loads(path.read_text()))

    @contextlib.contextmanager
    def stage(self, name: str, total: int) -> Generator["Watcher"]:
        del name, total
        yield self
        self.look()


def test_the_stored_report_says_how_far_a_run_is_and_no_more_once_it_is_done(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workflow, "REPORT_S", 0.0)
    watcher = Watcher(bench.store)
    report = workflow.run(bench.recipe(), address="none", progress=watcher)
    assert all(told["status"] == "running" for told in watcher.seen)
    steps = [tuple(told["progress"].values()) for told in watcher.seen]
    num = len(bench.sources)
    assert ("decompose", 0, num) in steps
    assert ("decompose", num, num) in steps
    assert steps[-1][0] == "write"
    assert [s["name"] for s in watcher.seen[-1]["stages"]] == ["decompose", "select", "merge"]
    assert report.progress is None


def test_a_report_that_cannot_be_stored_meanwhile_does_not_end_the_run(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workflow, "REPORT_S", 0.0)
    stored = Folder.put

    def refusing(self: Folder, relative: str, data: bytes) -> None:
        if relative.endswith("run.json") and b'"running"' in data:
            raise StoreError("full")
        stored(self, relative, data)

    monkeypatch.setattr(Folder, "put", refusing)
    assert workflow.run(bench.recipe(), address="none").status == "done"
