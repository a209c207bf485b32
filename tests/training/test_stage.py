"""The tune stage takes all it needs from the recipe and the run's folder."""

import contextlib
from collections.abc import Generator
from pathlib import Path

import pytest
from tune_case import MATRICES, make_case

from svdmerge.engine.plan import make_plan
from svdmerge.errors import TrainingError
from svdmerge.progress import Stage
from svdmerge.recipe import Recipe, parse_recipe
from svdmerge.storage.filesystem import Folder
from svdmerge.storage.hf_model import load_factors
from svdmerge.training.stage import tune_plan
from svdmerge.workflow import run


class Recorded:
    """Progress that remembers its stages."""

    def __init__(self) -> None:
        self.stages: list[list[object]] = []

    @contextlib.contextmanager
    def stage(self, name: str, total: int) -> Generator[Stage]:
        held: list[object] = [name, total, 0]
        self.stages.append(held)

        class Bar:
            def advance(self, num: int = 1) -> None:
                held[2] = int(str(held[2])) + num

        yield Bar()


def test_a_run_is_tuned_as_its_recipe_says_beside_its_output(tmp_path: Path) -> None:
    case, progress = make_case(tmp_path), Recorded()
    recipe = Recipe.model_validate(
        {
            "base_model": case.base.reference,
            "models": case.models,
            "out": str(tmp_path / "merged"),
            "tune": case.config().model_dump(),
        }
    )
    result = tune_plan(
        recipe,
        base=case.base,
        sources=case.sources,
        matrices=MATRICES,
        run_folder=Folder.at(tmp_path),
        use_ray=False,
        progress=progress,
    )
    again = case.tune(run=".", out="again")
    assert again.resumed
    assert [r.accuracy for r in again.rows] == [r.accuracy for r in result.rows]
    assert (tmp_path / "merged-tuned" / "tune.json").exists()
    assert progress.stages == [["probe", 4, 4], ["tune", 4, 4]]


@pytest.mark.parametrize("method", ["average", "ties", "tsv_m"])
def test_the_merged_factors_of_any_method_are_tuned(tmp_path: Path, method: str) -> None:
    case = make_case(tmp_path)
    recipe = parse_recipe(
        {
            "merge_method": method,
            "base_model": case.base.reference,
            "models": case.models,
            "store": str(tmp_path / "store"),
            "out": str(tmp_path / "out"),
            "tune": case.config(epochs=1).model_dump(),
        }
    )
    result = run(recipe, address="none").tune
    assert result.rows
    assert (tmp_path / "out-tuned" / "adapter.safetensors").exists()
    factors = load_factors(make_plan(recipe).run_folder.child("factors"))
    for matrix in MATRICES:
        s = factors.read(matrix, range(3)).s.tolist()
        assert s == sorted(s, reverse=True)


def test_a_recipe_without_the_section_is_told(tmp_path: Path) -> None:
    case = make_case(tmp_path)
    recipe = Recipe.model_validate({"base_model": "base", "models": ["source"]})
    with pytest.raises(TrainingError, match="no `tune` section"):
        tune_plan(
            recipe,
            base=case.base,
            sources=[],
            matrices=[],
            run_folder=Folder.at(tmp_path),
            use_ray=False,
        )
