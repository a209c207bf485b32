"""Train, split, recombine, transfer: from one configuration, without Ray."""

import json
import shutil

import pytest
import torch
from kind_task import section, task

from svdmerge.core.kind.gate import gated
from svdmerge.core.kind.replace import layers_of
from svdmerge.errors import OutputError, RecipeError
from svdmerge.kind import folder, workflow
from svdmerge.kind.recipe import parse_kind_recipe
from svdmerge.storage.filesystem import Folder
from svdmerge.storage.maintenance import verify

CLASSES = ("0", "1", "2", "3")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    path = tmp_path_factory.mktemp("kind")
    raw = task(path)
    return path, raw, workflow.train(parse_kind_recipe(raw), address="none")


def model_in(path):
    return folder.load(folder.read(Folder.at(path)))


def outputs(model, path, name):
    with torch.no_grad(), gated(model, name):
        return folder.called(model, folder.read(Folder.at(path)).example)


def test_training_learns_the_labels_of_each_superclass_and_writes_a_model_that_loads(trained):
    path, _, result = trained
    assert result.test_accuracy == 1.0
    assert result.curve[0]["loss"] > result.curve[-2]["loss"]
    assert outputs(model_in(path / "model"), path / "model", "3").shape == (8, 4)


def test_the_same_command_again_trains_nothing(trained):
    _, raw, result = trained
    again = workflow.train(parse_kind_recipe(raw), address="none")
    assert again.curve == result.curve
    assert again.seconds == result.seconds


def test_split_and_recombined_with_all_classes_a_model_is_what_was_trained(trained):
    path, raw, _ = trained
    recipe = parse_kind_recipe(raw | {"recombine": {"classes": CLASSES, "out": str(path / "all")}})
    workflow.split(recipe, address="none")
    assert verify(Folder.at(path / "store")) == []
    result = workflow.recombine(recipe)
    assert result.gated
    assert result.max_difference <= 1e-5
    full, again = model_in(path / "model"), model_in(path / "all")
    for name in CLASSES:
        a, b = outputs(full, path / "model", name), outputs(again, path / "all", name)
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


