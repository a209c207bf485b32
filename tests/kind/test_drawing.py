"""A `draw` section from the command line: trained, split, recombined, carried over."""

import json
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from svdmerge.cli import app
from svdmerge.errors import RecipeError, TrainingError
from svdmerge.kind.diffusion import diffusion_of
from svdmerge.kind.digits import write_digits
from svdmerge.kind.recipe import Drawing, parse_kind_recipe
from svdmerge.storage.filesystem import Folder

SMALL = {
    "image_size": 8, "channels": 1, "patch": 2, "width": 16, "depth": 1, "learngenes": 4,
    "steps": 4, "batch_size": 4, "measure_every": 2,
}  # fmt: skip


def config(**changes: object) -> Drawing:
    raw = {"draw": {"train": "t.parquet", "classes": {"a": 0, "b": 4}, **SMALL, **changes}}
    found = parse_kind_recipe(raw).draw
    assert found is not None
    return found


def run(command: str, raw: dict[str, object], folder: Path) -> dict[str, object]:
    path = folder / "kind.yml"
    path.write_text(yaml.safe_dump(raw))
    where = [] if command == "recombine" else ["--address", "none"]
    done = CliRunner().invoke(app, ["kind", command, str(path), "--json", "--verbose", *where])
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def test_digits_are_drawn_recombined_and_carried_over(tmp_path: Path) -> None:
    train, test = write_digits(Folder.at(tmp_path), num_train=1700)
    draw = {"train": train, "test": test, **SMALL}
    raw: dict[str, object] = {
        "model": str(tmp_path / "model"),
        "store": str(tmp_path / "store"),
        "draw": {
            **draw, "classes": {"one": 1, "six": 6, "two": 2}, "tailors": 3,
            "pictures": str(tmp_path / "pictures"),
        },
        "recombine": {"classes": ["two", "one"], "out": str(tmp_path / "small")},
    }  # fmt: skip
    trained = run("train", raw, tmp_path)
    assert trained["steps"] == 4
    assert len(list((tmp_path / "pictures").iterdir())) == 2
    assert run("split", raw, tmp_path)["num_layers"] == 6
    small = run("recombine", raw, tmp_path)
    assert small["classes"] == ["one", "two"]
    assert float(str(small["max_difference"])) <= 1e-5
    new = raw | {
        "model": str(tmp_path / "new"),
        "draw": {
            **draw, "classes": {"seven": 7, "nine": 9, "zero": 0}, "tailors": 6,
            "learngenes_of": str(tmp_path / "model"),
        },
    }  # fmt: skip
    carried = run("train", new, tmp_path)
    assert int(str(carried["num_trained"])) < int(str(carried["num_parameters"]))


def test_groups_may_be_a_hierarchy_and_classes_keep_their_order() -> None:
    found = diffusion_of(config(groups={"all": {"first": ["b"], "second": ["a"]}}, tailors=6))
    assert found.spec is not None
    gate = found.spec.gate
    assert gate.classes == ("a", "b")
    assert gate.groups == ("all", "all/first", "all/second")
    assert gate.uses == ((0, 2), (0, 1))
    assert found.classes == (0, 4)


def test_what_does_not_fit_is_told_before_training() -> None:
    with pytest.raises(RecipeError, match="'c' is in `groups` or in `classes`"):
        diffusion_of(config(groups={"all": ["a", "b", "c"]}))
    with pytest.raises(RecipeError, match="the nearest is `image_size`"):
        config(image_siz=8)
    with pytest.raises(TrainingError, match="patch: 3"):
        diffusion_of(config(patch=3))
    with pytest.raises(RecipeError, match="4 learngenes and 13 tailors"):
        diffusion_of(config(tailors=13)).model()


def test_places_mean_the_same_in_workers_whose_working_directory_is_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found = diffusion_of(config(pictures="drawn"))
    assert found.train == f"{tmp_path.resolve()}/t.parquet"
    assert found.pictures == f"{tmp_path.resolve()}/drawn"
    assert found.test == ""
