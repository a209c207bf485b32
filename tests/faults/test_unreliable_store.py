"""A store that fails, breaks off, is slow or lies: the same bytes, or a fault told by name."""

from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
import s3fs
from fsspec.core import url_to_fs
from merging import Bench, tiny_bench
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
    fs, root = url_to_fs(s3_uri)
    for model in (bench.base, *bench.sources):
        fs.put(f"{model}/", f"{root}/{model.name}/", recursive=True)
    return s3_uri


@pytest.fixture
def store(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> Generator[Unreliable]:
    """What stands before the bucket from now on; perfect until it is told otherwise."""
    with proxied(s3_server) as how:
        monkeypatch.setenv("AWS_ENDPOINT_URL", how.address)
        s3fs.S3FileSystem.clear_instance_cache()
        yield how
    s3fs.S3FileSystem.clear_instance_cache()


def merged(bench: Bench, uri: str) -> dict[str, bytes]:
    """The weights of the same merge, all of it in the bucket."""
    raw: dict[str, Any] = bench.raw() | {
        "base_model": f"{uri}/{bench.base.name}",
        "models": [f"{uri}/{source.name}" for source in bench.sources],
        "store": f"{uri}/store", "out": f"{uri}/out",
    }  # fmt: skip
    run(parse_recipe(raw), address="none")
    out = Folder.at(f"{uri}/out")
    return {n: out.read(n) for n in out.names() if n.endswith(".safetensors")}


def local(bench: Bench) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in Path(bench.out).glob("*.safetensors")}


def test_requests_that_fail_and_bodies_that_break_cost_time_alone(
    bench: Bench, uri: str, store: Unreliable
) -> None:
    store.error_share, store.truncated_share, store.latency_s = 0.05, 0.02, 0.005
    assert merged(bench, uri) == local(bench)
    assert store.faults["error"] > 5
    assert store.faults["late error"] > 0
    assert store.faults["truncated"] > 0


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
