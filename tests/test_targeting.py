"""Ranking sources for a target, and the merge its examples ask for, from recipe to output."""

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from merging import Bench, inventory_of, weights
from safetensors.torch import load_file
from targeted import INPUTS, TinyNet, target_bench, targeted, tune_section, warnings, write_examples
from typer.testing import CliRunner, Result

from svdmerge import targeting
from svdmerge.cli import app
from svdmerge.engine.plan import Plan
from svdmerge.engine.runtime import InProcess
from svdmerge.errors import RecipeError
from svdmerge.progress import SILENT
from svdmerge.recipe import parse_recipe
from svdmerge.report.run_report import RunReport
from svdmerge.storage.checkpoint import open_checkpoint
from svdmerge.storage.hf_model import PROVENANCE
from svdmerge.targeting import Adaptation, Ranking
from svdmerge.training import judge as judging
from svdmerge.training.backbone import build_backbone, load_weights
from svdmerge.training.blend import Blend, differences
from svdmerge.training.objective import objective_of
from svdmerge.verify import verify
from svdmerge.workflow import Run, rank, run_stage

MERGE_ONLY = {"parameters": {"k": "100%", "salience": "target", "scale": "auto"}}


def merged(bench: Bench, **changes: Any) -> RunReport:
    """All stages up to the merge."""
    recipe = bench.recipe(**(targeted(bench) | changes))
    work = Run(recipe, runtime=InProcess(), progress=SILENT)

    def stages() -> None:
        work.decompose()
        work.assemble(work.select())

    return work.attempt(stages)


def ranked(bench: Bench, **changes: Any) -> Ranking:
    return rank(bench.recipe(**(targeted(bench) | changes)), address="none")


def adaptation(report: RunReport) -> Adaptation:
    assert report.adaptation is not None
    return report.adaptation


def names(bench: Bench, found: Adaptation) -> set[str]:
    of = {s.revision: Path(s.reference).name for s in bench.plan(**targeted(bench)).sources}
    return {of[revision] for revision in found.chosen.weights}


def svdmerge(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments])


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return target_bench(tmp_path / "bench")


@pytest.fixture
def twins(tmp_path: Path) -> Bench:
    return target_bench(tmp_path / "bench", copy=True)


@pytest.fixture
def helpless(tmp_path: Path) -> Bench:
    return target_bench(tmp_path / "bench", help_too=False)


# --- ranking ---


def test_the_source_that_helps_is_first_and_its_interval_is_above_zero(bench: Bench) -> None:
    found = ranked(bench)
    best, *others = found.sources
    assert Path(best.name).name == "helper"
    assert 0 < best.low <= best.gain <= best.high
    assert best.gain == pytest.approx(found.base_loss - best.loss)
    assert all(s.low <= 0 for s in others)
    assert found.num_examples == 60
    assert "1 of 3 sources help" in found.verdict


def test_where_none_helps_the_ranking_says_so(helpless: Bench) -> None:
    found = ranked(helpless)
    assert found.verdict.startswith("None helps")
    assert all(s.high < 0 for s in found.sources)


def test_examples_that_tell_nothing_are_said_to(bench: Bench) -> None:
    rows = pq.read_table(bench.root / "train.parquet")
    pq.write_table(rows.slice(0, 3), bench.root / "one-each.parquet")  # no class is left without it
    section = tune_section(bench.root, train=str(bench.root / "one-each.parquet"))
    found = ranked(bench, tune=section, parameters={"k": "100%"})
    assert [s.gain for s in found.sources] == [0.0] * 3
    assert not any(s.sure for s in found.sources)
    assert found.verdict.startswith("The examples tell nothing")


def test_a_near_copy_of_a_source_is_found_and_unrelated_ones_are_not(twins: Bench) -> None:
    ((a, b, cosine),) = ranked(twins).near_duplicates
    assert {Path(a).name, Path(b).name} == {"copy", "helper"}
    assert cosine == pytest.approx(1.0, abs=1e-4)


