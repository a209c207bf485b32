"""Many targets on one merged base, in one command."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from tune_case import Case, make_case, write_examples
from typer.testing import CliRunner, Result

from svdmerge.cli import app
from svdmerge.errors import OutputError, RecipeError
from svdmerge.recipe import parse_recipe
from svdmerge.report.run_report import RunReport
from svdmerge.workflow import rank, run

TUNE: dict[str, Any] = {
    "task": "tensor",
    "model": "tiny_backbone:build",
    "input": "x",
    "per_class": 4,
    "num_values": 3,
    "epochs": 1,
    "batch_size": 8,
}


@pytest.fixture
def case(tmp_path: Path) -> Case:
    made = make_case(tmp_path)
    shutil.rmtree(tmp_path / "merged")
    return made


def raw(case: Case, names: list[Any], **tune: Any) -> dict[str, Any]:
    """A recipe whose targets' examples lie in files of their names."""
    for number, name in enumerate(n if isinstance(n, str) else n["name"] for n in names):
        for seed, part in ((number, "train"), (100 + number, "test")):
            path = case.root / f"{name}-{part}.parquet"
            if not path.exists():
                write_examples(path, per_class=5, seed=seed)
    places = {p: str(case.root / f"{{name}}-{p}.parquet") for p in ("train", "test")}
    return {
        "base_model": case.base.reference,
        "models": case.models,
        "parameters": {"k": 3},
        "store": str(case.root / "store"),
        "out": str(case.root / "merged"),
        "resources": {"memory": "100MiB"},
        "tune": TUNE | places | tune | {"targets": names},
    }


def tuned(case: Case, names: list[Any], *, address: str = "none", **tune: Any) -> RunReport:
    return run(parse_recipe(raw(case, names, **tune)), address=address)


def svdmerge(case: Case, recipe: dict[str, Any], *arguments: str) -> Result:
    path = case.root / "recipe.yml"
    path.write_text(yaml.safe_dump(recipe))
    return CliRunner().invoke(app, ["run", str(path), "--address", "none", *arguments])


def test_twenty_targets_tune_in_one_command_into_a_folder_each(case: Case) -> None:
    names = [f"target-{i:02}" for i in range(20)]
    done = svdmerge(case, raw(case, names), "--json")
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)["tune"]["targets"]
    assert [t["name"] for t in found] == names
    assert len({tuple(r["accuracy"] for r in t["result"]["rows"]) for t in found}) > 1
    for target in found:
        out = case.root / "merged-tuned" / target["name"]
        assert {p.name for p in out.iterdir()} >= {"adapter.safetensors", "head.safetensors"}
        assert not (out / "model.safetensors").exists()
        assert 0 < target["adapter_bytes"] == (out / "adapter.safetensors").stat().st_size
    assert json.loads((case.root / "merged-tuned" / "targets.json").read_text())["targets"] == found


def test_the_table_has_a_row_for_each_target(case: Case) -> None:
    done = svdmerge(case, raw(case, ["mr", "cr"]))
    shown = done.stdout.partition("Accuracy on the targets' test examples")[2].splitlines()[1:4]
    header, *rows = [line.split() for line in shown]
    assert header == ["target", "base", "best", "source", "merged", "tuned", "adapter"]
    assert [row[0] for row in rows] == ["mr", "cr"]
    assert all(len(row) == 7 and row[-1] == "B" for row in rows)


def test_a_target_that_fails_is_named_and_the_others_are_tuned(case: Case) -> None:
    recipe = raw(case, ["mr", "bad", "cr"])
    (case.root / "bad-train.parquet").write_bytes(b"no parquet")
    done = svdmerge(case, recipe)
    assert done.exit_code == 1
    assert "failed: 1 of 3 targets: bad" in done.stdout
    assert (case.root / "merged-tuned" / "cr" / "adapter.safetensors").exists()
    # Its cause gone, the same command finishes what is left.
    shutil.copy(case.root / "mr-train.parquet", case.root / "bad-train.parquet")
    report = run(parse_recipe(recipe), address="none")
    assert [t.skipped for t in report.tune.targets] == [True, False, True]
    assert not report.tune.failed


def test_a_finished_target_is_tuned_again_if_its_data_settings_or_files_change(case: Case) -> None:
    first = tuned(case, ["mr", "cr", "trec"])
    write_examples(case.root / "mr-test.parquet", per_class=6, seed=77)
    (case.root / "merged-tuned" / "trec" / "adapter.safetensors").unlink()
    second = tuned(case, ["mr", "cr", "trec"])
    assert [t.skipped for t in second.tune.targets] == [False, True, False]
    assert second.tune.targets[1].result == first.tune.targets[1].result
    third = tuned(case, ["mr", {"name": "cr", "epochs": 2}, "trec"])
    assert [t.skipped for t in third.tune.targets] == [True, False, True]


def test_a_target_may_have_settings_and_a_place_of_its_own(case: Case) -> None:
    own = {"name": "cr", "epochs": 2, "save": ["model"], "out": str(case.root / "{name}-out")}
    report = tuned(case, ["mr", own], out=str(case.root / "all"))
    assert [len(t.result.curve) for t in report.tune.targets] == [1, 2]
    assert (case.root / "all" / "mr" / "adapter.safetensors").exists()
    assert (case.root / "cr-out" / "model.safetensors").exists()
    assert report.tune.targets[1].adapter_bytes == 0


def test_ranking_for_many_targets_needs_the_examples_of_one(case: Case) -> None:
    with pytest.raises(RecipeError, match="needs the target's examples"):
        rank(parse_recipe(raw(case, ["mr"])), address="none")


def test_two_targets_in_one_folder_are_refused(case: Case) -> None:
    own = [{"name": name, "out": str(case.root / "same")} for name in ("mr", "cr")]
    with pytest.raises(OutputError, match="is the folder of two targets, mr and cr"):
        tuned(case, own)


def test_targets_are_not_put_into_a_tuned_model(case: Case) -> None:
    (case.root / "merged-tuned").mkdir()
    (case.root / "merged-tuned" / "tune.json").write_text("{}")
    with pytest.raises(OutputError, match="holds the tuned model of one target"):
        tuned(case, ["mr"])


@pytest.mark.usefixtures("ray_session")
def test_on_ray_each_target_is_a_task_and_the_numbers_are_the_same(case: Case) -> None:
    recipe = raw(case, ["mr", "bad", "cr"])
    (case.root / "bad-train.parquet").write_bytes(b"no parquet")
    report = run(parse_recipe(recipe), address="local")
    assert report.tune.failed == ("bad",)
    assert report.status == "failed: 1 of 3 targets: bad"
    shutil.rmtree(case.root / "merged-tuned")
    shutil.rmtree(case.root / "store")
    alone = run(parse_recipe(recipe), address="none")
    for name in ("mr", "cr"):
        accuracies = [
            [r.accuracy for r in t.result.rows]
            for found in (report, alone)
            for t in found.tune.targets
            if t.name == name
        ]
        assert accuracies[0] == accuracies[1]
