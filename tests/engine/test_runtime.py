"""Where units run: in this process, and over a real Ray of two processors."""

import contextlib
import os
import time
from collections.abc import Generator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from svdmerge.engine import runtime as runtime_module
from svdmerge.engine.retry import RetryPolicy
from svdmerge.engine.runtime import InProcess, RayTasks, call, open_runtime
from svdmerge.engine.tally import Tally
from svdmerge.errors import ContentError, ResourceError, RetryableError, SvdmergeError
from svdmerge.progress import SILENT

MIB = 1 << 20

# Tasks are functions inside tests: those travel to workers by value, which do not know the tests.


def unit(name: str, *, memory: int = MIB, threads: int = 1, **fields: Any) -> Any:
    """A unit of work as the runtime sees it."""
    return SimpleNamespace(name=name, memory_bytes=memory, threads=threads, **fields)


@dataclass
class Counting:
    """Progress that remembers what it was told."""

    told: list[tuple[str, int]] = field(default_factory=list)
    done: int = 0

    @contextlib.contextmanager
    def stage(self, name: str, total: int) -> Generator["Counting"]:
        self.told.append((name, total))
        yield self

    def advance(self, num: int = 1) -> None:
        self.done += num


@pytest.fixture(params=["none", "ray"])
def runtime(request: pytest.FixtureRequest, ray_session: None) -> Any:
    quick = RetryPolicy(first_pause_s=0.01)
    return InProcess() if request.param == "none" else RayTasks("local", policy=quick)


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    real = time.sleep
    monkeypatch.setattr("svdmerge.engine.runtime.time.sleep", lambda s: real(min(s, 0.01)))


def test_results_come_in_the_order_of_the_units(runtime: Any) -> None:
    def work(u: Any) -> str:
        time.sleep(0.2 if u.name == "0" else 0.0)
        return f"done {u.name}"

    progress = Counting()
    units = [unit(str(i)) for i in range(7)]
    results = runtime.map(work, units, stage="merge", progress=progress)
    assert results == [f"done {i}" for i in range(7)]
    assert progress.told == [("merge", 7)]
    assert progress.done == 7


def test_no_units_are_no_work(runtime: Any) -> None:
    assert runtime.map(lambda u: u, [], stage="merge", progress=SILENT) == []


def test_a_retryable_error_is_tried_again_until_it_succeeds(runtime: Any, tmp_path: Path) -> None:
    def work(u: Any) -> int:
        from svdmerge.errors import RetryableError

        with open(f"{u.folder}/{u.name}", "a") as tries:  # noqa: PTH123
            tries.write("x")
        if (num := os.path.getsize(f"{u.folder}/{u.name}")) < 3:  # noqa: PTH202
            raise RetryableError(f"{u.name}: hiccup {num}")
        return num

    units = [unit(name, folder=str(tmp_path)) for name in ("a", "b")]
    assert runtime.map(work, units, stage="decompose", progress=SILENT) == [3, 3]


def test_a_retryable_error_that_stays_is_told_in_the_end(runtime: Any, tmp_path: Path) -> None:
    def work(u: Any) -> None:
        from svdmerge.errors import RetryableError

        with open(f"{u.folder}/tries", "a") as tries:  # noqa: PTH123
            tries.write("x")
        raise RetryableError(f"{u.name}: the bucket is away", "HTTP 503", "Try later.")

    with pytest.raises(RetryableError) as caught:
        runtime.map(work, [unit("a", folder=str(tmp_path))], stage="x", progress=SILENT)
    assert caught.value.args == ("a: the bucket is away", "HTTP 503", "Try later.")
    assert len((tmp_path / "tries").read_text()) == 6


def test_a_fatal_error_comes_through_as_it_is_and_is_not_tried_again(
    runtime: Any, tmp_path: Path
) -> None:
    def work(u: Any) -> None:
        from svdmerge.errors import ContentError

        with open(f"{u.folder}/tries", "a") as tries:  # noqa: PTH123
            tries.write("x")
        raise ContentError(f"{u.name}: NaN", "Expected numbers.", "Remove it.")

    with pytest.raises(ContentError) as caught:
        runtime.map(work, [unit("a", folder=str(tmp_path))], stage="x", progress=SILENT)
    assert type(caught.value) is ContentError
    assert caught.value.args == ("a: NaN", "Expected numbers.", "Remove it.")
    assert (tmp_path / "tries").read_text() == "x"


def test_with_a_result_for_units_that_fail_the_others_go_on(runtime: Any) -> None:
    def work(u: Any) -> str:
        if u.name == "1":
            raise ContentError("unit 1 holds NaN")
        return f"did {u.name}"

    def failed(u: Any, error: SvdmergeError) -> str:
        return f"{u.name}: {error}"

    units = [unit(str(i)) for i in range(3)]
    found = runtime.map(work, units, stage="work", progress=SILENT, failed=failed)
    assert found == ["did 0", "1: unit 1 holds NaN", "did 2"]


def test_every_unit_runs_with_its_own_threads_and_leaves_them_as_they_were(runtime: Any) -> None:
    def work(u: Any) -> int:
        import torch

        return torch.get_num_threads()

    before = torch.get_num_threads()
    units = [unit("a", threads=2), unit("b", threads=1), unit("c", threads=2)]
    assert runtime.map(work, units, stage="x", progress=SILENT) == [2, 1, 2]
    assert torch.get_num_threads() == before


