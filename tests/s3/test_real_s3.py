"""The same merge, all of it in a real S3 server, Debian's radosgw: `pytest -m s3`."""

import os
import shutil
import socket
import subprocess
from collections.abc import Generator
from pathlib import Path

import boto3
import pytest
import s3fs
from merging import Bench, tiny_bench
from proxy import Unreliable, proxied

from svdmerge.engine.plan import Plan, Source, make_plan
from svdmerge.errors import StoreError
from svdmerge.recipe import parse_recipe
from svdmerge.storage.checkpoint import ITEM_BYTES
from svdmerge.storage.filesystem import Folder
from svdmerge.storage.layout import commits_path
from svdmerge.storage.manifest import Commit
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
def counted(server: str, monkeypatch: pytest.MonkeyPatch) -> Generator[Unreliable]:
    """What stands before the server, and counts what it hands out."""
    with proxied(server) as how:
        monkeypatch.setenv("AWS_ENDPOINT_URL", how.address)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", ACCESS_KEY)
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET_KEY)
        s3fs.S3FileSystem.clear_instance_cache()
        yield how
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture
def uri(counted: Unreliable) -> str:
    """A bucket."""
    name = f"models-{os.urandom(6).hex()}"
    boto3.client("s3").create_bucket(Bucket=name)
    return f"s3://{name}"


@pytest.fixture(
    params=[
        "tiny", pytest.param("zoo", marks=[pytest.mark.zoo, pytest.mark.timeout(1800)]),
    ]
)  # fmt: skip
def bench(request: pytest.FixtureRequest, tmp_path: Path) -> Bench:
    """Models on the disk: tiny ones, or those of the folder that SVDMERGE_ZOO names."""
    if request.param == "tiny":
        return tiny_bench(tmp_path)
    zoo = Path(os.environ["SVDMERGE_ZOO"])
    sources = sorted(p.parent for p in zoo.glob("*/config.json") if p.parent.name != "base")
    return Bench(root=tmp_path, base=zoo / "base", sources=tuple(sources))


def uploaded(bench: Bench, uri: str) -> dict[str, object]:
    """The bench's recipe with models, store and output in the bucket."""
    for model in (bench.base, *bench.sources):
        for path in model.iterdir():
            Folder.at(f"{uri}/{model.name}").put(path.name, path.read_bytes())
    places = {"base_model": f"{uri}/{bench.base.name}", "store": f"{uri}/store"}
    models = [f"{uri}/{source.name}" for source in bench.sources]
    return bench.raw() | places | {"models": models, "out": f"{uri}/out"}


def test_a_merge_in_the_bucket_is_the_local_one_reads_once_and_is_not_done_twice(
    bench: Bench, uri: str, counted: Unreliable
) -> None:
    run(bench.recipe(), address="none")
    recipe = parse_recipe(uploaded(bench, uri))
    run(recipe, address="none")
    name = "model.safetensors"
    assert Folder.at(f"{uri}/out").read(name) == (bench.out / name).read_bytes()

    bytes_sent = dict(counted.bytes_sent)
    plan = make_plan(recipe)
    for source in plan.sources:
        file = Path(source.reference).name + f"/{name}"
        sent = sum(n for key, n in bytes_sent.items() if key.endswith(file))
        needed = recorded_bytes(plan, source)
        print(f"\n{source.reference}: {sent} bytes, {sent / needed:.4f} of what passes need")  # noqa: T201
        tensors = source.checkpoint.tensors.values()
        header = next(iter(tensors)).stat.size - sum(t.nbytes for t in tensors)
        # The check before anything starts and the run look whether it is an adapter, and read it.
        assert 0 < sent <= 1.02 * needed + 4 * header
    assert run(recipe, address="none").status == "unchanged"


def recorded_bytes(plan: Plan, source: Source) -> int:
    """Bytes of the source's tensors that its commits say were read, once for each commit."""
    parameters = {p.source_id: p for p in plan.parameters}
    place = plan.store.child(commits_path(plan.base_key, source.revision))
    commits = [Commit.from_json(place.read(path)) for path in place.find()]
    return sum(
        p.numel * ITEM_BYTES[source.checkpoint.tensors[p.tensor].dtype]
        for commit in commits
        for p in (parameters[c.parameter] for c in commit.covered)
    )


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
