"""Patterns and hub queries of a recipe, resolved to the models that they stand for now."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from fake_hub import Hub
from fsspec.core import url_to_fs
from merging import Bench, micro_bench, micro_model

from svdmerge.engine.plan import make_plan
from svdmerge.engine.resolve import resolved
from svdmerge.errors import CheckpointError, RecipeError, RetryableError
from svdmerge.recipe import parse_recipe
from svdmerge.storage.filesystem import Folder
from svdmerge.tick import tick


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return micro_bench(tmp_path)


def models(bench: Bench, *entries: Any, **changes: Any) -> dict[str, float]:
    """Weights by reference."""
    found = resolved(bench.recipe(models=list(entries), **changes))
    return {m.model: m.weight for m in found.models}


def test_a_pattern_is_the_folders_and_safetensors_files_that_match(bench: Bench) -> None:
    (bench.root / "source-notes.txt").write_text("no model")
    shutil.copy(bench.sources[0] / "model.safetensors", bench.root / "source-4.safetensors")
    expected = [*map(str, bench.sources), str(bench.root / "source-4.safetensors")]
    assert list(models(bench, f"{bench.root}/source-*")) == expected
    assert list(models(bench, f"{bench.root}/source-[12]")) == expected[:2]
    files = models(bench, f"{bench.root}/*-3/*.safetensors")
    assert list(files) == [str(bench.sources[2] / "model.safetensors")]


def test_the_base_is_no_source_and_a_named_model_keeps_its_weight(bench: Bench) -> None:
    shutil.rmtree(bench.root / "store", ignore_errors=True)
    second = {"model": str(bench.sources[1]), "weight": 2.0}
    found = models(bench, {"model": f"{bench.root}/*", "weight": 0.5}, second)
    assert found == {
        str(bench.sources[0]): 0.5, str(bench.sources[2]): 0.5, str(bench.sources[1]): 2.0,
    }  # fmt: skip


def test_a_path_with_signs_of_patterns_is_that_path(bench: Bench) -> None:
    odd = micro_model(bench.root / "ft[1]", seed=5, base=bench.base)
    assert list(models(bench, str(odd))) == [str(odd)]


def test_patterns_resolve_in_buckets_and_other_stores(
    bench: Bench, s3_uri: str, memory_uri: str
) -> None:
    for uri in (s3_uri, memory_uri):
        fs, root = url_to_fs(uri)
        for model in bench.sources[:2]:
            fs.put(f"{model}/", f"{root}/models/{model.name}/", recursive=True)
        assert list(models(bench, f"{uri}/models/*")) == [
            f"{uri}/models/source-1", f"{uri}/models/source-2",
        ]  # fmt: skip
        assert list(models(bench, f"{uri}/models/*-2/*.safetensors")) == [
            f"{uri}/models/source-2/model.safetensors"
        ]


def test_releases_lie_in_a_bucket(bench: Bench, s3_uri: str) -> None:
    raw = bench.raw(models=[f"{bench.root}/source-*"], store=f"{s3_uri}/store", out=f"{s3_uri}/out")
    assert Folder.at(s3_uri).enforces_put_once()
    found = tick(parse_recipe(raw), address="none")
    assert (found.status, found.warnings) == ("released", [])
    assert tick(parse_recipe(raw), address="none").status == "unchanged"


def on_hub(hub: Hub, model: Path, repo: str, card: str = "") -> None:
    files = {p.name: p.read_bytes() for p in model.iterdir()}
    hub.commit(repo, files | {"README.md": f"---\n{card}\n---\n".encode()})


def test_a_hub_query_is_every_fine_tune_of_the_base(hub: Hub, bench: Bench) -> None:
    on_hub(hub, bench.base, "org/base")
    for number, source in enumerate(bench.sources):
        on_hub(hub, source, f"me{number % 2}/ft-{number}", "base_model: org/base\ntags: [math]")
    on_hub(hub, bench.sources[0], "me0/other", "base_model: org/another")
    query = {"hub": {}, "weight": 0.5}
    every = {f"hf://me0/ft-{i}": 0.5 for i in (0, 2)} | {"hf://me1/ft-1": 0.5}
    assert models(bench, query, base_model="org/base") == every
    of_one = {"hub": {"base": "org/base", "author": "me1", "tags": ["math"]}}
    assert list(models(bench, of_one)) == ["hf://me1/ft-1"]
    named = [query, "me1/ft-1"]
    assert models(bench, *named, base_model="org/base")["me1/ft-1"] == 1.0
    plan = make_plan(bench.recipe(models=[query], base_model="org/base"))
    assert len(plan.sources) == 3
    hub.private.add("me1/ft-1")  # withdrawn: it is not listed to others
    hub.token = "another"
    assert "hf://me1/ft-1" not in models(bench, query, base_model="org/base")


def test_faults_of_patterns_and_queries_are_told(hub: Hub, bench: Bench) -> None:
    with pytest.raises(RecipeError, match="matches nothing"):
        models(bench, f"{bench.root}/nothing-*")
    with pytest.raises(RecipeError, match="no patterns"):
        models(bench, "hf://me/ft-*")
    with pytest.raises(RecipeError, match="is no model of the hub"):
        models(bench, {"hub": {}})
    with pytest.raises(RecipeError, match=r"`hub` in its place"):
        models(bench, {"model": "a", "hub": {}})
    with pytest.raises(RecipeError, match="the nearest is `author`"):
        models(bench, {"hub": {"auther": "me"}})
    hub.failures["listing"] = [403]
    with pytest.raises(RetryableError, match="does not list"):
        models(bench, {"hub": {"base": "org/base"}})


def test_sources_that_cannot_be_used_are_given_back_but_not_all(bench: Bench) -> None:
    (bench.root / "source-0").mkdir()
    refused: dict[str, str] = {}
    recipe = bench.recipe(models=[f"{bench.root}/source-*"])
    plan = make_plan(recipe, refused=lambda name, error: refused.update({name: str(error)}))
    assert list(refused) == [str(bench.root / "source-0")]
    assert [m.model for m in plan.recipe.models] == [str(s) for s in bench.sources]
    with pytest.raises(CheckpointError, match="no such model"):
        make_plan(bench.recipe(models=[str(bench.root / "source-0")]), refused=lambda *_: None)
