"""Bad input: an error that names what was got, what was expected and what to do.

Faults of recipes and headers are told before Ray starts and before anything is written; faults of
content at first read, with nothing published.
"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import yaml
from merging import Bench, command, micro_bench, micro_model, outcome, tree
from typer.testing import CliRunner

from svdmerge.cli import app
from svdmerge.errors import (
    CheckpointError,
    ContentError,
    MismatchError,
    OutputError,
    RecipeError,
    StoreError,
    SvdmergeError,
)
from svdmerge.recipe import parse_recipe
from svdmerge.storage import maintenance
from svdmerge.storage.filesystem import Folder
from svdmerge.workflow import run

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return micro_bench(tmp_path)


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray must not be started, nor looked for."""

    def refuse(*args: object, **options: object) -> None:
        raise AssertionError("Ray was started")

    monkeypatch.setattr("svdmerge.engine.runtime._init", refuse)
    monkeypatch.setattr("svdmerge.engine.runtime.RayTasks", refuse)


def told_before_anything_starts(
    bench: Bench, raw: dict[str, Any], kind: type[SvdmergeError], *words: str
) -> None:
    """The fault of a recipe is told by the library and by the command, and nothing is written."""
    before = tree(bench.root)
    with pytest.raises(SvdmergeError) as caught:
        run(parse_recipe(raw), address="local")
    assert type(caught.value) is kind
    for word in words:
        assert word in str(caught.value)
    assert tree(bench.root) == before
    assert not bench.store.exists()
    assert not bench.out.exists()

    recipe = bench.root / "recipe.yml"
    recipe.write_text(yaml.safe_dump(raw))
    for verb in ("plan", "run", "decompose"):
        done = CliRunner().invoke(app, [verb, str(recipe)])
        assert done.exit_code == (2 if kind is RecipeError else 1)
        assert done.stdout == ""
        for word in words:
            assert word in done.stderr
        assert 1 <= len(done.stderr.splitlines()) <= 3
    recipe.unlink()
    assert tree(bench.root) == before


# --- recipes ---


def test_an_unknown_key_is_told_with_the_nearest_known_one(bench: Bench, no_ray: None) -> None:
    raw = bench.raw(base_modle=str(bench.base))
    told_before_anything_starts(bench, raw, RecipeError, "base_modle", "`base_model`")


def test_an_unknown_key_in_a_section_is_told_with_its_place(bench: Bench, no_ray: None) -> None:
    raw = bench.raw(parameters={"k": "10%", "saliense": "sigma"})
    told_before_anything_starts(bench, raw, RecipeError, "parameters.saliense", "`salience`")


def test_an_unknown_key_of_a_model_is_told(bench: Bench, no_ray: None) -> None:
    raw = bench.raw(models=[{"model": str(bench.sources[0]), "wieght": 2}])
    told_before_anything_starts(bench, raw, RecipeError, "models.0", "wieght", "`weight`")


@pytest.mark.parametrize(
    ("k", "words"),
    [
        (0, "at least 1"),
        (-3, "at least 1"),
        ("0%", "more than 0 %"),
        ("-10%", "more than 0 %"),
        ("101%", "at most 100 %"),
        (1.5, "at most 100 %"),
        (float("nan"), "share"),
        ("many", "expected"),
        (True, "expected"),
        (None, "expected"),
    ],
)
def test_a_budget_outside_of_0_to_100_percent_is_refused(
    bench: Bench, no_ray: None, k: object, words: str
) -> None:
    raw = bench.raw(parameters={"k": k})
    told_before_anything_starts(bench, raw, RecipeError, "parameters.k", words)


@pytest.mark.parametrize("weight", [0, -1.0, "heavy", float("inf")])
def test_a_weight_that_is_not_above_zero_is_refused(
    bench: Bench, no_ray: None, weight: object
) -> None:
    raw = bench.raw(models=[{"model": str(bench.sources[0]), "weight": weight}])
    told_before_anything_starts(bench, raw, RecipeError, "models.0", "weight")


def test_a_recipe_without_sources_is_refused(bench: Bench, no_ray: None) -> None:
    told_before_anything_starts(bench, bench.raw(models=[]), RecipeError, "models")


def test_an_unknown_method_is_refused_with_the_known_ones(bench: Bench, no_ray: None) -> None:
    raw = bench.raw(merge_method="axsi")
    told_before_anything_starts(bench, raw, RecipeError, "merge_method", "'axis'")


