"""The same merge, all of it in a real S3 server, Debian's radosgw: `pytest -m s3`."""

import shutil
import socket
import subprocess
from collections.abc import Generator
from pathlib import Path

import boto3
import pytest
import s3fs
from merging import Bench, tiny_bench

from svdmerge.errors import StoreError
from svdmerge.recipe import parse_recipe
from svdmerge.storage.filesystem import Folder
from svdmerge.workflow import run

pytestmark = pytest.mark.s3
SCRIPT = Path(__file__).parent / "radosgw.sh"
ACCESS_KEY, SECRET_KEY = "AKTESTKEY12345678", "SK1234567890SECRET"


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Generator[str]:
    """A server's address."""
    assert shutil.which("radosgw"), "needs ceph-mon, ceph-osd, radosgw and ceph-common"
    folder = tmp_path_factory.mktemp("radosgw")
    with (folder / "up.log").open("w") as log:
        # Its daemons outlive the script and would hold a pipe open.
        subprocess.run([SCRIPT, "up", folder / "data", str(free_port())], stdout=log, check=True)
    yield (folder / "up.log").read_text().strip()
    subprocess.run([SCRIPT, "down", folder / "data"], check=True)


@pytest.fixture
def uri(server: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """A bucket."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", server)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", ACCESS_KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET_KEY)
    s3fs.S3FileSystem.clear_instance_cache()
    boto3.client("s3").create_bucket(Bucket="models")
    return "s3://models"


def uploaded(bench: Bench, uri: str) -> dict[str, object]:
    """The bench's recipe with models, store and output in the bucket."""
    for model in (bench.base, *bench.sources):
        for path in model.iterdir():
            Folder.at(f"{uri}/{model.name}").put(path.name, path.read_bytes())
    places = {"base_model": f"{uri}/{bench.base.name}", "store": f"{uri}/store"}
    models = [f"{uri}/{source.name}" for source in bench.sources]
    return bench.raw() | places | {"models": models, "out": f"{uri}/out"}


def test_a_merge_in_the_bucket_is_the_local_one_and_is_not_done_twice(
    tmp_path: Path, uri: str
) -> None:
    bench = tiny_bench(tmp_path)
    run(bench.recipe(), address="none")
    raw = uploaded(bench, uri)
    run(parse_recipe(raw), address="none")
    name = "model.safetensors"
    assert Folder.at(f"{uri}/out").read(name) == (bench.out / name).read_bytes()
    assert run(parse_recipe(raw), address="none").status == "unchanged"


def test_what_is_put_once_stays_and_wrong_credentials_are_told(
    uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Folder.at(f"{uri}/once")
    assert folder.put_once("a", b"first")
    assert not folder.put_once("a", b"second")
    assert folder.read("a") == b"first"
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not the secret")
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(StoreError, match="once/a"):
        folder.read("a")
    s3fs.S3FileSystem.clear_instance_cache()
