"""A model's folder may come from anywhere: what it says is checked before anything is built."""

import importlib
import json
import shutil

import pytest
from kind_task import task

from svdmerge.errors import OutputError, TrainingError
from svdmerge.kind import folder, workflow
from svdmerge.kind.recipe import parse_kind_recipe
from svdmerge.storage.filesystem import Folder

LAYER = "backbone.blocks.0.query"
WRAPPER = "svdmerge.training.kind.classifier:build_classifier"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    path = tmp_path_factory.mktemp("folder")
    raw = task(path, steps=1)
    workflow.train(parse_kind_recipe(raw), address="none")
    return path / "model"


def described(trained, tmp_path, change):
    """A copy of the model whose blueprint is changed in place."""
    shutil.copytree(trained, tmp_path / "copy")
    description = json.loads((trained / "kind.json").read_text())
    change(description["blueprint"])
    (tmp_path / "copy" / "kind.json").write_text(json.dumps(description))
    return Folder.at(tmp_path / "copy")


@pytest.mark.parametrize(
    "change",
    [
        lambda b: b.update(config="x"),
        lambda b: b.update(about=3),
        lambda b: b.update(layers=[1]),
        lambda b: b["layers"].update(nowhere=[8, 4, 4]),
        lambda b: b["layers"].update({LAYER: [9, 4, 4]}),
        lambda b: b["layers"].update({LAYER: [20, -4]}),
        lambda b: b["layers"].update({LAYER: [10**13]}),
        lambda b: b["layers"].update({LAYER: [8, 4, 2, 2]}),
        lambda b: b["layers"].update({LAYER: "ab"}),
        lambda b: b["gate"].update(uses=[[5], [0], [1], [1]]),
        lambda b: b["gate"].update(uses=[[-1], [0], [1], [1]]),
        lambda b: b["gate"].update(uses=[[0]]),
        lambda b: b["gate"].update(classes=["0", "0", "2", "3"]),
    ],
)
def test_a_blueprint_that_does_not_fit_its_tensors_is_no_model(trained, tmp_path, change):
    with pytest.raises(OutputError, match="no whole decomposable model"):
        folder.read(described(trained, tmp_path, change))


@pytest.mark.parametrize(
    "change",
    [
        lambda b: b.update(model="builtins:print"),
        lambda b: b["config"].update(backbone="builtins:print"),
        # Ours too, but it would build what its own configuration names.
        lambda b: b["config"].update(
            backbone=WRAPPER, config={"backbone": "builtins:print", "config": {}}
        ),
        lambda b: b.update(model="svdmerge.demo_models:asdict"),
    ],
)
def test_a_folder_chooses_nothing_that_runs_here(trained, tmp_path, change):
    with pytest.raises(OutputError, match="is to be built by"):
        folder.read(described(trained, tmp_path, change))


def test_every_builder_that_a_folder_may_name_exists():
    for place in (*folder.BUILDERS, *folder.WRAPPERS):
        module, _, name = place.partition(":")
        assert callable(getattr(importlib.import_module(module), name))


def test_layers_that_the_architecture_lacks_are_told(trained, tmp_path):
    found = folder.read(described(trained, tmp_path, lambda b: b.update(linear=["backbone.lost"])))
    with pytest.raises(TrainingError, match="lost: is no linear layer"):
        folder.load(found)


def test_a_damaged_example_is_no_model(trained, tmp_path):
    place = described(trained, tmp_path, lambda _: None)
    place.put("example.safetensors", b"xx")
    with pytest.raises(OutputError, match="no whole decomposable model"):
        folder.read(place)