def test_threads_are_given_back_when_a_unit_fails() -> None:
    def work(u: Any) -> None:
        raise ContentError("bad")

    before = torch.get_num_threads()
    with pytest.raises(ContentError):
        call(work, unit("a", threads=before + 1))
    assert torch.get_num_threads() == before


def test_a_bug_in_a_task_is_told_with_the_units_name_in_three_lines(ray_session: None) -> None:
    def work(u: Any) -> None:
        raise KeyError("surprise")

    with pytest.raises(SvdmergeError) as caught:
        RayTasks("local").map(work, [unit("decompose ft [3/9]")], stage="x", progress=SILENT)
    assert "decompose ft [3/9]" in str(caught.value)
    assert "surprise" in str(caught.value)
    assert len(str(caught.value).splitlines()) <= 3


@pytest.mark.parametrize(
    ("need", "words"),
    [({"memory": 1 << 60}, "needs 1099511627776 MiB"), ({"threads": 64}, "wants 64 threads")],
)
def test_a_unit_that_fits_no_machine_is_refused_before_any_runs(
    ray_session: None, tmp_path: Path, need: dict[str, int], words: str
) -> None:
    marker = tmp_path / "ran"

    def work(u: Any) -> None:
        from pathlib import Path

        Path(u.marker).touch()

    units = [unit("small", marker=str(marker)), unit("big", marker=str(marker), **need)]
    start = time.perf_counter()
    with pytest.raises(ResourceError) as caught:
        RayTasks("local").map(work, units, stage="x", progress=SILENT)
    assert str(caught.value).startswith("big: ")
    assert words in str(caught.value)
    assert time.perf_counter() - start < 5
    assert not marker.exists()


def test_few_units_are_in_flight_however_many_there_are(
    ray_session: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    in_flight: list[int] = []
    wait = ray.wait
    monkeypatch.setattr(
        ray, "wait", lambda refs, **k: in_flight.append(len(refs)) or wait(refs, **k)
    )
    units = [unit(str(i)) for i in range(40)]
    results = RayTasks("local").map(lambda u: u.name, units, stage="x", progress=SILENT)
    assert results == [u.name for u in units]
    assert max(in_flight) == 4  # two processors, twice


def test_a_killed_worker_is_replaced_and_the_unit_runs_again(
    ray_session: None, tmp_path: Path
) -> None:
    def work(u: Any) -> str:
        import os
        import signal
        from pathlib import Path

        if not Path(u.marker).exists():
            Path(u.marker).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return "survived"

    units = [unit("a", marker=str(tmp_path / "killed"))]
    assert RayTasks("local").map(work, units, stage="x", progress=SILENT) == ["survived"]


def test_a_unit_that_kills_its_worker_every_time_is_named(ray_session: None) -> None:
    def work(u: Any) -> None:
        import os

        os._exit(7)

    policy = RetryPolicy(lost=1)
    with pytest.raises(ResourceError, match="poison: worker or node lost") as caught:
        RayTasks("local", policy=policy).map(work, [unit("poison")], stage="x", progress=SILENT)
    assert "failed 2 times" in str(caught.value)
    assert len(str(caught.value).splitlines()) <= 3


def test_a_ray_that_was_there_is_left_running(ray_session: None) -> None:
    import ray

    with open_runtime("local") as runtime:
        assert runtime.address == "local"
    assert ray.is_initialized()


def test_an_address_where_nothing_answers_is_an_error_with_a_way_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import ray

    def refuse(**options: Any) -> None:
        raise ConnectionError("Could not find any running Ray instance.\nmore\nlines")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", refuse)
    with pytest.raises(ResourceError) as caught, open_runtime("10.0.0.1:6379"):
        pass
    told = str(caught.value).splitlines()
    assert len(told) == 3
    assert "10.0.0.1:6379" in told[0]
    assert "none" in told[2]


def test_in_this_process_nothing_of_ray_is_started() -> None:
    with open_runtime("none") as runtime:
        assert isinstance(runtime, InProcess)
        assert runtime.address == "none"


def test_the_window_grows_with_the_cluster(
    ray_session: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An autoscaler adds machines for what waits, and these get their share of the next units."""
    monkeypatch.setattr(runtime_module, "RESIZE_S", 0.0)
    depths: list[int] = []

    class Watched(Tally):
        def put(self, metric: Any, value: float, **labels: str) -> None:
            if labels["state"] == "running":
                depths.append(int(value))

    runtime = RayTasks("local")
    runtime.tally = Watched()
    monkeypatch.setattr(runtime_module, "_limits", limits_of(1.0, then=3.0))
    runtime.map(lambda u: u.name, [unit(str(i)) for i in range(12)], stage="x", progress=SILENT)
    assert max(depths) == 6


def limits_of(first: float, *, then: float) -> Any:
    """What a cluster has: so many processors when it is first asked for, and later."""
    asked = [first]

    def limits() -> dict[str, float]:
        return {"CPU": asked.pop() if asked else then, "GPU": 0.0, "memory": 2.0**40}

    return limits
