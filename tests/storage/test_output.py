"""One run at a time writes an output; what is left of the lock is nothing."""

import fcntl
from pathlib import Path
from typing import Any

import pytest
from merging import Bench, micro_bench, tree

from svdmerge.engine import assemble
from svdmerge.errors import OutputError
from svdmerge.storage.filesystem import Folder
from svdmerge.storage.output import release, staging


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return micro_bench(tmp_path)


def lock(bench: Bench) -> Path:
    return bench.root / f".out.partial-{bench.plan().hash[:8]}.lock"


def test_an_output_that_another_run_writes_is_told_and_left_alone(bench: Bench) -> None:
    with lock(bench).open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(OutputError, match="being written by another run"):
            bench.run()
        assert not bench.out.exists()
    assert bench.run().status == "done"
    assert not lock(bench).exists()


def test_a_run_holds_its_output_until_it_is_published(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, tried = assemble.write_model, list[bool]()

    def write_while_another_tries(*args: Any, **options: Any) -> Any:
        with lock(bench).open("w") as other, pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        tried.append(True)
        return write(*args, **options)

    monkeypatch.setattr(assemble, "write_model", write_while_another_tries)
    assert bench.run().status == "done"
    assert tried == [True]


def test_a_failed_run_gives_its_output_free(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("svdmerge.workflow.publish", None)
        with pytest.raises(TypeError):
            bench.run()
    assert not lock(bench).exists()
    assert bench.run().status == "done"


def test_a_lock_whose_name_is_gone_is_taken_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other run may end, and remove its lock, between this one's opening and locking."""
    place, flock = tmp_path / ".out.partial-abc.lock", fcntl.flock

    def lose_the_name_once(file: Any, how: int) -> None:
        monkeypatch.setattr(fcntl, "flock", flock)
        place.unlink()
        flock(file, how)

    monkeypatch.setattr(fcntl, "flock", lose_the_name_once)
    staged = staging(Folder.at(tmp_path / "out"), plan_hash="abc")
    with place.open("w") as other, pytest.raises(BlockingIOError):
        flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    release(staged)
    assert tree(tmp_path) == {}
