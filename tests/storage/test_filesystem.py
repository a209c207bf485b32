"""One contract that every kind of store keeps, then what is special to each."""

import errno
import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import _registry  # the public one is a view of it and not to be changed

from svdmerge.errors import RetryableError, StoreError, SvdmergeError
from svdmerge.storage.filesystem import Folder


class Interruption(Exception):
    """An error of the caller's own."""


def abort(folder: Folder, path: str, data: bytes) -> None:
    """Stream data to the path and fail before the end."""
    with folder.writing(path) as out:
        out.write(data)
        raise Interruption


def bite(number: int) -> bytes:
    """Bytes that tell who wrote them, of a length of their own."""
    return bytes([number]) * (100 + number)


class FolderContract:
    """What the library relies on, whatever the filesystem. Subclasses give the folder."""

    @pytest.fixture
    def folder(self) -> Folder:
        raise NotImplementedError

    # --- reading what was written ---

    @pytest.mark.parametrize("data", [b"", b"x", bytes(range(256)) * 300])
    def test_what_was_put_is_read(self, folder: Folder, data: bytes) -> None:
        folder.put("a/b/file.bin", data)
        assert folder.read("a/b/file.bin") == data

    def test_a_range_is_read(self, folder: Folder) -> None:
        folder.put("file", b"0123456789")
        assert folder.read("file", start=2, stop=5) == b"234"
        assert folder.read("file", start=0, stop=1) == b"0"
        assert folder.read("file", start=7) == b"789"
        assert folder.read("file", stop=3) == b"012"
        assert folder.read("file", start=8, stop=99) == b"89"

    def test_putting_again_replaces(self, folder: Folder) -> None:
        folder.put("file", b"a long first version")
        folder.put("file", b"second")
        assert folder.read("file") == b"second"

    def test_scratch_is_written_whole_and_replaced_alike(self, folder: Folder) -> None:
        folder.put_scratch("a/file", b"a long first version")
        folder.put_scratch("a/file", b"second")
        assert folder.read("a/file") == b"second"
        assert folder.find() == {"a/file": 6}

    def test_a_missing_file_is_not_found(self, folder: Folder) -> None:
        folder.put("there", b"x")
        with pytest.raises(FileNotFoundError):
            folder.read("not/there")

    def test_the_same_uri_gives_the_same_folder(self, folder: Folder) -> None:
        folder.put("a/file", b"x")
        assert Folder.at(folder.uri) == folder
        assert Folder.at(folder.uri + "/") == folder
        assert folder.child("a").read("file") == b"x"
        assert folder.child("a").parent == folder
        assert folder.child("a").name == "a"

    # --- looking ---

    def test_a_stat_has_the_size_and_changes_with_the_content(self, folder: Folder) -> None:
        folder.put("file", b"12345")
        first = folder.stat("file")
        assert first is not None
        assert first.size == 5
        assert first.version
        assert folder.stat("file") == first
        folder.put("file", b"54321")
        assert folder.stat("file") != first

    def test_what_is_no_file_has_no_stat(self, folder: Folder) -> None:
        folder.put("a/file", b"x")
        assert folder.stat("a") is None
        assert folder.stat("none") is None
        assert folder.stat("a/none") is None
        assert folder.stat("a/file/below") is None
        assert folder.child("a/file").stat() is not None

    def test_existence_is_told_of_files_and_folders(self, folder: Folder) -> None:
        folder.put("a/file", b"x")
        assert folder.exists("a")
        assert folder.exists("a/file")
        assert folder.exists()
        assert not folder.exists("b")
        assert not folder.exists("a/fil")

    def test_names_are_those_directly_below_in_order(self, folder: Folder) -> None:
        for path in ("b", "a/x", "a/y", "c/d/e"):
            folder.put(path, b"x")
        assert folder.names() == ["a", "b", "c"]
        assert folder.child("a").names() == ["x", "y"]
        assert folder.child("none").names() == []

    def test_find_tells_every_file_below_with_its_size(self, folder: Folder) -> None:
        for size, path in enumerate(("top", "a/x", "a/b/y", "ab/z")):
            folder.put(path, b"x" * size)
        assert folder.find() == {"a/b/y": 2, "a/x": 1, "ab/z": 3, "top": 0}
        assert folder.find("a") == {"a/b/y": 2, "a/x": 1}
        assert folder.find("none") == {}
        assert list(folder.find()) == sorted(folder.find())

    # --- writing whole or not at all ---

    def test_a_stream_appears_when_the_block_ends(self, folder: Folder) -> None:
        with folder.writing("a/stream") as out:
            out.write(b"one ")
            assert not folder.exists("a/stream")
            out.write(b"two")
        assert folder.read("a/stream") == b"one two"

    def test_a_stream_larger_than_a_part_is_whole(self, folder: Folder) -> None:
        block = os.urandom(1 << 20)
        with folder.writing("large") as out:
            for _ in range(7):
                out.write(block)
        assert folder.read("large") == 7 * block
        assert folder.read("large", start=(6 << 20) + 5, stop=(6 << 20) + 9) == block[5:9]

    @pytest.mark.parametrize("size", [10, 7 << 20])
    def test_an_aborted_stream_leaves_nothing(self, folder: Folder, size: int) -> None:
        folder.put("other", b"x")
        with pytest.raises(Interruption):
            abort(folder, "a/stream", b"x" * size)
        assert folder.find() == {"other": 1}

    def test_an_aborted_stream_leaves_the_earlier_file(self, folder: Folder) -> None:
        folder.put("file", b"earlier")
        with pytest.raises(Interruption):
            abort(folder, "file", b"half of a later one")
        assert folder.read("file") == b"earlier"
        assert folder.find() == {"file": 7}

    def test_after_an_aborted_stream_the_next_one_is_written(self, folder: Folder) -> None:
        with pytest.raises(Interruption):
            abort(folder, "file", b"half")
        with folder.writing("file") as out:
            out.write(b"whole")
        assert folder.read("file") == b"whole"

    def test_two_streams_at_once_do_not_disturb_each_other(self, folder: Folder) -> None:
        with folder.writing("one") as one:
            one.write(b"1")
            with folder.writing("other") as other:
                other.write(b"2")
            assert folder.exists("other")
            assert not folder.exists("one")
            one.write(b"1")
        assert folder.read("one") == b"11"
        assert folder.read("other") == b"2"

    def test_a_stream_that_aborts_does_not_abort_another(self, folder: Folder) -> None:
        with folder.writing("outer") as outer:
            outer.write(b"1")
            with pytest.raises(Interruption):
                abort(folder, "inner", b"2")
            outer.write(b"1")
        assert folder.find() == {"outer": 2}

    def test_a_put_during_a_stream_is_there_at_once(self, folder: Folder) -> None:
        with folder.writing("stream") as out:
            out.write(b"x")
            folder.put("put", b"1")
            assert folder.read("put") == b"1"
            assert folder.put_once("once", b"first")
            assert not folder.put_once("once", b"second")
        assert folder.read("once") == b"first"

    # --- put once ---

    def test_the_second_to_put_once_is_told_so_and_changes_nothing(self, folder: Folder) -> None:
        assert folder.put_once("a/once", b"first")
        before = folder.stat("a/once")
        assert not folder.put_once("a/once", b"second, longer")
        assert folder.read("a/once") == b"first"
        assert folder.stat("a/once") == before
        assert folder.find() == {"a/once": 5}

    def test_put_once_is_enforced_and_trying_leaves_nothing(self, folder: Folder) -> None:
        assert folder.enforces_put_once()
        assert folder.find() == {}

    def test_put_once_after_removal_writes_again(self, folder: Folder) -> None:
        assert folder.put_once("once", b"first")
        folder.remove("once")
        assert folder.put_once("once", b"second")
        assert folder.read("once") == b"second"

    # --- removing ---

    def test_a_file_is_removed_and_its_siblings_stay(self, folder: Folder) -> None:
        for path in ("a/x", "a/y", "a/xx"):
            folder.put(path, b"1")
        folder.remove("a/x")
        assert folder.find() == {"a/xx": 1, "a/y": 1}

    def test_a_folder_is_removed_with_all_below_and_its_siblings_stay(self, folder: Folder) -> None:
        for path in ("a/x", "a/b/y", "ab/z", "c"):
            folder.put(path, b"1")
        folder.remove("a")
        assert folder.find() == {"ab/z": 1, "c": 1}
        assert not folder.exists("a")

    def test_removing_what_is_not_there_is_no_error(self, folder: Folder) -> None:
        folder.put("file", b"1")
        folder.remove("none")
        folder.remove("a/none")
        assert folder.find() == {"file": 1}

    @pytest.mark.parametrize("name", ["a[1]", "a*", "a?"])
    def test_a_name_is_a_name_and_not_a_pattern(self, folder: Folder, name: str) -> None:
        folder.put("a1/file", b"neighbour")
        folder.put(f"{name}/file", b"mine")
        assert folder.read(f"{name}/file") == b"mine"
        assert folder.find(name) == {f"{name}/file": 4}
        folder.remove(name)
        assert folder.find() == {"a1/file": 9}

    @pytest.mark.parametrize("name", ["sp ace", "ünïcode", "pl+us", "per%20cent", "ha#sh", "e=q"])
    def test_any_name_comes_back_as_it_is(self, folder: Folder, name: str) -> None:
        folder.put(f"{name}/{name}.json", b"x")
        assert folder.names() == [name]
        assert folder.find() == {f"{name}/{name}.json": 1}
        assert folder.child(name).read(f"{name}.json") == b"x"

    def test_a_probe_leaves_nothing(self, folder: Folder) -> None:
        folder.put("file", b"1")
        folder.probe_writable()
        assert folder.find() == {"file": 1}