def test_a_model_for_one_superclass_is_smaller_dense_where_that_pays_and_gives_the_same(trained):
    path, raw, _ = trained
    result = workflow.recombine(parse_kind_recipe(raw))
    assert result.classes == ("0", "2")
    assert not result.gated
    assert result.recombined.parameters < result.full.parameters
    assert result.recombined.flops < result.full.flops
    assert result.max_difference <= 1e-5
    full, small = model_in(path / "model"), model_in(path / "recombined")
    for name in ("0", "2"):
        expected = outputs(full, path / "model", name)
        # It needs no class: the same within a gate and outside.
        torch.testing.assert_close(
            outputs(small, path / "model", name), expected, atol=1e-5, rtol=0
        )
        plain = folder.called(small, folder.read(Folder.at(path / "model")).example)
        torch.testing.assert_close(plain, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("unit", ["parameters", "bytes", "flops"])
def test_a_budget_bounds_what_is_kept(trained, unit):
    path, raw, _ = trained
    limit = {"parameters": 3000, "bytes": 12000, "flops": 6000}[unit]
    wanted = {"classes": CLASSES, "budget": {unit: limit}, "out": str(path / unit)}
    result = workflow.recombine(parse_kind_recipe(raw | {"recombine": wanted}))
    assert result.tailors_dropped > 0
    layers = layers_of(model_in(path / unit)).values()
    own = sum(p.numel() for x in layers for name, p in x.named_parameters() if name != "bias")
    total = result.recombined.parameters
    assert {"parameters": total, "bytes": 4 * total, "flops": 2 * own}[unit] <= limit


def test_a_recombined_model_can_be_recombined_again(trained):
    path, raw, _ = trained
    expected = outputs(model_in(path / "model"), path / "model", "0")
    # Of two classes of one superclass no gate is left; of two superclasses some layers have it.
    for source, first, classes in (
        ("alike", ["0", "2"], ["0"]),
        ("pair", ["0", "1"], ["0", "1"]),
    ):
        first = {"classes": first, "out": str(path / source)}
        workflow.recombine(parse_kind_recipe(raw | {"recombine": first}))
        again = {"classes": classes, "out": str(path / f"{source}-again")}
        wanted = raw | {"model": str(path / source), "recombine": again}
        result = workflow.recombine(parse_kind_recipe(wanted))
        assert result.gated == (source == "pair")
        found = outputs(model_in(path / f"{source}-again"), path / "model", "0")
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
        was, now = (folder.read(Folder.at(p)).blueprint for p in (path / source, again["out"]))
        assert (was.layers, was.based, set(was.linear)) == (now.layers, now.based, set(now.linear))


def test_transfer_keeps_learngenes_and_trains_tailors_beside_them(trained):
    path, raw, _ = trained
    result = workflow.transfer(parse_kind_recipe(raw), address="none")
    old, new = layers_of(model_in(path / "model")), layers_of(model_in(path / "transferred"))
    for name, layer in new.items():
        count = layer.sizes[0]
        assert torch.equal(layer.u[:, :count], old[name].u[:, :count])
        assert torch.equal(layer.vh[:count], old[name].vh[:count])
        assert len(layer.s[count:].unique()) > 1  # they started equal
    assert result.num_trained < result.num_parameters
    assert result.test_accuracy > 0.9


def test_transfer_with_nothing_frozen_moves_learngenes_too(trained):
    path, raw, _ = trained
    wanted = raw["transfer"] | {"freeze": "nothing", "out": str(path / "free"), "steps": 2}
    result = workflow.transfer(parse_kind_recipe(raw | {"transfer": wanted}), address="none")
    old, new = layers_of(model_in(path / "model")), layers_of(model_in(path / "free"))
    assert all(not torch.equal(x.u[:, :8], old[name].u[:, :8]) for name, x in new.items())
    assert result.num_trained == result.num_parameters


def test_as_many_new_labels_as_before_get_a_new_head(trained):
    path, raw, _ = trained
    own = {"groups": {"all": [0, 1, 2, 3]}, "seed": 5, "steps": 1, "out": str(path / "as-many")}
    wanted = section(path, **own, learning_rate=1e-9)
    workflow.transfer(parse_kind_recipe(raw | {"transfer": wanted}), address="none")
    old, new = (folder.read(Folder.at(path / p)).state for p in ("model", "as-many"))
    assert old["head.weight"].shape == new["head.weight"].shape
    assert (old["head.weight"] - new["head.weight"]).abs().max() > 0.1
    frozen = "backbone.patch_embed.weight"
    assert torch.equal(old[frozen], new[frozen])
    wanted |= {"learning_rate": 0.1, "out": str(path / "as-many-moved")}
    workflow.transfer(parse_kind_recipe(raw | {"transfer": wanted}), address="none")
    moved = folder.read(Folder.at(path / "as-many-moved")).state
    assert (moved["head.weight"] - new["head.weight"]).abs().min() > 0.01  # it trains


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"groups": {"even": [0, 2], "odd": [1]}}, "label 3"),
        ({"groups": {"even": [0, 2], "odd": [1, 5]}}, "class '3': has no tailors"),
        ({"groups": {"even": [0, 2, 1, 3], "odd": []}}, "'odd': is empty"),
        ({"groups": {"a": [0], "b": [1], "c": [2], "d": [3]}}, "no two labels use the same"),
        ({"groups": {"a": ["x", "y"]}}, "'x' is no label"),
        ({"learngenes": 9}, "9 learngenes and 8 tailors"),
        ({"tailors": 1}, "1 tailors for 2 groups"),
    ],
)
def test_what_does_not_fit_is_told_before_training(trained, tmp_path, change, told):
    path, raw, _ = trained
    bad = raw | {"train": section(path, **change), "model": str(tmp_path / "model")}
    with pytest.raises(RecipeError, match=told):
        workflow.train(parse_kind_recipe(bad), address="none")
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    ("wanted", "told"),
    [
        ({"classes": ["7"]}, "'7': unknown to the gate"),
        ({"classes": ["0"], "budget": {"parameters": 2300}}, "Raise it to 2,420 at least"),
        ({"classes": ["0"], "budget": {"bytes": 10}}, "biases and heads alone 2,448"),
        ({"classes": ["0"], "budget": {"flops": 3615}}, "3,615 flops\nLearngenes alone take 3,616"),
        ({"classes": ["9"], "budget": {"flops": 1}}, "'9': unknown to the gate"),
        ({"classes": ["0"], "out": "{model}"}, "is `model`"),
    ],
)
def test_a_recombination_that_cannot_be_is_told(trained, tmp_path, wanted, told):
    _, raw, _ = trained
    out = wanted.get("out", str(tmp_path / "out")).replace("{model}", raw["model"])
    bad = raw | {"recombine": wanted | {"out": out}}
    with pytest.raises(RecipeError, match=told):
        workflow.recombine(parse_kind_recipe(bad))