def test_a_policy_for_integers_that_would_merge_them_is_refused(bench: Bench, no_ray: None) -> None:
    raw = bench.raw(policies=[{"match": "steps", "policy": "average"}])
    told_before_anything_starts(bench, raw, RecipeError, "steps", "integer", "policy: base")


@pytest.mark.parametrize(
    "text", ["models: [a", "- a\n- b", "", "just words", "a: b: c\n  - d\n e", "\x00"]
)
def test_a_file_that_is_no_recipe_is_refused_in_three_lines(tmp_path: Path, text: str) -> None:
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(text)
    done = CliRunner().invoke(app, ["run", str(recipe)])
    assert done.exit_code == 2
    assert str(recipe) in done.stderr
    assert 1 <= len(done.stderr.splitlines()) <= 3


def test_a_recipe_that_is_not_there_is_refused(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["plan", str(tmp_path / "none.yml")])
    assert done.exit_code == 2
    assert "none.yml" in done.stderr


# --- sources as listed ---


def test_a_source_that_is_not_there_is_named(bench: Bench, no_ray: None) -> None:
    raw = bench.raw(models=[str(bench.sources[0]), str(bench.root / "gone")])
    told_before_anything_starts(
        bench, raw, CheckpointError, str(bench.root / "gone"), "no such model", "Check the path"
    )


def test_a_base_that_is_not_there_is_named(bench: Bench, no_ray: None) -> None:
    raw = bench.raw(base_model=str(bench.root / "gone"))
    told_before_anything_starts(bench, raw, CheckpointError, str(bench.root / "gone"))


def test_the_same_source_twice_is_refused(bench: Bench, no_ray: None) -> None:
    name = str(bench.sources[0])
    raw = bench.raw(models=[name, str(bench.sources[1]), name])
    told_before_anything_starts(bench, raw, RecipeError, name, "twice", "weight")


def test_the_same_source_by_two_spellings_is_refused(bench: Bench, no_ray: None) -> None:
    link = bench.root / "link"
    link.symlink_to(bench.sources[0])
    raw = bench.raw(models=[str(bench.sources[0]), str(link)])
    told_before_anything_starts(bench, raw, RecipeError, "link", "twice")


# --- sources that do not fit the base ---


def test_a_tensor_missing_in_one_source_is_named(bench: Bench, no_ray: None) -> None:
    tensors = tiny.read_model(bench.sources[1])
    del tensors["b.weight"]
    tiny.write_model(bench.sources[1], tensors)
    told_before_anything_starts(
        bench, bench.raw(), MismatchError, str(bench.sources[1]), "b.weight", "policy: base"
    )
    bench.run(policies=[{"match": "b.weight", "policy": "base"}])


def test_a_source_of_another_base_by_names_is_refused(bench: Bench, no_ray: None) -> None:
    tiny.write_model(bench.sources[1], {"other.weight": torch.ones(3, 3)})
    told_before_anything_starts(
        bench, bench.raw(), MismatchError, str(bench.sources[1]), "another base", str(bench.base)
    )


def test_a_source_of_another_base_by_shapes_is_refused(bench: Bench, no_ray: None) -> None:
    micro_model(bench.sources[1], seed=3, **{"a.weight": torch.ones(24, 19)})
    told_before_anything_starts(
        bench, bench.raw(), MismatchError, str(bench.sources[1]), "a.weight", "[24, 19]", "[24, 18]"
    )


def test_a_source_with_integers_for_floats_is_refused(bench: Bench, no_ray: None) -> None:
    micro_model(bench.sources[1], seed=3, **{"a.bias": torch.ones(24, dtype=torch.int8)})
    told_before_anything_starts(
        bench, bench.raw(), MismatchError, str(bench.sources[1]), "a.bias", "I8", "F32"
    )


def test_a_tensor_that_the_recipe_refuses_as_extra_is_named(bench: Bench, no_ray: None) -> None:
    micro_model(bench.sources[1], seed=3, base=bench.base, extra=torch.ones(3))
    raw = bench.raw(policies=[{"match": "*", "extra": "error"}])
    told_before_anything_starts(
        bench, raw, MismatchError, str(bench.sources[1]), "has extra", "extra: error"
    )


