"""Runs unit by unit, and what the simulator makes of them; the forecast's scale and bottleneck."""

from pathlib import Path

import pytest
import scaling as pipeline
from merging import micro_bench

from svdmerge.comparison import scaling
from svdmerge.comparison.forecast import Cluster, Rates, alternatives, cpu_rate, forecast, host_rate
from svdmerge.comparison.scaling import (
    Measured,
    Step,
    Timed,
    draw_scaling,
    driver_rate,
    only,
    predicted_seconds,
    with_sources,
)
from svdmerge.engine.runtime import InProcess, RayTasks
from svdmerge.progress import SILENT
from svdmerge.workflow import Run

RATES = Rates(host_bytes=1e9, cpu_flops=1e11)


def measured(*steps: Step, sources: int = 2, workers: int = 1, driver: float = 1.0) -> Measured:
    return Measured(
        num_workers=workers,
        num_sources=sources,
        seconds=sum(step.seconds for step in steps) + driver,
        steps=steps,
    )


def test_every_unit_and_step_of_a_run_is_timed(tmp_path: Path) -> None:
    bench = micro_bench(tmp_path)
    runtime = Timed(InProcess())
    report = Run(bench.recipe(), runtime=runtime, progress=SILENT).all()
    names = [step.name for step in runtime.steps]
    assert {"inventory", "decompose", "merge", "write"} <= set(names)
    decompose = next(step for step in runtime.steps if step.name == "decompose")
    assert len(decompose.unit_seconds) == len(bench.sources)
    assert all(0 < sum(s.unit_seconds) <= s.seconds for s in runtime.steps)
    assert sum(s.seconds for s in runtime.steps) <= sum(s.seconds for s in report.stages)


def test_one_worker_is_predicted_to_take_what_it_took() -> None:
    run = measured(Step(name="a", seconds=6.5, unit_seconds=(1.0, 2.0, 3.0)))
    assert predicted_seconds(run, num_workers=1) == pytest.approx(run.seconds)


def test_two_workers_halve_the_units_and_not_the_driver() -> None:
    run = measured(
        Step(name="a", seconds=4.4, unit_seconds=(1.0,) * 4),
        Step(name="b", seconds=2.0, unit_seconds=(2.0,)),
        Step(name="nothing to do", seconds=0.1, unit_seconds=()),
        driver=1.5,
    )
    assert predicted_seconds(run, num_workers=2) == pytest.approx(2.2 + 2.0 + 0.1 + 1.5)


def test_other_numbers_of_sources_lie_on_a_line() -> None:
    few = measured(
        Step(name="decompose", seconds=2.2, unit_seconds=(1.0, 1.0)),
        Step(name="merge", seconds=1.0, unit_seconds=(0.9,)),
    )
    many = measured(
        Step(name="decompose", seconds=4.4, unit_seconds=(0.5, 1.5, 1.0, 1.0)),
        Step(name="merge", seconds=1.2, unit_seconds=(1.1,)),
        sources=4,
    )
    found = with_sources(few, many, num_sources=8)
    decompose, merge = found.steps
    assert len(decompose.unit_seconds) == 8
    assert sum(decompose.unit_seconds) == pytest.approx(8.0)
    assert decompose.seconds == pytest.approx(8.8)
    assert merge.unit_seconds == pytest.approx((1.5,))
    assert found.driver_seconds == pytest.approx(1.0)
    assert with_sources(few, many, num_sources=4).seconds == pytest.approx(many.seconds)


def test_tables_and_figure_are_made_of_runs(tmp_path: Path) -> None:
    step = Step(name="decompose", seconds=4.0, unit_seconds=(1.0,) * 4)
    half = Step(name="decompose", seconds=2.0, unit_seconds=(1.0,) * 4)
    runs = [measured(step, driver=0.0), measured(half, workers=2, sources=2, driver=0.0)]
    rows = pipeline.scaling_rows(runs)
    assert [row[6] for row in rows] == ["1.00", "1.00"]  # strong efficiency
    ((workers, sources, _, predicted, took, off),) = pipeline.predicted_rows(runs)
    assert (workers, sources, predicted, took, off) == (2, 2, "2.0", "2.0", "+0 %")
    draw_scaling(runs, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes()[:4] == b"\x89PNG"


def test_a_part_of_a_rays_workers_can_be_had(ray_session: None) -> None:
    import ray

    with only(1):
        assert ray.available_resources()["CPU"] == 1
        assert driver_rate(RayTasks("local"), num=20) > 0


def test_the_forecast_names_the_store_as_what_holds_a_large_merge_up() -> None:
    """A hundredth of the size, at a hundredth of the store."""
    small = Cluster(num_gpus=10, num_sources=20, num_layers=8, store_bytes_per_s=1e9)
    told = {
        name: forecast(cluster, RATES, k=0.1).seconds["decompose"]
        for name, cluster in alternatives(small).items()
    }
    assert min(told, key=told.__getitem__) == "four times the store's bandwidth"
    # 160 units of 2 x 856 million weights in bfloat16.
    floor = 160 * 4 * 855_638_016 / 1e9
    assert floor <= told["as assumed"] <= 1.2 * floor
    assert told["the base read once a node, not once a source"] == pytest.approx(
        told["as assumed"] / 2, rel=0.15
    )


def test_rates_of_this_machine_are_measured() -> None:
    assert host_rate(num_bytes=1 << 20) > 1e6
    assert cpu_rate(side=64) > 1e6


def test_a_map_of_units_that_fail_goes_through() -> None:
    from types import SimpleNamespace
    from typing import Any

    from svdmerge.errors import ContentError

    def work(unit: Any) -> str:
        raise ContentError(unit.name)

    units: list[Any] = [SimpleNamespace(name="a", memory_bytes=1, threads=1)]
    runtime = scaling.Timed(InProcess())
    found = runtime.map(
        work, units, stage="x", progress=SILENT, failed=lambda u, error: f"{u.name}: told"
    )
    assert found == ["a: told"]
    assert runtime.steps[0].unit_seconds == (0.0,)
