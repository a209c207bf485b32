"""What a report gathers: the run's own figures, from its output and store."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import tiny
import torch
from merging import Bench, factor_deltas, micro_bench, numbers, tiny_bench
from tiny import tiny_base, tiny_source, write_model
from typer.testing import CliRunner

from svdmerge.cli import app
from svdmerge.engine.account import account, places
from svdmerge.engine.whatif import whatif
from svdmerge.errors import OutputError
from svdmerge.report.contents import Contents
from svdmerge.reporting import PAGE, gather, grid, write_report
from svdmerge.storage.filesystem import Folder
from svdmerge.storage.hf_model import PROVENANCE


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    made = tiny_bench(tmp_path_factory.mktemp("reporting"), num_sources=3)
    (made.base / "README.md").write_text("---\nlicense: mit\n---\n")
    made.run()
    return made


@pytest.fixture(scope="module")
def contents(bench: Bench) -> Contents:
    return gather(Folder.at(bench.out))


def test_what_is_counted_is_what_the_output_keeps(bench: Bench, contents: Contents) -> None:
    rows = [
        r
        for r in pq.read_table(bench.out / PROVENANCE).to_pylist()
        if not r["parameter"].endswith("#flat")
    ]
    assert contents.kept_by.sum() == len(rows) == sum(s.kept for s in contents.sources)
    for i, source in enumerate(contents.sources):
        for j, matrix in enumerate(contents.kept_in):
            kept = [r for r in rows if (r["model"], r["parameter"]) == (source.name, matrix)]
            assert contents.kept_by[i, j] == len(kept)


def test_energy_and_bounds_are_those_of_whatif(bench: Bench, contents: Contents) -> None:
    (outcome,) = whatif(bench.plan(), budgets=[0.2])
    assert contents.energy == pytest.approx(outcome.energy, rel=1e-12)
    assert contents.spectral == outcome.spectral
    assert contents.k == 0.2
    ks = [o["k"] for o in contents.whatif]
    assert contents.whatif[ks.index(0.2)] == outcome.to_json()


def test_the_cut_is_the_last_value_kept(bench: Bench) -> None:
    kept = {}
    for row in pq.read_table(bench.out / PROVENANCE).to_pylist():
        kept.setdefault(row["parameter"], []).append(row["salience"])
    for found in account(bench.plan()):
        saliences = kept[found.parameter.source_id]
        assert found.cut == (len(saliences), min(saliences))
        assert found.cut in found.spectrum
        assert found.spectrum[0] == (1, max(saliences))


def test_inflation_is_of_the_merged_differences(bench: Bench, contents: Contents) -> None:
    base, merged = numbers(bench.base), factor_deltas(bench.plan())
    for found in contents.inflation:
        if found.name in base and base[found.name].ndim == 2:
            largest = max(
                np.linalg.norm(numbers(s)[found.name] - base[found.name], 2) for s in bench.sources
            )
            got = np.linalg.norm(merged[found.name], 2) / largest
            assert found.ratio == pytest.approx(got, rel=1e-4)
    assert contents.inflation


def test_licences_costs_and_overlaps_are_there(bench: Bench, contents: Contents) -> None:
    assert contents.base_licence == "mit"
    assert contents.licence.startswith("unknown")
    assert [s["name"] for s in contents.stages] == ["decompose", "select", "merge", "write"]
    assert contents.status == "done"
    assert contents.overlap is not None
    assert contents.overlap.mean.shape == (3, 3)
    assert sum(contents.actions.values()) == len(bench.plan().actions)


def test_without_the_models_the_rest_is_told(bench: Bench, tmp_path: Path) -> None:
    moved = bench.sources[0].rename(tmp_path / "moved")
    try:
        found = gather(Folder.at(bench.out))
    finally:
        moved.rename(bench.sources[0])
    assert found.matrices == ()
    assert found.kept_by.sum() > 0
    assert "source-1" in found.missing[0]


def test_a_method_without_components_has_a_page(tmp_path: Path) -> None:
    bench = micro_bench(tmp_path)
    bench.run(merge_method="task_arithmetic")
    found = gather(Folder.at(bench.out))
    assert found.whatif == ()
    assert found.missing == ()
    assert Path(write_report(str(bench.out))).read_text().startswith("<!DOCTYPE html>")


@pytest.mark.parametrize("changed", [True, False])
def test_what_no_source_changed_takes_no_part(tmp_path: Path, changed: bool) -> None:
    base = tiny_base(tmp_path / "base")
    untouched = [tiny.QUERY] if changed else tiny.shapes()
    sources = tuple(
        tiny_source(tmp_path / f"source-{i}", base, i * changed, untouched=untouched, scale=0.1)
        for i in (1, 2)
    )
    for i, source in enumerate(sources):  # models with the same bytes would be one source
        (source / "config.json").write_text(json.dumps({"model_type": f"tiny-{i}"}))
    bench = Bench(root=tmp_path, base=base, sources=sources)
    bench.run()
    html = Path(write_report(str(bench.out))).read_text()
    assert ("Spectra and where they were cut" in html) == changed
    assert tiny.QUERY in html


def test_run_writes_the_page_and_leaves_it_where_nothing_was_done(tmp_path: Path) -> None:
    bench = micro_bench(tmp_path)
    command = ["run", str(bench.write_recipe()), "--address", "none", "--json"]
    assert CliRunner().invoke(app, command).exit_code == 0
    written = (bench.out / PAGE).read_bytes()
    assert json.loads(CliRunner().invoke(app, command).stdout)["status"] == "unchanged"
    assert (bench.out / PAGE).read_bytes() == written
    (bench.out / PAGE).unlink()
    done = CliRunner().invoke(app, ["report", str(bench.out), "--json"])
    assert json.loads(done.stdout) == {"report": str(bench.out / PAGE)}
    assert b"All budgets" in (bench.out / PAGE).read_bytes()
    names = ["contributions", "inflation", "overlap", "retained", "spectra-0"]
    pictures = [f"figures/{name}.png" for name in names]
    claimed = json.loads((bench.out / "svdmerge_manifest.json").read_text())["files"]
    assert [name for name in claimed if name.startswith("figures/")] == pictures
    card = (bench.out / "README.md").read_text()
    assert [card.count(f"({path})") for path in pictures] == [1] * 5  # after a second time too
    checks = json.loads(CliRunner().invoke(app, ["verify", str(bench.out), "--json"]).stdout)
    assert not [check for check in checks if check["held"] is False]


def test_what_is_no_output_has_no_report(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="no merged model"):
        gather(Folder.at(tmp_path))


def test_the_grid_holds_the_recipes_budget(bench: Bench) -> None:
    assert 0.2 in grid(bench.plan())
    assert 0.07 in grid(bench.plan(parameters={"k": 0.07}))
    assert grid(bench.plan(parameters={"k": 3})) == [1, 2, 3, 4, 8, 16]


@pytest.mark.parametrize("count", [0, 1, 24, 25, 1000, 10**6])
def test_places_span_a_spectrum(count: int) -> None:
    found = places(count)
    assert len(found) <= 24
    assert found <= set(range(1, count + 1))
    assert {1, count} <= found or count == 0


def test_matrices_that_no_source_changed_have_pictures_too(tmp_path: Path) -> None:
    bench = micro_bench(tmp_path)
    start = numbers(bench.base)
    write_model(bench.sources[0], {n: torch.from_numpy(a) for n, a in start.items()}, None)
    bench.run(models=[str(bench.sources[0])])
    write_report(str(bench.out))
    assert (bench.out / PAGE).stat().st_size > 0
