"""A store that fails, breaks off, is slow or lies: the same bytes, or a fault told by name."""

import contextlib
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
import s3fs
from fsspec.core import url_to_fs
from merging import Bench, micro_bench, tiny_bench, weights
from proxy import Unreliable, proxied

from svdmerge.errors import StoreError
from svdmerge.recipe import parse_recipe
from svdmerge.storage.checkpoint import open_checkpoint
from svdmerge.storage.filesystem import Folder
from svdmerge.workflow import run


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """A merge on the local disk."""
    found = tiny_bench(tmp_path_factory.mktemp("unreliable"), num_sources=2)
    run(found.recipe(), address="none")
    return found


@pytest.fixture
def uri(s3_uri: str, bench: Bench) -> str:
    """A bucket that holds the models."""
    return uploaded(bench, s3_uri)


def uploaded(bench: Bench, uri: str) -> str:
    """The bucket, which holds the models from now on."""
    fs, root = url_to_fs(uri)
    for model in (bench.base, *bench.sources):
        fs.put(f"{model}/", f"{root}/{model.name}/", recursive=True)
    return uri


@pytest.fixture
def store(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> Generator[Unreliable]:
    """What stands before the bucket from now on; perfect until it is told otherwise."""
    with proxied(s3_server) as how:
        monkeypatch.setenv("AWS_ENDPOINT_URL", how.address)
        s3fs.S3FileSystem.clear_instance_cache()
        yield how
    s3fs.S3FileSystem.clear_instance_cache()


def merged(bench: Bench, uri: str, **changes: Any) -> dict[str, bytes]:
    """The weights of the same merge, all of it in the bucket."""
    raw: dict[str, Any] = bench.raw(**changes) | {
        "base_model": f"{uri}/{bench.base.name}",
        "models": [f"{uri}/{source.name}" for source in bench.sources],
        "store": f"{uri}/store", "out": f"{uri}/out",
    }  # fmt: skip
    run(parse_recipe(raw), address="none")
    return {"model.safetensors": Folder.at(f"{uri}/out").read("model.safetensors")}


def local(bench: Bench) -> dict[str, bytes]:
    return weights(bench.out)


def test_requests_that_fail_break_off_and_wait_cost_time_alone(
    tmp_path: Path, s3_uri: str, store: Unreliable
) -> None:
    small = micro_bench(tmp_path, num_sources=2)  # every request waits: few of them
    run(small.recipe(), address="none")
    uploaded(small, s3_uri)
    store.error_share, store.truncated_share, store.latency_s = 0.05, 0.02, 0.05
    assert merged(small, s3_uri) == local(small)
    assert store.faults["error"] > 5
    assert store.faults["late error"] > 0
    assert store.faults["truncated"] > 0


def test_listings_that_are_behind_are_told_and_the_same_command_goes_on(
    tmp_path: Path, s3_uri: str, store: Unreliable
) -> None:
    small = micro_bench(tmp_path, num_sources=2)
    uploaded(small, s3_uri)
    store.stale_share = 1.0
    for k in (5,):
        parameters = {"parameters": {"k": k}}
        run(small.recipe(**parameters), address="none")
        assert at_last(small, s3_uri, **parameters) == local(small)
    assert store.faults["stale"] > 0


def at_last(bench: Bench, uri: str, **changes: Any) -> dict[str, bytes]:
    """As `merged`, the same command given again where that is the advice."""
    for _ in range(3):
        with contextlib.suppress(StoreError):
            return merged(bench, uri, **changes)
    return merged(bench, uri, **changes)


def test_a_store_that_does_not_enforce_put_once_is_told_of(
    tmp_path: Path, s3_uri: str, store: Unreliable
) -> None:
    small = micro_bench(tmp_path, num_sources=2)
    assert run(small.recipe(store=s3_uri), address="none").warnings == []
    store.unconditional = True
    (told,) = run(small.recipe(store=s3_uri), address="none").warnings
    assert told.startswith(f"{s3_uri}: does not enforce put-once")


def test_what_is_shorter_than_asked_for_is_asked_for_again(
    bench: Bench, uri: str, store: Unreliable
) -> None:
    store.lying_share = 0.02
    assert merged(bench, uri) == local(bench)
    assert store.faults["lie"] > 0


def test_a_store_that_always_lies_of_lengths_is_caught_by_name(
    bench: Bench, uri: str, store: Unreliable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)
    store.lying_share = 1.0
    with pytest.raises(Exception, match=r"model\.safetensors: ended early"):
        merged(bench, uri)


def test_a_store_that_alters_what_it_holds_is_caught_by_name(
    bench: Bench, uri: str, store: Unreliable
) -> None:
    store.flipped = "store/components"
    with pytest.raises(StoreError, match=r"components/"):
        merged(bench, uri)


def test_a_source_is_read_once_and_nothing_but_its_tensors(
    bench: Bench, uri: str, store: Unreliable
) -> None:
    merged(bench, uri)
    for source in bench.sources:
        tensors = sum(t.nbytes for t in open_checkpoint(str(source)).tensors.values())
        header = (source / "model.safetensors").stat().st_size - tensors
        sent = sum(n for key, n in store.bytes_sent.items() if f"/{source.name}/model" in key)
        # Of a model this small the header counts: before anything starts, and for the run.
        assert 0 < sent <= 1.02 * tensors + 2 * header
