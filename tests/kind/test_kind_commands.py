"""The commands as a terminal gives them: exit codes, purity of --json, hostile configurations."""

import json

import pytest
import yaml
from kind_task import section, task
from typer.testing import CliRunner

from svdmerge.cli import app
from svdmerge.errors import OutputError
from svdmerge.kind import demo
from svdmerge.kind.demo import run_demo


def kind(*arguments):
    return CliRunner().invoke(app, ["kind", *map(str, arguments)])


def configured(folder, raw):
    (folder / "kind.yml").write_text(raw if isinstance(raw, str) else yaml.safe_dump(raw))
    return folder / "kind.yml"


def test_every_command_prints_one_result_and_nothing_else(tmp_path):
    config = configured(tmp_path, task(tmp_path, steps=2))
    found = {}
    for command in ("train", "split", "recombine", "transfer"):
        where = [] if command == "recombine" else ["--address", "none"]
        result = kind(command, config, *where, "--json")
        assert result.exit_code == 0, result.output
        found[command] = json.loads(result.stdout)
    assert found["train"]["steps"] == 2
    assert found["split"]["num_layers"] == 6
    assert found["recombine"]["classes"] == ["0", "2"]
    assert found["transfer"]["num_trained"] < found["transfer"]["num_parameters"]


BASE = {"base_model": "b", "train": "t", "test": "t"}


@pytest.mark.parametrize(
    ("raw", "told"),
    [
        ({"recombine": {"classes": ["0"], "budget": {"parameters": "infM"}}}, "a count such as 2M"),
        ({"recombine": {"classes": ["0"], "budget": {"bytes": None}}}, "expected one of"),
        ({"train": BASE | {"groups": {"a": {1: [0]}}}}, "/a: got 1 as a group's name"),
        ({"train": BASE | {"groups": {"a/b": [0], "a": {"b": [1]}}}}, "text without /"),
        ({"train": BASE | {"groups": {"a": [0]}, "seed": 2**70}}, "train.seed"),
        (
            "train: {base_model: b, train: t, test: t, groups: &a {x: *a}}",
            "or one that holds itself",
        ),
    ],
)
def test_a_hostile_configuration_is_wrong_usage(tmp_path, raw, told):
    result = kind("train", configured(tmp_path, raw))
    assert result.exit_code == 2, result.exception
    assert told in " ".join(result.stderr.split())


@pytest.mark.parametrize(
    ("labels", "told"),
    [
        (["²"], "'²' is no label"),
        ([0, "01", 1, 2, 3], "'01' is no label"),
        ([0, 1, 2, 3, 10**14], "class '4': has no tailors"),
    ],
)
def test_labels_that_are_none_are_told(tmp_path, labels, told):
    raw = task(tmp_path) | {"train": section(tmp_path, groups={"all": labels})}
    result = kind("train", configured(tmp_path, raw), "--address", "none")
    assert result.exit_code == 2, result.exception
    assert told in " ".join(result.stderr.split())


def test_only_a_librarys_sources_are_on_together(tmp_path):
    config = configured(tmp_path, {"recombine": {"classes": ["0"], "together": True}})
    result = kind("recombine", config)
    assert result.exit_code == 2
    assert "there is no `library`" in result.stderr


def test_a_model_is_not_replaced_by_what_its_learngenes_become(tmp_path):
    draw = {"train": "t", "classes": {"a": 0}, "learngenes_of": f"{tmp_path}/model/"}
    config = configured(tmp_path, {"model": str(tmp_path / "model"), "draw": draw})
    result = kind("train", config, "--address", "none")
    assert result.exit_code == 2
    assert "is `model`" in result.stderr


def test_the_demo_trains_splits_recombines_and_transfers_in_a_folder_of_its_own(
    tmp_path, monkeypatch
):
    (tmp_path / "mine" / "base").mkdir(parents=True)
    (tmp_path / "mine" / "base" / "model.safetensors").write_text("precious")
    with pytest.raises(OutputError, match="holds something else"):
        run_demo(tmp_path / "mine", address="none")
    assert (tmp_path / "mine" / "base" / "model.safetensors").read_text() == "precious"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "STEPS", {"old": 40, "new": 20})
    found = run_demo(type(tmp_path)("demo"), address="none")
    assert found.trained.test_accuracy > 0.8
    assert found.recombined.max_difference <= 1e-5
    assert found.recombined.recombined.parameters < found.recombined.full.parameters
    assert found.transferred.test_accuracy > 0.6
    again = run_demo(tmp_path / "demo", address="none")
    assert again.trained.seconds == found.trained.seconds  # nothing was trained twice
