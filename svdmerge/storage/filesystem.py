"""Files at a path or fsspec URI: range reads, listings, and writes that are whole or absent."""

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
from tenacity import retry, retry_if_exception_type, stop_after_attempt, wait_exponential_jitter

from svdmerge.errors import RetryableError, StoreError, SvdmergeError

# What installs the filesystem of a protocol: `pip install 'svdmerge[...]'`.
_EXTRAS = {"s3": "s3", "gs": "gcs", "gcs": "gcs", "abfs": "azure", "abfss": "azure", "az": "azure"}
# They cache listings per process; a store is written by many.
_OPTIONS: dict[str, dict[str, Any]] = {p: {"use_listings_cache": False} for p in _EXTRAS}
# Nor are listings of the hub's buckets remembered; commits of its repositories do not change.
_BUCKETS = "hf://buckets/"
# The hub's files read ahead megabytes, which a range is not to.
_READING: dict[str, dict[str, Any]] = {"hf": {"cache_type": "none"}}

# One request in twenty may fail and a run still makes thousands: six tries leave 2e-8 of them. The
# last pause is two to three seconds, of the order of a store's own advice to slow down; what lasts
# longer is for the unit's own retries.
_again = retry(
    retry=retry_if_exception_type(RetryableError),
    stop=stop_after_attempt(6),
    wait=wait_exponential_jitter(initial=0.1, max=5.0, jitter=0.1),
    reraise=True,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class FileStat:
    """What identifies a file's version: its size, and an ETag or modification time."""

    size: int
    version: str


@dataclass(frozen=True, slots=True)
class Folder:
    """A folder of any fsspec filesystem. Holds only its URI, so it travels to workers as text."""

    uri: str

    @staticmethod
    def at(uri: str | Path) -> "Folder":
        """The folder at a path or URI; local paths are made absolute, workers have another cwd."""
        text = str(uri)
        if "://" not in text:
            try:
                text = str(Path(text).expanduser().resolve())
            except (
                RuntimeError,
                ValueError,
                OSError,
            ) as error:  # no such user, NUL, a loop of links
                raise StoreError(f"{text!r}: is no path", str(error), "Correct it.") from None
        elif _holds_secret(text):
            raise StoreError(
                f"{text.split('://')[0]}://...: the URI holds a password, or may hold a token",
                "Places are written to cards, manifests and reports.",
                "Give credentials by the environment; leave out what is before `@` or after `?`.",
            )
        # The root of a filesystem, such as memory://, keeps its slashes.
        return Folder(text if text.endswith("://") or not text.strip("/") else text.rstrip("/"))

    @property
    def fs(self) -> Any:
        """The filesystem, cached by fsspec per process."""
        return self._open()[0]

    @property
    def is_local(self) -> bool:
        """Whether this is the local filesystem."""
        return "file" in _protocols(self.fs)

    @property
    def is_shared(self) -> bool:
        """Whether other processes see what one writes."""
        return "memory" not in _protocols(self.fs)

    @property
    def parent(self) -> "Folder":
        """The folder that holds this one."""
        return Folder(self.uri.rsplit("/", 1)[0])

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self.uri.rsplit("/", 1)[-1]

    def child(self, relative: str) -> "Folder":
        """A folder below this one."""
        return Folder(f"{self.uri}/{relative}")

    def path(self, relative: str = "") -> str:
        """The filesystem's own path of a file below this folder."""
        root = self._open()[1].rstrip("/")
        return f"{root}/{relative}" if relative else root

    @_again
    def stat(self, relative: str = "") -> FileStat | None:
        """Size and version of a file; None if there is no such file."""
        try:
            with _reading(self, relative):
                info = self.fs.info(self.path(relative), **self._afresh)
        except (FileNotFoundError, NotADirectoryError):
            return None
        if info.get("type") != "file":
            return None
        if self.is_local:
            version = str(os.stat(self.path(relative)).st_mtime_ns)  # noqa: PTH116
        else:
            keys = (
                "ETag", "etag", "md5Hash", "blob_id", "xet_hash", "created", "LastModified", "mtime"
            )  # fmt: skip
            version = next((str(info[k]) for k in keys if info.get(k)), "")
        return FileStat(size=int(info["size"]), version=version)

    @_again
    def exists(self, relative: str = "") -> bool:
        """Whether a file or folder is there."""
        with _reading(self, relative):
            return bool(self.fs.exists(self.path(relative), **self._afresh))

    @_again
    def names(self) -> list[str]:
        """Names of the files and folders directly below; empty if the folder is missing."""
        try:
            with _reading(self, ""):
                found = self.fs.ls(self.path(), detail=False, **self._afresh)
        except (FileNotFoundError, NotADirectoryError):
            return []
        return sorted(str(p).rstrip("/").rsplit("/", 1)[-1] for p in found)

    @_again
    def find(self, relative: str = "") -> dict[str, int]:
        """Sizes of all files below, by path relative to this folder."""
        root = self.path() + "/"
        try:
            with _reading(self, relative):
                found: dict[str, Any] = self.fs.find(
                    self.path(relative), detail=True, **self._afresh
                )
        except FileNotFoundError:
            return {}
        return {p.removeprefix(root): int(i["size"]) for p, i in sorted(found.items())}

    def versions(self) -> list[tuple[str, int, str]]:
        """Name, size and version of every file below, or of the file that this place is."""
        if (own := self.stat()) is not None:
            return [("", own.size, own.version)]
        stats = ((name, self.stat(name)) for name in self.find())
        return [(name, s.size, s.version) for name, s in stats if s is not None]

    @_again
    def glob(self, pattern: str) -> dict[str, bool]:
        """Paths below that match now, relative to this folder, and whether each is a folder."""
        root = self.path() + "/"
        with _reading(self, pattern):
            found: dict[str, Any] = self.fs.glob(self.path(pattern), detail=True)
        return {
            p.rstrip("/").removeprefix(root): i["type"] == "directory"
            for p, i in sorted(found.items())
        }

    @_again
    def read(self, relative: str, *, start: int | None = None, stop: int | None = None) -> bytes:
        """A file's bytes, or those of a range; fewer only where the file ends.

        Raises:
            FileNotFoundError: there is no such file.
            StoreError: it cannot be read; RetryableError, if another try may help.
        """
        if not self.is_local:  # a body cut short must not pass for a file
            return self._read_network(relative, start=start or 0, stop=stop)
        with _reading(self, relative):
            return self.fs.cat_file(self.path(relative), start=start, end=stop)

    def _read_network(self, relative: str, *, start: int, stop: int | None) -> bytes:
        stat = self.stat(relative)
        if stat is None:
            raise FileNotFoundError(f"{self.uri}/{relative}")
        end = stat.size if stop is None else min(stop, stat.size)
        return self.read_exactly(relative, start=start, count=end - start) if end > start else b""

    @_again
    def read_exactly(self, relative: str, *, start: int, count: int) -> bytes:
        """So many bytes of a file from one on. Raises: as `read`, and if there are fewer."""
        with _reading(self, relative):
            options = _READING.get(_protocol(self.uri), {})
            path, end = self.path(relative), start + count
            data: bytes = self.fs.cat_file(path, start=start, end=end, **options)
        if len(data) != count:
            # A connection that broke is told so by few filesystems; a file cut short stays so.
            kind = StoreError if self.is_local else RetryableError
            raise kind(
                f"{self.uri}/{relative}: ended early",
                f"Got {len(data)} bytes from byte {start} on, expected {count}.",
                "Check the file, and fetch it again.",
            )
        return data

    @_again
    def put(self, relative: str, data: bytes) -> None:
        """Write a file whole; an older one is replaced."""
        if self.is_local:
            with self.writing(relative) as out:
                out.write(data)
            return
        with _told(self, relative):
            self.fs.pipe_file(self.path(relative), data)

    def put_scratch(self, relative: str, data: bytes) -> None:
        """Write a file whole that nothing relies on after a crash: not waited for until it is on
        the disk, which takes longer than the write."""
        if not self.is_local:
            self.put(relative, data)
            return
        with _told(self, relative), _temporary(Path(self.path(relative))) as (out, temporary):
            out.write(data)
            out.flush()
            temporary.replace(self.path(relative))

    @contextlib.contextmanager
    def writing(self, relative: str) -> Generator[Any]:
        """A file to stream into: it appears when the block ends well, and never if it raises."""
        with _told(self, relative):
            if not self.is_local:
                # Uploaded when whole. fsspec's own transactions belong to a filesystem, not to a
                # file: two streams at once would commit or discard each other's.
                with tempfile.NamedTemporaryFile(prefix="svdmerge-") as out:
                    yield out
                    out.flush()
                    self.fs.put_file(out.name, self.path(relative))
                return
            target = Path(self.path(relative))
            with _temporary(target) as (out, temporary):
                yield out
                _sync(out)
                temporary.replace(target)

    @_again
    def put_once(self, relative: str, data: bytes) -> bool:
        """Write a file unless one is there; whether this call wrote it."""
        with _told(self, relative):
            if self.is_local:
                target = Path(self.path(relative))
                with _temporary(target) as (out, temporary):
                    out.write(data)
                    _sync(out)
                    return _link(temporary, target)
            return not self.exists(relative) and self._created(relative, data)

    def _created(self, relative: str, data: bytes) -> bool:
        """Whether the store took a file on condition that there is none (If-None-Match)."""
        try:
            self.fs.pipe_file(self.path(relative), data, mode="create")
        except FileExistsError:
            return False
        except OSError as error:
            # s3fs tells a failed If-None-Match (HTTP 412) as EINVAL, and much else besides.
            if error.errno == errno.EINVAL and self.exists(relative):
                return False
            raise
        return True

    def enforces_put_once(self) -> bool:
        """Whether of two that put a file once at the same time only one wins: tried, for a store
        that does not know the condition takes both."""
        if self.is_local:
            return True
        probe = f".svdmerge-probe-{os.urandom(8).hex()}"
        try:
            self.put(probe, b"")
            return not self._tried(probe)
        finally:
            self.remove(probe)

    @_again
    def _tried(self, relative: str) -> bool:
        with _told(self, relative):
            return self._created(relative, b"")

    @_again
    def remove(self, relative: str = "") -> None:
        """Delete a file or folder, if it is there. Names are names: no pattern is expanded."""
        with _told(self, relative):
            if self.stat(relative) is not None:
                self.fs.rm_file(self.path(relative))
            elif self.is_local:
                shutil.rmtree(self.path(relative), ignore_errors=True)
            else:
                for path in self.find(relative):
                    self.fs.rm_file(self.path(path))

    def probe_writable(self) -> None:
        """Raise StoreError unless a file can be written here."""
        probe = f".svdmerge-probe-{os.getpid()}"
        self.put(probe, b"")
        self.remove(probe)

    @property
    def _afresh(self) -> dict[str, bool]:
        """What makes a filesystem look again where it would remember."""
        return {"refresh": True} if self.uri.startswith(_BUCKETS) else {}

    def _open(self) -> tuple[Any, str]:
        try:
            return fsspec.url_to_fs(self.uri, **_OPTIONS.get(_protocol(self.uri), {}))
        except (ImportError, ValueError) as error:
            extra = _EXTRAS.get(_protocol(self.uri))
            missing = extra is not None and isinstance(error, ImportError)
            fix = f"Install it: pip install 'svdmerge[{extra}]'." if missing else ""
            raise StoreError(f"{self.uri}: cannot be opened", str(error), fix) from None
        except Exception as error:  # the hub is asked already here: see _reading
            raise RetryableError(
                f"{self.uri}: cannot be opened", _named(error), "Check the address and the network."
            ) from error


def _holds_secret(uri: str) -> bool:
    """Whether it names a password; on the web also a user, which may be a token, or a query, which
    signs addresses."""
    kinds, _, rest = uri.partition("://")
    address = rest.split("/")[0]
    on_web = kinds.split(":")[-1] in ("http", "https")
    return ("@" in address and (on_web or ":" in address)) or (on_web and "?" in rest)


def _protocol(uri: str) -> str:
    return uri.split("://", 1)[0] if "://" in uri else "file"


def _protocols(fs: Any) -> tuple[str, ...]:
    return (fs.protocol,) if isinstance(fs.protocol, str) else tuple(fs.protocol)


@contextlib.contextmanager
def _temporary(target: Path) -> Generator[tuple[Any, Path]]:
    """A file beside the target, removed unless renamed. Dot names are never read as data."""
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=".", suffix=".partial", dir=target.parent)
    os.chmod(name, 0o666 & ~_UMASK)  # noqa: PTH101  mkstemp makes private files; outputs are not
    try:
        with os.fdopen(handle, "wb") as out:
            yield out, Path(name)
    finally:
        Path(name).unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