def test_a_mapping_of_what_there_is_not_is_told(bench: Bench, no_ray: None) -> None:
    for tensors, kind, words in (
        ({"c.weight": "a.weight"}, RecipeError, ("'c.weight' matches no tensor", "on the left")),
        ({"a.weight": "c.weight"}, MismatchError, ("lacks c.weight", "a.weight")),
        ({"a.weight": "a.weight[30:40]"}, MismatchError, ("a.weight [24, 18] has no rows 30:40",)),
        ({"a.*": "a.weight"}, RecipeError, ("models.0", "as many stars")),
    ):
        raw = bench.raw(models=[{"model": str(bench.sources[1]), "tensors": tensors}])
        told_before_anything_starts(bench, raw, kind, *words)


def test_tokens_that_no_tokenizer_tells_are_told(bench: Bench, no_ray: None) -> None:
    raw = bench.raw(policies=[{"match": "a.weight", "mismatch": "tokens"}])
    told_before_anything_starts(
        bench, raw, CheckpointError, str(bench.base), "has no tokenizer", "mismatch: base"
    )


# --- files ---


def header_of(file: Path) -> tuple[dict[str, Any], bytes]:
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def put_header(file: Path, header: dict[str, Any], body: bytes) -> None:
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + body)


def truncate_body(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-40])


def truncate_header(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:30])


def empty(file: Path) -> None:
    file.write_bytes(b"")


def claim_a_huge_header(file: Path) -> None:
    file.write_bytes((1 << 62).to_bytes(8, "little") + file.read_bytes()[8:])