def test_a_second_ranking_computes_nothing_and_says_the_same(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = ranked(bench)

    def never(*arguments: object, **more: object) -> None:
        raise AssertionError("computed again")

    monkeypatch.setattr(judging, "build_backbone", never)
    assert ranked(bench) == first


def test_a_ranking_does_not_depend_on_the_order_of_sources(bench: Bench) -> None:
    first = ranked(bench)
    again = ranked(bench, models=[str(s) for s in reversed(bench.sources)])
    assert again.sources == first.sources
    assert again.verdict == first.verdict


def test_ranking_writes_no_output(bench: Bench) -> None:
    ranked(bench)
    assert not bench.out.exists()


def test_examples_on_the_command_line_take_the_place_of_the_recipes(
    bench: Bench, tmp_path: Path
) -> None:
    other = write_examples(tmp_path / "other.parquet", per_class=7, seed=5)
    found = rank(bench.recipe(**targeted(bench)), examples=str(other), address="none")
    assert found.num_examples == 21


@pytest.mark.parametrize(
    ("losses", "considered"), [((0.0, 2.0), set[str]()), ((0.0, 0.0), {"noise-2", "noise-3"})]
)
def test_a_source_of_noise_alone_is_told_and_considered_only_where_its_help_is_sure(
    losses: tuple[float, ...],
    considered: set[str],
    bench: Bench,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = ranked(bench)
    noise = {s.revision: Path(s.name).name for s in found.sources if s.noise}
    assert set(noise.values()) == {"noise-2", "noise-3"}

    def flattered(unit: judging.JudgeUnit) -> judging.Judged:
        judged = judging.judge(unit)
        if "noise-" not in unit.name:
            return judged
        told = tuple(losses[i % 2] for i in range(len(judged.losses[0])))
        return replace(judged, losses=(told,))

    monkeypatch.setattr(targeting, "judge", flattered)
    report = merged(bench, **MERGE_ONLY)
    mixed = {s for c in adaptation(report).considered for s in c.mix.weights}
    assert {noise[s] for s in mixed & set(noise)} == considered


def test_the_command_shows_a_table_and_the_verdict(bench: Bench) -> None:
    done = svdmerge("rank", bench.write_recipe(**targeted(bench)), "--address", "none")
    assert done.exit_code == 0, done.stderr
    for told in ("helper", "noise-2", "95 % interval", "1 of 3 sources help"):
        assert told in done.output


def test_the_command_gives_the_ranking_as_json(twins: Bench) -> None:
    recipe = twins.write_recipe(**targeted(twins))
    done = svdmerge("rank", recipe, "--address", "none", "--json")
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)
    assert found == json.loads(json.dumps(asdict(ranked(twins))))


def test_ranking_without_examples_is_a_clear_error(bench: Bench) -> None:
    done = svdmerge("rank", bench.write_recipe(), "--address", "none")
    assert done.exit_code != 0
    assert "--examples" in done.stderr
    assert "Traceback" not in done.stderr


def test_examples_that_are_not_there_are_a_clear_error(bench: Bench) -> None:
    recipe = bench.write_recipe(tune=tune_section(bench.root))
    done = svdmerge("rank", recipe, "--address", "none", "--examples", bench.root / "no.parquet")
    assert done.exit_code != 0
    assert "no.parquet" in done.stderr
    assert "Traceback" not in done.stderr


def test_examples_of_another_width_are_told_in_three_lines(bench: Bench) -> None:
    narrow = bench.root / "narrow.parquet"
    table = pa.table({"x": [[1.0, 2.0]] * 6, "label": [0, 1, 2] * 2})
    pq.write_table(table, narrow)
    recipe = bench.write_recipe(tune=tune_section(bench.root))
    done = svdmerge("rank", recipe, "--address", "none", "--examples", narrow)
    assert done.exit_code == 1
    told = [line for line in done.stderr.splitlines() if ": " in line and " done" not in line]
    assert told[0] == "error: the backbone fails on inputs [6, 2]"
    assert "Traceback" not in done.stderr


def blended(plan: Plan) -> Blend:
    inventory = inventory_of(plan)
    return targeting.blend_of(plan, inventory, runtime=InProcess(), progress=SILENT)


def test_a_source_that_changes_a_matrix_by_less_than_its_rank_is_judged_whole(
    bench: Bench,
) -> None:
    plan = bench.plan(**targeted(bench))
    ranked(bench)
    helper = next(s for s in plan.sources if s.reference.endswith("helper"))
    whole = targeting.gated(plan, {helper.revision: 1.0}, total=1.0)
    blend = blended(whole)
    found = differences(blend, base=plan.base)
    base, source = (load_file(f / "model.safetensors") for f in (bench.base, helper_of(bench)))
    expected = source["encoder.0.weight"] - base["encoder.0.weight"]
    torch.testing.assert_close(found["encoder.0.weight"], expected, atol=1e-5, rtol=0)
    for name in set(found) - {"encoder.0.weight"}:
        assert not found[name].any()


def helper_of(bench: Bench) -> Path:
    return next(s for s in bench.sources if s.name == "helper")


# --- the merge that examples ask for ---


def test_the_best_source_among_noise_is_merged_alone(bench: Bench) -> None:
    report = merged(bench)
    assert names(bench, adaptation(report)) == {"helper"}
    base, source, out = (
        load_file(f / "model.safetensors") for f in (bench.base, helper_of(bench), bench.out)
    )
    for name in base:
        torch.testing.assert_close(out[name], source[name], atol=1e-5, rtol=0)
    assert warnings(report) == []


def test_provenance_holds_no_source_that_does_not_help(bench: Bench) -> None:
    merged(bench)
    table = pq.read_table(bench.out / PROVENANCE)
    used = zip(table["model"].to_pylist(), table["weight"].to_pylist(), strict=True)
    weighed = {Path(model).name: weight for model, weight in used}
    assert {model for model, weight in weighed.items() if weight != 0} == {"helper"}


@pytest.mark.parametrize("k", ["100%", "10%"])
def test_the_merged_model_is_the_blend_that_was_judged(twins: Bench, k: str) -> None:
    recipe = targeted(twins)
    recipe["parameters"] |= {"k": k}
    found = adaptation(merged(twins, **recipe))
    assert found.chosen.shares
    plan = twins.plan(**recipe)
    parts = targeting.gated(plan, dict(found.chosen.shares), total=1.0)
    blend = blended(parts)
    changes = differences(blend, base=plan.base)
    state = load_file(twins.base / "model.safetensors")
    judged, written = TinyNet({}), TinyNet({})
    judged.load_state_dict(
        {n: t + found.chosen.total * changes.get(n, torch.zeros(())) for n, t in state.items()}
    )
    written.load_state_dict(load_file(twins.out / "model.safetensors"))
    inputs = torch.randn(30, INPUTS, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(written(inputs), judged(inputs), atol=1e-5, rtol=0)


def test_the_outputs_held_out_loss_is_the_one_the_choice_was_made_by(twins: Bench) -> None:
    found = adaptation(merged(twins))
    config = twins.recipe(**targeted(twins)).tune
    assert config is not None
    base = open_checkpoint(str(twins.base))
    backbone = build_backbone(config, base=base)
    load_weights(backbone, checkpoint=open_checkpoint(str(twins.out)), base=base)
    examples = judging.judged_examples(config, base=base)
    losses = judging.example_losses(backbone, examples, objective=objective_of(config))
    told = next(c for c in found.considered if c.mix == found.chosen)
    assert float(losses.mean()) == pytest.approx(told.loss, abs=1e-5)
    assert told.error == 0.0
    [nothing] = [c for c in found.considered if not c.mix.shares]
    assert nothing.error
    margin = f"{nothing.loss - told.loss:.4f} below the base's, standard error {nothing.error:.4f}"
    assert margin in found.verdict


def test_verify_holds_on_what_examples_chose(bench: Bench) -> None:
    merged(bench)
    assert [c for c in verify(str(bench.out)) if c.held is False] == []


def test_where_no_source_helps_the_base_is_kept_with_a_warning(helpless: Bench) -> None:
    report = merged(helpless)
    assert adaptation(report).chosen.shares == ()
    out, base = (load_file(f / "model.safetensors") for f in (helpless.out, helpless.base))
    assert {n: t.numpy().tobytes() for n, t in out.items()} == {
        n: t.numpy().tobytes() for n, t in base.items()
    }
    assert ["No source helps" in told for told in warnings(report)] == [True]
    assert [c for c in verify(str(helpless.out)) if c.held is False] == []


def test_a_second_run_takes_the_stored_choice(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = merged(bench)
    kept = weights(bench.out)
    shutil.rmtree(bench.out)

    def never(*arguments: object, **more: object) -> None:
        raise AssertionError("adapted again")

    monkeypatch.setattr(targeting.Targeting, "__init__", never)
    again = merged(bench)
    assert again.adaptation == first.adaptation
    assert weights(bench.out) == kept
    assert not {"rank", "adapt"} & {s.name for s in again.stages}


def test_the_stages_one_by_one_make_the_same_model(bench: Bench, tmp_path: Path) -> None:
    merged(bench)
    recipe = bench.recipe(**targeted(bench), store=str(tmp_path / "s"), out=str(tmp_path / "o"))
    for stage in ("decompose", "select", "assemble"):
        run_stage(recipe, stage, address="none")
    assert weights(tmp_path / "o") == weights(bench.out)


def test_a_source_listed_in_another_place_gives_the_same_bytes(
    twins: Bench, tmp_path: Path
) -> None:
    merged(twins)
    others = {"models": list(reversed(twins.raw()["models"])), "out": str(tmp_path / "o")}
    merged(twins, **others)
    assert weights(tmp_path / "o") == weights(twins.out)


def test_other_examples_make_another_plan(bench: Bench) -> None:
    before = bench.plan(**targeted(bench)).hash
    assert bench.plan(**targeted(bench)).hash == before
    write_examples(bench.root / "train.parquet", per_class=20, seed=8)
    assert bench.plan(**targeted(bench)).hash != before


def test_training_settings_make_no_other_merge(bench: Bench) -> None:
    before = bench.plan(**targeted(bench)).hash
    assert bench.plan(**targeted(bench, epochs=7)).hash == before
    assert bench.plan(**targeted(bench, per_class=5)).hash != before


def test_an_untargeted_plan_does_not_depend_on_examples(bench: Bench) -> None:
    section = {"tune": tune_section(bench.root)}
    before = bench.plan(**section).hash
    write_examples(bench.root / "train.parquet", per_class=20, seed=8)
    assert bench.plan(**section).hash == before


def test_an_adaptation_survives_being_stored(bench: Bench) -> None:
    found = adaptation(merged(bench))
    assert Adaptation.from_json(found.to_json()) == found


def test_the_report_holds_ranking_and_choice_as_json(bench: Bench) -> None:
    report = json.loads(merged(bench).to_json())
    assert report["adaptation"]["verdict"]
    assert len(report["ranking"]["sources"]) == 3


@pytest.mark.parametrize(
    "parameters", [{"k": "50%", "salience": "target"}, {"k": "50%", "scale": "auto"}]
)
@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({}, "add a `tune` section"),
        ({"merge_method": "task_arithmetic"}, "task_arithmetic"),
        ({"tune": {"targets": ["a", "b"], "train": "{name}.csv", "test": "{name}2.csv"}}, "one"),
    ],
)
def test_a_recipe_that_cannot_be_targeted_is_refused(
    bench: Bench, parameters: dict[str, Any], changes: dict[str, Any], told: str
) -> None:
    if "merge_method" in changes:
        changes = changes | {"tune": tune_section(bench.root)}
        parameters = {k: v for k, v in parameters.items() if k != "k"}
    with pytest.raises(RecipeError, match=told):
        parse_recipe(bench.raw(parameters=parameters, **changes))


def test_a_whole_run_tunes_what_was_merged(bench: Bench) -> None:
    report = bench.run(**targeted(bench))
    assert report.status == "done"
    assert report.tune is not None
    again = bench.run(**targeted(bench))
    assert again.status == "unchanged"
    assert again.adaptation == report.adaptation


def test_a_run_that_changes_nothing_still_tells_that_no_source_helps(helpless: Bench) -> None:
    first, again = (helpless.run(**targeted(helpless)) for _ in range(2))
    assert (first.status, again.status) == ("done", "unchanged")
    assert again.warnings == warnings(first)
    assert any("No source helps" in warning for warning in again.warnings)
