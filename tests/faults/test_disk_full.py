"""A disk that fills up at every write there is: a clear error, and the same command finishes."""

import errno
import math
import os
import shutil
from pathlib import Path

import pytest
from merging import Bench, micro_bench, tree

from svdmerge import workflow
from svdmerge.errors import StoreError
from svdmerge.storage import maintenance
from svdmerge.storage.filesystem import Folder

MANIFEST = "svdmerge_manifest.json"


class Disk:
    """Writes are counted where they reach the disk; from the `full_at`-th on there is no space."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.num, self.full_at, self.frees_up = 0, 1 << 30, False
        real = os.fsync

        def fsync(fd: int) -> None:
            self.num += 1
            if self.num == self.full_at or (self.num > self.full_at and not self.frees_up):
                raise OSError(errno.ENOSPC, "No space left on device")
            real(fd)

        monkeypatch.setattr(os, "fsync", fsync)

    def fill(self, at: int, *, frees_up: bool = False) -> None:
        self.num, self.full_at, self.frees_up = 0, at, frees_up


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    # How far a run is told now and then, and need not be: no write to count on.
    monkeypatch.setattr(workflow, "REPORT_S", math.inf)
    return Disk(monkeypatch)


def start_again(bench: Bench) -> None:
    shutil.rmtree(bench.store, ignore_errors=True)
    shutil.rmtree(bench.out, ignore_errors=True)


def undisturbed(bench: Bench, disk: Disk) -> tuple[dict[str, str], int]:
    """An output's files, and how many writes a run needs."""
    disk.fill(1 << 30)
    bench.run()
    files, writes = tree(bench.out), disk.num
    start_again(bench)
    return files, writes


@pytest.mark.parametrize("frees_up", [False, True])
def test_a_disk_full_at_any_write_is_told_and_the_same_command_finishes_later(
    tmp_path: Path, disk: Disk, frees_up: bool
) -> None:
    bench = micro_bench(tmp_path, num_sources=2)
    files, writes = undisturbed(bench, disk)
    assert writes > 15
    for at in range(1, writes + 1):
        disk.fill(at, frees_up=frees_up)
        with pytest.raises(StoreError) as caught:
            bench.run()
        what, why, fix = caught.value.args
        assert "disk full" in what
        assert str(tmp_path) in what
        assert "No space left" in why
        assert "same command" in fix
        assert not list(tmp_path.rglob("*.partial"))
        assert maintenance.verify(Folder.at(bench.store)) == []
        published = tree(bench.out) if bench.out.exists() else {}
        assert published in ({}, files)
        disk.fill(1 << 30)
        bench.run()
        assert tree(bench.out) == files
        assert not [p.name for p in tmp_path.iterdir() if p.name.startswith(".")]
        start_again(bench)


def test_the_first_error_is_told_and_not_the_reports_own(tmp_path: Path, disk: Disk) -> None:
    bench = micro_bench(tmp_path, num_sources=2)
    _, writes = undisturbed(bench, disk)
    disk.fill(writes // 2)
    with pytest.raises(StoreError) as caught:
        bench.run()
    assert "run.json" not in str(caught.value)


def test_an_earlier_output_stays_whole_while_the_disk_is_full(tmp_path: Path, disk: Disk) -> None:
    bench = micro_bench(tmp_path, num_sources=2)
    bench.run(parameters={"k": 1})
    before = tree(bench.out)
    disk.fill(1 << 30)
    bench.run(out=str(tmp_path / "other"))
    after_manifest, writes = 2, disk.num  # DONE and the report come after the output is in place
    for at in range(1, writes - after_manifest + 1, 3):
        shutil.rmtree(bench.store)
        disk.fill(at)
        with pytest.raises(StoreError, match="disk full"):
            bench.run()
        assert tree(bench.out) == before


def test_a_place_that_cannot_be_taken_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from svdmerge.errors import OutputError

    bench = micro_bench(tmp_path, num_sources=1)
    bench.run(parameters={"k": 1})
    before = tree(bench.out)
    real = Path.rename

    def refuse(self: Path, target: Path) -> Path:
        if self == bench.out:
            raise OSError(errno.EBUSY, "Device or resource busy")
        return real(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(OutputError) as caught:
        bench.run()
    assert str(bench.out) in str(caught.value)
    assert "another `out`" in str(caught.value)
    assert tree(bench.out) == before
    monkeypatch.undo()
    bench.run()
    assert not [p.name for p in tmp_path.iterdir() if p.name.startswith(".")]
