"""Places of a run: an output that would replace what the run needs is refused, and nothing lost."""

from pathlib import Path
from typing import Any

import pytest
from merging import Bench, micro_bench, tree

from svdmerge.errors import OutputError, RecipeError
from svdmerge.storage.filesystem import Folder

TUNE = {"task": "tensor", "train": "train.parquet", "test": "test.parquet"}


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return micro_bench(tmp_path)


def refused(bench: Bench, **changes: Any) -> str:
    """What is told of a recipe; every file must be as it was."""
    before = tree(bench.root)
    with pytest.raises(RecipeError) as caught:
        bench.run(**changes)
    assert tree(bench.root) == before
    return str(caught.value)


@pytest.mark.parametrize(
    "place", ["store", ".", "store/components", "store/runs/x", "store/commits"]
)
def test_an_output_may_not_be_hold_or_lie_in_the_store(bench: Bench, place: str) -> None:
    bench.run(out=str(bench.root / "first"))
    assert "out: " in refused(bench, out=str(bench.root / place))


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_an_output_may_not_be_an_input_however_it_is_written(bench: Bench, scheme: str) -> None:
    """Outputs of svdmerge are what a later run replaces: as inputs they would be lost."""
    bench.run()
    out = f"{scheme}{bench.out}"
    assert "base_model" in refused(bench, out=out, base_model=str(bench.out))
    others = [str(s) for s in bench.sources[:2]]
    assert "source" in refused(bench, out=out, models=[*others, str(bench.out)])
    (bench.root / "link").symlink_to(bench.out)
    assert "base_model" in refused(bench, out=f"{scheme}{bench.root}/link", base_model=out)


def test_an_output_on_an_object_store_may_not_be_the_base(bench: Bench) -> None:
    place = f"memory://{bench.root.name}/out"
    bench.run(out=place)
    names = Folder.at(place).names()
    with pytest.raises(RecipeError, match="base_model"):
        bench.run(out=place, base_model=place, store=f"memory://{bench.root.name}/store")
    assert Folder.at(place).names() == names


@pytest.mark.parametrize(
    ("tune", "told"),
    [
        ({"out": "base"}, "base_model"),
        ({"out": "source-2"}, "source"),
        ({"out": "store"}, "store"),
        ({"out": "out"}, "lie in each other"),
        ({"out": "out/tuned"}, "lie in each other"),
        ({"out": "data", "train": "data/train.parquet"}, "tune.train"),
        ({"targets": [{"name": "one", "out": "base"}]}, "base_model"),
    ],
)
def test_a_tuned_model_may_not_replace_what_the_run_needs(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, tune: dict[str, Any], told: str
) -> None:
    monkeypatch.chdir(bench.root)
    assert told in refused(bench, tune=TUNE | tune)


def test_the_tuned_models_default_place_is_looked_at_too(bench: Bench) -> None:
    """`<out>-tuned` may be an earlier tuned model that now is the base."""
    bench.base.rename(f"{bench.out}-tuned")
    assert "tune.out" in refused(bench, tune=TUNE, base_model=f"{bench.out}-tuned")


def test_neighbours_of_alike_names_are_no_overlap(bench: Bench) -> None:
    assert bench.run(out=f"{bench.store}-out").status == "done"
    assert bench.run(out=f"{bench.base}2", store=str(bench.root / "base3")).status == "done"


def test_files_put_into_the_output_during_a_run_are_left_alone(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    from svdmerge.engine import assemble

    write = assemble.write_model

    def write_while_a_user_works(*args: Any, **options: Any) -> Any:
        bench.out.mkdir()
        (bench.out / "thesis.txt").write_text("mine")
        return write(*args, **options)

    monkeypatch.setattr(assemble, "write_model", write_while_a_user_works)
    with pytest.raises(OutputError, match=r"thesis\.txt"):
        bench.run()
    assert (bench.out / "thesis.txt").read_text() == "mine"