def break_the_json(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[8] = ord("[")
    file.write_bytes(data)


def lie_about_a_shape(file: Path) -> None:
    header, body = header_of(file)
    header["a.weight"]["shape"] = [24, 17]
    put_header(file, header, body)


def lie_about_offsets(file: Path) -> None:
    header, body = header_of(file)
    header["a.weight"]["data_offsets"] = [0, 24 * 18 * 4]
    header["b.weight"]["data_offsets"] = [0, 9 * 20 * 4]
    put_header(file, header, body)


def point_beyond_the_end(file: Path) -> None:
    header, body = header_of(file)
    begin, end = header["a.weight"]["data_offsets"]
    header["a.weight"]["data_offsets"] = [begin + 10**9, end + 10**9]
    put_header(file, header, body)


def name_an_unknown_dtype(file: Path) -> None:
    header, body = header_of(file)
    header["a.weight"]["dtype"] = "Q4_K"
    put_header(file, header, body)


def use_a_negative_shape(file: Path) -> None:
    header, body = header_of(file)
    header["a.weight"]["shape"] = [-24, -18]
    put_header(file, header, body)


def append_something(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b"#!/bin/sh")


@pytest.mark.parametrize(
    "damage",
    [
        truncate_body,
        truncate_header,
        empty,
        claim_a_huge_header,
        break_the_json,
        lie_about_a_shape,
        lie_about_offsets,
        point_beyond_the_end,
        name_an_unknown_dtype,
        use_a_negative_shape,
        append_something,
    ],
)
@pytest.mark.parametrize("role", ["base", "source"])
def test_a_truncated_or_lying_header_is_told_with_its_file(
    bench: Bench, no_ray: None, damage: Callable[[Path], None], role: str
) -> None:
    file = (bench.base if role == "base" else bench.sources[2]) / SINGLE
    damage(file)
    told_before_anything_starts(bench, bench.raw(), CheckpointError, str(file))


@pytest.mark.parametrize("where", ["../elsewhere/w.safetensors", "/etc/w.safetensors", "a\\..\\w"])
def test_an_index_that_points_outside_its_folder_is_refused(
    bench: Bench, no_ray: None, where: str
) -> None:
    folder = bench.sources[1]
    shutil.copytree(folder, bench.root / "elsewhere")
    (bench.root / "elsewhere" / SINGLE).rename(bench.root / "elsewhere/w.safetensors")
    (folder / SINGLE).unlink()
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a.weight": where}}))
    told_before_anything_starts(
        bench, bench.raw(), CheckpointError, str(folder / INDEX), "outside its folder"
    )


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": 3}', '{"metadata": {}}'])
def test_an_index_that_is_none_is_refused(bench: Bench, no_ray: None, text: str) -> None:
    (bench.sources[1] / INDEX).write_text(text)
    told_before_anything_starts(
        bench, bench.raw(), CheckpointError, str(bench.sources[1] / INDEX), "weight_map"
    )


def test_a_shard_that_its_index_names_and_is_missing_is_told(bench: Bench, no_ray: None) -> None:
    tiny.write_model(bench.root / "sharded", tiny.read_model(bench.sources[0]), shards=2)
    gone = bench.root / "sharded/model-00002-of-00002.safetensors"
    gone.unlink()
    raw = bench.raw(models=[str(bench.root / "sharded")])
    told_before_anything_starts(bench, raw, CheckpointError, str(gone), "missing")


def test_a_tensor_that_an_index_names_and_no_shard_holds_is_told(
    bench: Bench, no_ray: None
) -> None:
    folder = tiny.write_model(bench.root / "sharded", tiny.read_model(bench.sources[0]), shards=2)
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["ghost.weight"] = "model-00001-of-00002.safetensors"
    (folder / INDEX).write_text(json.dumps(index))
    raw = bench.raw(models=[str(folder)])
    told_before_anything_starts(bench, raw, CheckpointError, "ghost.weight")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.ckpt"])
def test_a_pickle_is_refused_with_the_way_out(bench: Bench, no_ray: None, name: str) -> None:
    (bench.sources[1] / SINGLE).unlink()
    (bench.sources[1] / name).write_bytes(b"\x80\x04")
    for place in (bench.sources[1], bench.sources[1] / name):
        raw = bench.raw(models=[str(place)])
        told_before_anything_starts(
            bench, raw, CheckpointError, str(place), "pickle", "safe_serialization=True"
        )


def test_a_broken_configuration_is_told_with_its_file(bench: Bench, no_ray: None) -> None:
    (bench.base / "config.json").write_text("{")
    place = str(bench.base / "config.json")
    told_before_anything_starts(bench, bench.raw(), CheckpointError, place, "JSON")


# --- content ---


def assert_nothing_half_written(bench: Bench) -> None:
    assert maintenance.verify(Folder.at(bench.store)) == []
    assert not [p for p in bench.root.iterdir() if p.name.startswith(".")]
    assert not list(bench.root.rglob("*.partial"))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("tensor", ["a.weight", "a.bias"])
def test_a_number_that_is_none_is_told_with_file_and_tensor(
    bench: Bench, value: float, tensor: str
) -> None:
    bench.run(models=bench.raw()["models"][:2])
    before = tree(bench.out)
    bad = tiny.read_model(bench.sources[2])
    bad[tensor].view(-1)[5] = value
    tiny.write_model(bench.sources[2], bad)
    with pytest.raises(ContentError) as caught:
        bench.run()
    what, why, fix = caught.value.args
    assert str(bench.sources[2] / SINGLE) in what
    assert tensor in what
    assert "1 of its" in why
    assert "repair" in fix
    assert_nothing_half_written(bench)
    assert tree(bench.out) == before


def test_a_number_that_is_none_in_the_base_is_told_as_the_bases(bench: Bench) -> None:
    micro_model(bench.base, seed=0, **{"a.bias": torch.full((24,), float("nan"))})
    with pytest.raises(ContentError, match="holds NaN or Inf") as caught:
        bench.run()
    assert str(bench.base / SINGLE) in str(caught.value)
    assert not bench.out.exists()


@pytest.mark.parametrize("k", ["20%", "100%"])
@pytest.mark.parametrize("method", ["axis", "average", "task_arithmetic"])
def test_a_merge_that_float32_cannot_hold_is_told_and_not_published(
    bench: Bench, method: str, k: str
) -> None:
    parameters: dict[str, Any] = {"scale": 1e39} | ({"k": k} if method == "axis" else {})
    with pytest.raises(ContentError) as caught:
        bench.run(merge_method=method, parameters=parameters)
    assert ".weight" in str(caught.value) or ".bias" in str(caught.value)
    assert not bench.out.exists()
    assert_nothing_half_written(bench)


def test_a_difference_that_float32_cannot_hold_is_told(bench: Bench) -> None:
    big = torch.full((24,), 3e38)
    micro_model(bench.base, seed=0, **{"a.bias": -big})
    for number, source in enumerate(bench.sources, start=1):
        micro_model(source, seed=number, **{"a.bias": big if number == 1 else -big})
    with pytest.raises(ContentError, match=r"a\.bias"):
        bench.run()
    assert not bench.out.exists()


def test_an_output_that_its_dtype_cannot_hold_is_told(bench: Bench) -> None:
    for number, place in enumerate((bench.base, *bench.sources)):
        start = bench.base if number else None
        micro_model(place, seed=number, base=start, **{"a.bias": torch.full((24,), 7e4)})
    with pytest.raises(ContentError, match=r"a\.bias: overflows F16"):
        bench.run(out_dtype="float16")
    assert not bench.out.exists()


def test_a_fault_of_content_comes_through_ray_as_itself(bench: Bench, ray_session: None) -> None:
    micro_model(bench.sources[1], seed=5, **{"a.bias": torch.full((24,), float("inf"))})
    with pytest.raises(ContentError, match=r"a\.bias holds NaN or Inf"):
        run(bench.recipe(), address="local")
    assert not bench.out.exists()
    assert maintenance.verify(Folder.at(bench.store)) == []


def test_what_was_stored_before_a_fault_is_kept_and_a_repair_finishes(bench: Bench) -> None:
    whole = tiny.read_model(bench.sources[2])
    micro_model(bench.sources[2], seed=3, **{"a.bias": torch.full((24,), float("nan"))})
    with pytest.raises(ContentError):
        bench.run()
    report = json.loads(next((bench.store / "runs").rglob("run.json")).read_text())
    assert report["status"] == "failed: ContentError"
    tiny.write_model(bench.sources[2], whole, {"model_type": "micro"})
    bench.run()
    repaired = outcome(bench.out)
    bench.run(store=str(bench.root / "fresh"), out=str(bench.root / "fresh-out"))
    assert outcome(bench.root / "fresh-out") == repaired


def test_integers_unlike_the_bases_are_told_and_a_policy_keeps_the_bases(bench: Bench) -> None:
    micro_model(bench.sources[1], seed=2, base=bench.base, steps=torch.tensor([8]))
    with pytest.raises(ContentError) as caught:
        bench.run()
    for word in (str(bench.sources[1]), "steps", "policy: base"):
        assert word in str(caught.value)
    assert not bench.out.exists()
    assert_nothing_half_written(bench)
    bench.run(policies=[{"match": "steps", "policy": "base"}])
    assert tiny.read_model(bench.out)["steps"].item() == 7


def test_a_source_that_changes_while_it_is_read_is_told(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    from svdmerge.engine.runtime import InProcess
    from svdmerge.workflow import Run

    attempt = Run(bench.recipe(), runtime=InProcess())
    micro_model(bench.sources[1], seed=50, base=bench.base)
    os.utime(bench.sources[1] / SINGLE, ns=(1, 1))
    with pytest.raises(CheckpointError) as caught:
        attempt.all()
    assert str(bench.sources[1] / SINGLE) in str(caught.value)
    assert "changed" in str(caught.value)
    assert not bench.out.exists()


def test_a_solver_that_fails_names_source_and_matrix(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    from svdmerge.errors import SolverError

    def fail(*args: object, **options: object) -> None:
        raise torch.linalg.LinAlgError("did not converge\nafter 30 sweeps")

    for solver in ("svd", "eigh"):  # of all that take over from each other
        monkeypatch.setattr(torch.linalg, solver, fail)
    with pytest.raises(SolverError) as caught:
        bench.run()
    assert "a.weight" in str(caught.value)
    assert "source-" in str(caught.value)
    assert not bench.out.exists()


# --- outputs and stores ---


@pytest.mark.parametrize("name", ["notes.txt", SINGLE, ".git", "sub/deep.bin"])
def test_an_output_folder_that_holds_something_else_is_left_alone(bench: Bench, name: str) -> None:
    place = bench.out / name
    place.parent.mkdir(parents=True)
    place.write_text("mine")
    before = tree(bench.root)
    with pytest.raises(OutputError) as caught:
        bench.run()
    assert str(bench.out) in str(caught.value)
    assert name.split("/")[0] in str(caught.value)
    assert tree(bench.root) == before


def test_an_output_that_is_a_file_is_left_alone(bench: Bench) -> None:
    bench.out.write_text("mine")
    with pytest.raises(OutputError, match="is a file"):
        bench.run()
    assert bench.out.read_text() == "mine"
    assert not bench.store.exists()


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"files": 3}', "null"])
def test_an_output_with_a_malformed_manifest_is_told_and_left_alone(
    bench: Bench, text: str
) -> None:
    bench.run()
    (bench.out / "svdmerge_manifest.json").write_text(text)
    before = tree(bench.out)
    with pytest.raises(OutputError) as caught:
        bench.run()
    assert "svdmerge_manifest.json: malformed" in str(caught.value)
    assert tree(bench.out) == before


def test_an_empty_output_folder_is_used(bench: Bench) -> None:
    bench.out.mkdir()
    bench.run()
    assert (bench.out / SINGLE).exists()


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_a_store_that_cannot_be_written_is_told_before_work_starts(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    (bench.root / "file").write_text("in the way")
    monkeypatch.setattr("svdmerge.workflow.decompose", None)
    store = bench.root / place
    with pytest.raises(StoreError) as caught:
        bench.run(store=str(store))
    assert str(store) in str(caught.value)
    assert "cannot be written" in str(caught.value)
    assert not bench.out.exists()


def test_a_store_without_permission_is_told(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root may write anywhere, so the refusal is made."""

    def refuse(*args: object, **options: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("svdmerge.storage.filesystem.tempfile.mkstemp", refuse)
    with pytest.raises(StoreError) as caught:
        bench.run()
    assert "cannot be written" in str(caught.value)
    assert "permissions" in str(caught.value)
    assert not bench.out.exists()


def test_a_filesystem_of_an_unknown_kind_is_told(bench: Bench) -> None:
    with pytest.raises(StoreError, match="nosuch://"):
        bench.run(store="nosuch://bucket/store")


@pytest.mark.parametrize("text", ["{", '{"schema_version": 1}', "[]"])
def test_a_damaged_commit_is_told_with_its_file(bench: Bench, text: str) -> None:
    bench.run()
    commit = next((bench.store / "commits").rglob("*.json"))
    commit.write_text(text)
    with pytest.raises(StoreError) as caught:
        bench.run(parameters={"k": 2})
    assert commit.name in str(caught.value)
    assert maintenance.verify(Folder.at(bench.store)) != []


def test_a_commit_of_a_later_version_is_not_misread(bench: Bench) -> None:
    bench.run()
    commit = next((bench.store / "commits").rglob("*.json"))
    commit.write_text(json.dumps(json.loads(commit.read_text()) | {"schema_version": 99}))
    with pytest.raises(StoreError, match="schema version 99"):
        bench.run(parameters={"k": 2})


def flip_bits(file: Path) -> None:
    """Damage that spares the size and both ends, where Arrow's own magic numbers are."""
    data = bytearray(file.read_bytes())
    for i in range(len(data) // 4, 3 * len(data) // 4, 16):
        data[i] ^= 0x40
    file.write_bytes(data)


def stored(folder: Path, *, spectrum: bool) -> Path:
    found = sorted(folder.rglob("*.arrow"))
    return next(f for f in found if f.name.endswith(".spectrum.arrow") == spectrum)


@pytest.mark.parametrize("spectrum", [False, True])
def test_a_damaged_object_of_the_store_is_found_and_named(bench: Bench, spectrum: bool) -> None:
    """In a process of its own: a reader that trusts damaged offsets dies with its process."""
    bench.run()
    before = tree(bench.out)
    shard = stored(bench.store / "components", spectrum=spectrum)
    flip_bits(shard)
    faults = maintenance.verify(Folder.at(bench.store))
    assert len(faults) == 1
    assert shard.name in faults[0]
    done = command("run", bench.write_recipe(parameters={"k": 20}), "--address", "none")
    assert done.returncode == 1
    assert shard.name in done.stderr
    assert "damaged" in done.stderr
    assert tree(bench.out) == before


@pytest.mark.parametrize("spectrum", [False, True])
def test_deleting_the_commits_that_store_verify_names_heals_a_store(
    bench: Bench, spectrum: bool
) -> None:
    bench.run()
    first = outcome(bench.out)
    flip_bits(stored(bench.store / "components", spectrum=spectrum))
    for fault in maintenance.verify(Folder.at(bench.store)):
        (bench.store / fault.split(": ")[0]).unlink()
    shutil.rmtree(bench.store / "runs")
    shutil.rmtree(bench.out)
    done = command("run", bench.write_recipe(), "--address", "none")
    assert done.returncode == 0, done.stderr
    assert outcome(bench.out) == first
    assert maintenance.verify(Folder.at(bench.store)) == []


def test_damaged_factors_of_a_run_are_found_and_named(bench: Bench) -> None:
    bench.run()
    first = tree(bench.out)
    shard = stored(bench.store / "runs", spectrum=False)
    flip_bits(shard)
    shutil.rmtree(bench.out)
    done = command("run", bench.write_recipe(), "--address", "none")
    assert done.returncode == 1
    assert shard.name in done.stderr
    assert not bench.out.exists()
    assert any(shard.name in fault for fault in maintenance.verify(Folder.at(bench.store)))
    shard.unlink()  # what is lost is made again
    bench.run()
    assert tree(bench.out) == first