class RaceContract:
    """What stores that several processes share keep besides."""

    def test_of_twenty_writers_exactly_one_puts_once(self, folder: Folder) -> None:
        start = threading.Barrier(20)

        def write(number: int) -> bool:
            start.wait()
            return folder.put_once("commits/race.json", bite(number))

        with ThreadPoolExecutor(20) as pool:
            won = list(pool.map(write, range(20)))
        assert sum(won) == 1
        assert folder.read("commits/race.json") == bite(won.index(True))
        assert list(folder.find()) == ["commits/race.json"]

    def test_writers_of_different_files_do_not_disturb_each_other(self, folder: Folder) -> None:
        start = threading.Barrier(8)

        def write(number: int) -> None:
            start.wait()
            with folder.writing(f"file-{number}") as out:
                for byte in bite(number):
                    out.write(bytes([byte]))

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(write, range(8)))
        assert {name: folder.read(name) for name in folder.names()} == {
            f"file-{n}": bite(n) for n in range(8)
        }


class TestLocal(FolderContract, RaceContract):
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Folder:
        return Folder.at(tmp_path / "store")

    def test_it_is_local_and_shared(self, folder: Folder) -> None:
        assert folder.is_local
        assert folder.is_shared


class TestFileUri(FolderContract):
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Folder:
        return Folder.at(f"file://{tmp_path}/store")

    def test_it_is_local(self, folder: Folder) -> None:
        assert folder.is_local


