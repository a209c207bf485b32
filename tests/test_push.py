"""Outputs go to a hub whole, in one commit, and models come from it by ranges."""

import shutil
from pathlib import Path

import pytest
from fake_hub import Hub
from merging import Bench, micro_bench

from svdmerge.errors import CheckpointError, OutputError, StoreError
from svdmerge.push import push
from svdmerge.recipe import parse_recipe
from svdmerge.storage.checkpoint import open_checkpoint
from svdmerge.storage.filesystem import Folder
from svdmerge.storage.model_ref import pinned
from svdmerge.workflow import run

REPO = "org/merged"


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """A merged output."""
    found = micro_bench(tmp_path_factory.mktemp("push"))
    run(found.recipe(), address="none")
    return found


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# --- push ---


def test_an_output_is_uploaded_whole_in_one_commit(hub: Hub, bench: Bench) -> None:
    pushed = push(str(bench.out), REPO)
    assert pushed.url is not None
    assert len(hub.repos[REPO]) == 2  # made, and filled
    held = hub.repos[REPO][-1][1]
    assert {n: d for n, d in held.items() if n != ".gitattributes"} == files(bench.out)
    assert REPO not in hub.private


def test_a_dry_run_asks_nothing(hub: Hub, bench: Bench) -> None:
    pushed = push(str(bench.out), REPO, dry_run=True)
    assert pushed.url is None
    assert pushed.nbytes == sum(map(len, files(bench.out).values()))
    assert not hub.asked


def test_a_private_repository_is_made_private(hub: Hub, bench: Bench) -> None:
    push(str(bench.out), REPO, private=True)
    assert REPO in hub.private


def test_what_was_uploaded_before_an_interruption_is_not_sent_again(hub: Hub, bench: Bench) -> None:
    hub.failures["commit"] = [400]
    with pytest.raises(StoreError, match="refuses the upload"):
        push(str(bench.out), REPO)
    sent = hub.asked["upload"]
    assert sent > 0
    assert len(hub.repos[REPO]) == 1
    push(str(bench.out), REPO)
    assert hub.asked["upload"] == sent


def test_the_hubs_rate_limits_are_waited_for(hub: Hub, bench: Bench) -> None:
    hub.failures["preupload"] = [429]
    assert push(str(bench.out), REPO).url is not None
    assert hub.asked["preupload"] == 2


def test_a_refusal_is_not_tried_again(
    hub: Hub, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_of_somebody_else")
    with pytest.raises(StoreError) as caught:
        push(str(bench.out), REPO)
    assert hub.asked["create"] == 1
    assert "hf_of_somebody_else" not in str(caught.value)


def test_what_is_damaged_is_not_pushed(hub: Hub, bench: Bench, tmp_path: Path) -> None:
    shutil.copytree(bench.out, tmp_path / "out")
    (tmp_path / "out" / "config.json").write_text("{}")
    with pytest.raises(OutputError, match=r"not what its manifest claims\nconfig.json"):
        push(str(tmp_path / "out"), REPO)
    with pytest.raises(OutputError, match="is no local output"):
        push(str(tmp_path), REPO)
    assert not hub.asked


def test_what_is_no_repository_is_told(hub: Hub, bench: Bench) -> None:
    with pytest.raises(StoreError, match="is no name of a repository"):
        push(str(bench.out), "a/b/c")
    with pytest.raises(StoreError, match="is no name of a repository"):
        push(str(bench.out), "no name", dry_run=True)


# --- reading ---


def test_models_of_the_hub_merge_as_local_ones_do(hub: Hub, bench: Bench, tmp_path: Path) -> None:
    recipe = bench.recipe()
    hub.commit("org/base", files(Path(recipe.base_model)))
    for i, model in enumerate(recipe.models):
        hub.commit(f"org/s{i}", files(Path(model.model)))
    places = {"store": str(tmp_path / "store"), "out": str(tmp_path / "out")}
    fields = recipe.model_dump(mode="json", exclude_unset=True) | places
    fields |= {"base_model": "org/base", "models": [f"org/s{i}" for i in range(len(recipe.models))]}
    run(parse_recipe(fields), address="none")
    name = "model.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (bench.out / name).read_bytes()


def test_models_in_buckets_of_the_hub_merge_so_too(hub: Hub, bench: Bench, tmp_path: Path) -> None:
    recipe = bench.recipe()
    models = [recipe.base_model, *(m.model for m in recipe.models)]
    hub.buckets["org/models"] = {
        f"{i}/{name}": data for i, m in enumerate(models) for name, data in files(Path(m)).items()
    }
    base, *sources = [f"hf://buckets/org/models/{i}" for i in range(len(models))]
    places = {"store": str(tmp_path / "store"), "out": str(tmp_path / "out")}
    run(bench.recipe(base_model=base, models=sources, **places), address="none")
    name = "model.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (bench.out / name).read_bytes()


def test_what_another_process_put_into_a_bucket_is_seen_at_once(hub: Hub) -> None:
    hub.buckets["org/b"] = {"store/a/x": b"1"}
    folder = Folder.at("hf://buckets/org/b/store")
    assert folder.find() == {"a/x": 1}
    hub.buckets["org/b"]["store/a/y"] = b"22"
    assert folder.find() == {"a/x": 1, "a/y": 2}
    assert folder.child("a").names() == ["x", "y"]
    stat = folder.stat("a/x")
    assert stat is not None
    hub.buckets["org/b"]["store/a/x"] = b"333"
    assert folder.stat("a/x") not in (None, stat)
    assert folder.read("a/x") == b"333"
    assert not folder.exists("a/z")


def test_a_branch_is_pinned_to_its_commit(hub: Hub, bench: Bench) -> None:
    first = hub.commit("org/base", files(Path(bench.recipe().base_model)))
    assert pinned("hf://org/base") == f"hf://org/base@{first}"
    before = open_checkpoint("org/base")
    hub.commit("org/base", {"README.md": b"other words"})
    after = open_checkpoint("org/base")
    assert before.folder != after.folder
    assert before.revision == after.revision  # the weights are the same


def test_only_the_bytes_of_a_tensor_are_read(hub: Hub, bench: Bench) -> None:
    hub.commit("org/base", files(Path(bench.recipe().base_model)))
    checkpoint = open_checkpoint("org/base")
    hub.bytes_sent.clear()
    ref = max(checkpoint.tensors.values(), key=lambda t: t.nbytes)
    ref.read()
    assert sum(hub.bytes_sent.values()) == ref.nbytes


@pytest.mark.parametrize("name", ["org/none", "org/base@nowhere"])
def test_what_the_hub_does_not_have_is_told(hub: Hub, bench: Bench, name: str) -> None:
    hub.commit("org/base", {"config.json": b"{}"})
    with pytest.raises(CheckpointError, match=r"shows no such model or revision"):
        open_checkpoint(name)


def test_a_private_model_needs_a_token_of_the_environment(
    hub: Hub, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.commit("org/base", files(Path(bench.recipe().base_model)))
    hub.private.add("org/base")
    assert open_checkpoint("org/base").tensors
    from huggingface_hub import HfFileSystem

    HfFileSystem.clear_instance_cache()
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(CheckpointError, match="HF_TOKEN"):
        open_checkpoint("org/base")