def test_learngenes_go_only_where_they_fit(trained, tmp_path):
    _, raw, _ = trained
    wanted = raw["transfer"] | {"learngenes": 6, "out": str(tmp_path / "out")}
    with pytest.raises(RecipeError, match="6 learngenes of a"):
        workflow.transfer(parse_kind_recipe(raw | {"transfer": wanted}), address="none")


def test_a_foreign_folder_is_never_replaced_and_a_damaged_model_never_read(trained, tmp_path):
    path, raw, _ = trained
    (tmp_path / "letters.txt").write_text("dear")
    foreign = raw | {"model": str(tmp_path)}
    with pytest.raises(OutputError, match="holds something else"):
        workflow.train(parse_kind_recipe(foreign), address="none")
    with pytest.raises(OutputError, match="no whole decomposable model"):
        workflow.split(parse_kind_recipe(foreign), address="none")
    shutil.copytree(path / "model", tmp_path / "copy")
    weights = tmp_path / "copy" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\1")
    with pytest.raises(OutputError, match="content changed"):
        workflow.split(parse_kind_recipe(raw | {"model": str(tmp_path / "copy")}), address="none")


@pytest.mark.parametrize("place", ["model", "backbone"])
def test_a_folder_does_not_choose_what_code_runs(trained, tmp_path, place):
    path, raw, _ = trained
    shutil.copytree(path / "model", tmp_path / "copy")
    description = json.loads((tmp_path / "copy" / "kind.json").read_text())
    blueprint = description["blueprint"]
    (blueprint if place == "model" else blueprint["config"])[place] = "subprocess:Popen"
    (tmp_path / "copy" / "kind.json").write_text(json.dumps(description))
    with pytest.raises(OutputError, match="built by subprocess:Popen"):
        workflow.split(parse_kind_recipe(raw | {"model": str(tmp_path / "copy")}), address="none")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"modell": "x"}, "unknown key; the nearest is `model`"),
        (
            {"recombine": {"clases": ["a"]}},
            "recombine.clases: unknown key; the nearest is `classes`",
        ),
        ({"recombine": {"classes": ["a"], "budget": {}}}, "expected one of parameters, bytes"),
        ({"train": {"base_model": "x", "train": "a", "test": "b", "groups": {}}}, "groups"),
    ],
)
def test_a_configuration_with_a_fault_is_refused(change, told):
    with pytest.raises(RecipeError, match=told):
        parse_kind_recipe(change)


def test_a_missing_section_is_told():
    for work in (workflow.train, workflow.transfer):
        with pytest.raises(RecipeError, match="has no `t"):
            work(parse_kind_recipe({}), address="none")
    with pytest.raises(RecipeError, match="has no `recombine` section"):
        workflow.recombine(parse_kind_recipe({}))


def test_results_are_plain_values(trained):
    assert json.loads(json.dumps(trained[2].to_json()))["steps"] == 25
