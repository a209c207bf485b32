"""What units come to: counted in every runtime, told in run.json, exported by a real Ray."""

import json
import re
import time
import urllib.request
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from merging import micro_bench

from svdmerge.engine.retry import RetryPolicy
from svdmerge.engine.runtime import InProcess, RayTasks
from svdmerge.engine.tally import (
    BYTES_READ,
    FLOPS,
    METRICS,
    RETRIES,
    STEP_SECONDS,
    UNIT_SECONDS,
    UNITS,
    Tally,
)
from svdmerge.errors import ContentError
from svdmerge.progress import SILENT
from svdmerge.workflow import Run, run

# What Ray's agents export is up to so old (`metrics_report_interval_ms`), and as much again.
EXPORT_S = 25.0


def unit(name: str, **fields: Any) -> Any:
    return SimpleNamespace(name=name, memory_bytes=1 << 20, threads=1, **fields)


def receipt_after_one_hiccup(u: Any) -> Any:
    from pathlib import Path
    from types import SimpleNamespace

    from svdmerge.errors import RetryableError

    if not (tried := Path(u.folder) / u.name).exists():
        tried.touch()
        raise RetryableError(f"{u.name}: hiccup")
    return SimpleNamespace(bytes_read=100, flops=7.0)


def test_counters_add_up_by_label_and_between_two_times() -> None:
    tally = Tally()
    tally.add(RETRIES, step="decompose", cause="out of memory")
    before = tally.counts()
    tally.add(RETRIES, 2, step="decompose", cause="out of memory")
    tally.add(RETRIES, step="merge", cause="worker or node lost")
    tally.add(RETRIES, 0, step="merge", cause="nothing")
    assert tally.counts().since(before).by("cause", RETRIES) == {
        "out of memory": 2,
        "worker or node lost": 1,
    }
    assert tally.counts().by("step", RETRIES) == {"decompose": 3, "merge": 1}
    assert tally.counts().total(RETRIES) == 4
    assert tally.counts().total(UNITS) == 0


@pytest.mark.parametrize("where", ["none", "ray"])
def test_units_are_counted_with_their_retries_bytes_and_seconds(
    where: str, tmp_path: Path, ray_session: None
) -> None:
    # By value: a Ray's workers do not know the tests.
    task = eval_by_value(receipt_after_one_hiccup)
    policy = RetryPolicy(first_pause_s=0.01)
    runtime = InProcess() if where == "none" else RayTasks("local", policy=policy)
    units = [unit(f"{where}-{i}", folder=str(tmp_path)) for i in range(2)]
    runtime.map(task, units, stage="work", progress=SILENT)
    counts = runtime.tally.counts()
    assert counts.by("cause", RETRIES) == {"retryable error": 2}
    assert counts.by("state", UNITS) == {"done": 2}
    assert counts.total(BYTES_READ) == 200
    assert counts.total(FLOPS) == 14
    assert counts.total(UNIT_SECONDS) > 0
    assert counts.total(STEP_SECONDS) > 0


def eval_by_value(function: Any) -> Any:
    """The function without its module's name, so that pickles hold its code."""
    function.__module__ = "__main__"
    return function


def test_a_unit_that_fails_for_good_is_counted(caplog: pytest.LogCaptureFixture) -> None:
    def work(u: Any) -> None:
        raise ContentError(f"{u.name}: NaN")

    runtime = InProcess()
    with pytest.raises(ContentError):
        runtime.map(work, [unit("a"), unit("b")], stage="work", progress=SILENT)
    assert runtime.tally.counts().by("state", UNITS) == {"failed": 1}


def test_in_this_process_nothing_of_ray_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("svdmerge.engine.tally._ray_metric", None)
    runtime = InProcess()
    runtime.map(lambda u: u.name, [unit("a")], stage="work", progress=SILENT)
    assert runtime.tally.counts().total(UNITS) == 1


def test_run_json_tells_what_was_computed_reused_and_where_time_went(tmp_path: Path) -> None:
    bench = micro_bench(tmp_path)
    first = {s.name: s for s in bench.run().stages}
    num = len(bench.sources) * 3  # two matrices and a vector; integers are compared
    assert first["decompose"].num_reused == 0
    assert first["decompose"].num_matrices >= num
    assert first["decompose"].flops > 0
    assert {"inventory", "decompose"} <= set(first["decompose"].step_seconds)
    assert 0 < first["decompose"].unit_seconds <= first["decompose"].seconds
    assert sum(first["merge"].step_seconds.values()) <= first["merge"].seconds
    # The selection of another budget: all components are there, no factors are.
    run(bench.recipe(parameters={"k": 1}), address="none")
    stored = sorted(bench.store.glob("runs/*/attempts/*/run.json"), key=lambda p: p.stat().st_mtime)
    told = {s["name"]: s for s in json.loads(stored[-1].read_text())["stages"]}
    assert told["decompose"]["num_matrices"] == 0
    assert told["decompose"]["num_reused"] == first["decompose"].num_matrices
    assert told["decompose"]["retries"] == {}
    assert told["merge"]["num_reused"] == 0


def test_a_real_run_on_ray_exports_every_metric(tmp_path: Path, ray_session: None) -> None:
    import ray

    bench = micro_bench(tmp_path)
    runtime = RayTasks("local", policy=RetryPolicy(first_pause_s=0.01))
    Run(bench.recipe(), runtime=runtime).all()
    Run(bench.recipe(parameters={"k": 1}), runtime=runtime).all()  # which reuses
    task = eval_by_value(receipt_after_one_hiccup)
    units = [unit("exported", folder=str(tmp_path))]
    runtime.map(task, units, stage="work", progress=SILENT)  # which tries again
    (node,) = ray.nodes()
    address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    wanted, found = {metric.exported for metric in METRICS}, set[str]()
    deadline = time.monotonic() + EXPORT_S
    while not wanted <= found and time.monotonic() < deadline:
        time.sleep(0.5)
        text = urllib.request.urlopen(address).read().decode()
        found = set(re.findall(r"^(ray_svdmerge_\w+)\{", text, flags=re.MULTILINE))
    assert found == wanted