class TestMemory(FolderContract):
    @pytest.fixture
    def folder(self, memory_uri: str) -> Folder:
        return Folder.at(memory_uri)

    def test_other_processes_do_not_see_it(self, folder: Folder) -> None:
        assert not folder.is_local
        assert not folder.is_shared


class TestS3(FolderContract, RaceContract):
    @pytest.fixture
    def folder(self, s3_uri: str) -> Folder:
        return Folder.at(f"{s3_uri}/store")

    def test_it_is_shared_and_not_local(self, folder: Folder) -> None:
        assert not folder.is_local
        assert folder.is_shared

    def test_an_aborted_stream_leaves_no_parts_to_pay_for(
        self, folder: Folder, s3_server: str
    ) -> None:
        import boto3

        with pytest.raises(Interruption):
            abort(folder, "large", bytes(12 << 20))
        bucket = folder.uri.split("/")[2]
        client = boto3.client("s3", endpoint_url=s3_server)
        assert not client.list_multipart_uploads(Bucket=bucket).get("Uploads")

    def test_a_bucket_that_is_not_there_holds_nothing(self, s3_server: str) -> None:
        del s3_server
        folder = Folder.at("s3://no-such-bucket-anywhere/store")
        assert folder.stat("file") is None
        assert folder.names() == []
        assert folder.find() == {}
        with pytest.raises(FileNotFoundError):
            folder.read("file")
        with pytest.raises(StoreError, match="no-such-bucket-anywhere"):
            folder.put("file", b"x")

    def test_what_another_process_wrote_is_seen_at_once(
        self, folder: Folder, s3_server: str
    ) -> None:
        import boto3

        folder.put("a/x", b"1")
        assert folder.names() == ["a"]
        bucket = folder.uri.split("/")[2]
        client = boto3.client("s3", endpoint_url=s3_server)
        client.put_object(Bucket=bucket, Key="store/b/y", Body=b"22")
        assert folder.names() == ["a", "b"]
        assert folder.find() == {"a/x": 1, "b/y": 2}
        assert not folder.put_once("b/y", b"3")

    @pytest.mark.parametrize(
        "error",
        [
            OSError(errno.EINVAL, "The provided token is malformed"),
            OSError(errno.EINVAL, "At least one header is not valid"),
            OSError(errno.EBUSY, "Please reduce your request rate"),
            PermissionError("Access Denied"),
        ],
    )
    def test_a_failed_put_once_is_not_taken_for_one_that_came_second(
        self, folder: Folder, monkeypatch: pytest.MonkeyPatch, error: OSError
    ) -> None:
        def refuse(*args: Any, **kwargs: Any) -> None:
            raise error

        monkeypatch.setattr(folder.fs, "pipe_file", refuse)
        with pytest.raises(SvdmergeError, match=r"once"):
            folder.put_once("once", b"data")

    def test_a_store_that_tells_a_lost_race_as_412_is_understood(
        self, folder: Folder, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        whole = folder.fs.pipe_file

        def come_second(path: str, value: bytes, **kwargs: Any) -> None:
            whole(path, b"of the winner")
            raise OSError(errno.EINVAL, "At least one of the pre-conditions did not hold")

        monkeypatch.setattr(folder.fs, "pipe_file", come_second)
        assert not folder.put_once("once", b"of the loser")
        assert folder.read("once") == b"of the winner"


# --- places and protocols ---


def test_a_relative_path_is_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert Folder.at("store").uri == str(tmp_path.resolve() / "store")
    assert Folder.at("./a/../store").uri == str(tmp_path.resolve() / "store")


def test_the_home_of_the_user_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Folder.at("~/store").uri == str(tmp_path.resolve() / "store")


def test_the_root_of_a_filesystem_keeps_its_name() -> None:
    assert Folder.at("memory://").uri == "memory://"
    assert not Folder.at("memory://").is_local
    assert Folder.at("/").path("etc") == "/etc"


def test_a_protocol_that_is_not_known_is_named() -> None:
    with pytest.raises(StoreError, match="nosuch://bucket/store"):
        Folder.at("nosuch://bucket/store").exists()


CLOUDS = {"gs": "gcs", "gcs": "gcs", "abfs": "azure", "az": "azure"}


@pytest.mark.parametrize("protocol", CLOUDS)
def test_a_cloud_whose_package_is_missing_is_told_with_what_to_install(
    monkeypatch: pytest.MonkeyPatch, protocol: str
) -> None:
    for package in ("gcsfs", "adlfs"):
        monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(_registry, protocol, raising=False)
    folder = Folder.at(f"{protocol}://bucket/store")
    with pytest.raises(StoreError) as caught:
        folder.exists()
    assert folder.uri in str(caught.value)
    assert f"pip install 'svdmerge[{CLOUDS[protocol]}]'" in str(caught.value)


@pytest.mark.parametrize("protocol", CLOUDS)
def test_clouds_are_asked_not_to_remember_listings(
    monkeypatch: pytest.MonkeyPatch, protocol: str
) -> None:
    class Cloud(MemoryFileSystem):
        """Stands for the package's filesystem."""

    monkeypatch.setattr(Cloud, "protocol", protocol)
    monkeypatch.setitem(_registry, protocol, Cloud)
    folder = Folder.at(f"{protocol}://bucket/store")
    assert not folder.is_local
    assert folder.is_shared
    assert folder.fs.storage_options == {"use_listings_cache": False}


# --- local faults ---


@pytest.fixture
def local(tmp_path: Path) -> Folder:
    return Folder.at(tmp_path / "store")


def test_a_place_below_a_file_cannot_be_written_and_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    folder = Folder.at(tmp_path / "file" / "store")
    attempts = [
        lambda: folder.put("a", b"x"),
        lambda: folder.put_once("a", b"x"),
        folder.probe_writable,
    ]
    for attempt in attempts:
        with pytest.raises(StoreError) as caught:
            attempt()
        assert str(tmp_path / "file" / "store") in str(caught.value)
    assert (tmp_path / "file").read_text() == "x"


def test_a_place_below_a_file_holds_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    folder = Folder.at(tmp_path / "file" / "store")
    assert folder.stat() is None
    assert folder.stat("a") is None
    assert folder.names() == []
    assert folder.find() == {}
    assert not folder.exists("a")


def full(*args: Any, **kwargs: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("way", ["put", "put_once", "writing"])
@pytest.mark.parametrize("call", ["fsync", "mkstemp"])
def test_a_full_disk_is_told_and_nothing_half_written_remains(
    local: Folder, monkeypatch: pytest.MonkeyPatch, way: str, call: str
) -> None:
    local.put("earlier", b"x")
    monkeypatch.setattr(f"{'os' if call == 'fsync' else 'tempfile'}.{call}", full)

    def write() -> None:
        if way == "writing":
            with local.writing("file") as out:
                out.write(b"data")
        else:
            getattr(local, way)("file", b"data")

    with pytest.raises(StoreError, match=r"store/file: disk full"):
        write()
    monkeypatch.undo()
    assert local.find() == {"earlier": 1}
    write()
    assert local.read("file") == b"data"


@pytest.mark.parametrize("size", [4, 1 << 20])
def test_a_disk_that_is_really_full_is_told(local: Folder, size: int) -> None:
    def write() -> None:
        with local.writing("file") as out, open("/dev/full", "wb") as no_space:  # noqa: PTH123
            # This device takes no byte: the kernel's own ENOSPC, through the store's own file.
            os.dup2(no_space.fileno(), out.fileno())
            out.write(bytes(size))

    local.put("x", b"")
    with pytest.raises(StoreError, match="disk full"):
        write()
    assert local.find() == {"x": 0}


def test_a_linked_file_is_the_file_it_links_to(local: Folder, tmp_path: Path) -> None:
    local.put("blobs/abc", b"12345")
    (tmp_path / "store" / "model").symlink_to(tmp_path / "store" / "blobs" / "abc")
    stat = local.stat("model")
    assert stat is not None
    assert stat.size == 5
    assert local.read("model", start=1, stop=3) == b"23"


def test_files_are_readable_by_whom_the_umask_lets(local: Folder, tmp_path: Path) -> None:
    local.put("put", b"x")
    local.put_once("once", b"x")
    plain = tmp_path / "plain"
    plain.write_bytes(b"x")
    for name in ("put", "once"):
        assert (tmp_path / "store" / name).stat().st_mode == plain.stat().st_mode


@pytest.mark.parametrize("path", ["~nouser-of-this-name/x", "a\0b"])
def test_what_is_no_path_is_told(path: str) -> None:
    with pytest.raises(StoreError, match="is no path"):
        Folder.at(path)


@pytest.mark.parametrize(
    "uri",
    [
        "http://user:s3cret@host/model",
        "https://s3cret@host/model",
        "https://host/model.safetensors?signature=s3cret",
        "simplecache::https://host/model.safetensors?signature=s3cret",
        "ftp://user:s3cret@host/model",
    ],
)
def test_a_password_in_a_uri_is_refused_and_not_repeated(uri: str) -> None:
    with pytest.raises(StoreError) as caught:
        Folder.at(uri)
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize("uri", ["hf://name@main", "abfs://c@account.dfs.core.windows.net/x"])
def test_what_is_no_user_passes(uri: str) -> None:
    assert Folder.at(uri).uri == uri


class NoConnection(Exception):
    """What a library of the network raises: no OSError."""


class Unreachable(MemoryFileSystem):
    protocol = "unreachable"

    def info(self, path: str, **options: Any) -> Any:
        raise NoConnection("name or service not known")

    def ls(self, path: str, detail: bool = True, **options: Any) -> Any:
        raise NoConnection("name or service not known")

    def find(self, path: str, **options: Any) -> Any:
        raise NoConnection("name or service not known")


class Unopened(Unreachable):
    protocol = "unopened"

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        raise NoConnection("name or service not known")


@pytest.mark.parametrize("kind", [Unreachable, Unopened])
def test_errors_of_a_networks_own_kinds_are_told_with_the_place(kind: type[Unreachable]) -> None:
    fsspec.register_implementation(str(kind.protocol), kind, clobber=True)
    folder = Folder.at(f"{kind.protocol}://org/model")
    for work in (folder.stat, folder.names, folder.find):
        with pytest.raises(RetryableError) as caught:
            work()
        assert folder.uri in str(caught.value)
        assert "NoConnection" in str(caught.value)


def test_a_filesystem_that_overwrites_does_not_enforce_put_once(
    memory_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Folder.at(memory_uri)
    real = folder.fs.pipe_file
    monkeypatch.setattr(folder.fs, "pipe_file", lambda path, value, **_: real(path, value))
    assert not folder.enforces_put_once()
    assert folder.names() == []


def test_a_place_has_the_versions_of_its_files(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for name in ("a", "b"):
        (tmp_path / "data" / name).write_text(name)
    folder, file = Folder.at(tmp_path / "data"), Folder.at(tmp_path / "data/a")
    before, of_file = folder.versions(), file.versions()
    assert [(name, size) for name, size, _ in before] == [("a", 1), ("b", 1)]
    assert of_file == [("", 1, before[0][2])]
    # Of the same size, in place.
    os.utime(tmp_path / "data/a", ns=(1, 1))
    assert [x == y for x, y in zip(before, folder.versions(), strict=True)] == [False, True]
    assert file.versions() != of_file