_UMASK = _umask()


def _sync(out: Any) -> None:
    out.flush()
    os.fsync(out.fileno())


def _link(temporary: Path, target: Path) -> bool:
    try:
        os.link(temporary, target)  # fails where the target exists: put-once
    except FileExistsError:
        return False
    return True


@contextlib.contextmanager
def _reading(folder: Folder, relative: str) -> Generator[None]:
    """Turn a failed read into an error that names the file; a missing one stays what it is."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError):
        raise
    except OSError as error:
        place = f"{folder.uri}/{relative}".rstrip("/")
        if isinstance(error, PermissionError):
            raise StoreError(
                f"{place}: access refused", str(error), "Check permissions and credentials."
            ) from error
        # A disk that fails once fails again; a network may not.
        kind = StoreError if folder.is_local else RetryableError
        raise kind(f"{place}: cannot be read", str(error), "Check the store.") from error
    except Exception as error:
        # Filesystems of the network let their libraries' errors through, each of its own kind.
        if folder.is_local or isinstance(error, SvdmergeError):
            raise
        raise RetryableError(
            f"{folder.uri}/{relative}".rstrip("/") + ": cannot be read",
            _named(error),
            "Check the address and the network.",
        ) from error


def _named(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


@contextlib.contextmanager
def _told(folder: Folder, relative: str) -> Generator[None]:
    """Turn a failed write into an error that names the file and the way out."""
    try:
        yield
    except OSError as error:
        place = f"{folder.uri}/{relative}"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StoreError(
                f"{place}: disk full", str(error), "Free space, then run the same command again."
            ) from error
        lasting = isinstance(error, PermissionError | FileNotFoundError)
        # A disk that fails once fails again, and so does a request that is refused as wrong.
        again = not (folder.is_local or lasting or error.errno == errno.EINVAL)
        kind = RetryableError if again else StoreError
        raise kind(
            f"{place}: cannot be written", str(error), "Check the path and its permissions."
        ) from error
