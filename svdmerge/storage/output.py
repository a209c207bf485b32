"""The output folder: whose it is, how it appears whole, and whether it is what it claims."""

import fcntl
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from svdmerge.errors import OutputError
from svdmerge.storage.checkpoint import INDEX
from svdmerge.storage.filesystem import Folder
from svdmerge.storage.hf_model import WrittenFile, file_sha256
from svdmerge.storage.layout import MANIFEST

# Lies in an output that is being written in its place, until it is whole.
UNFINISHED = ".svdmerge-unfinished"


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What an output claims: the plan it comes from, and the sha256 of every file."""

    plan_hash: str
    svdmerge_version: str
    base: str
    base_revision: str
    sources: tuple[dict[str, Any], ...]
    actions: dict[str, str]
    files: dict[str, dict[str, Any]]
    base_licence: str | None = None
    """What its card states; a source's stands with it."""

    def to_json(self) -> bytes:
        """The manifest's bytes; no time and no host, so that equal runs write equal bytes."""
        return (json.dumps(asdict(self), indent=1, sort_keys=True) + "\n").encode()


def read_manifest(out: Folder) -> Manifest | None:
    """The manifest of an output; None if there is none.

    Raises:
        OutputError: it is malformed.
    """
    if out.stat(MANIFEST) is None:
        return None
    try:
        manifest = Manifest(**json.loads(out.read(MANIFEST)))
        if not all({"size", "sha256"} <= set(claim) for claim in manifest.files.values()):
            raise ValueError("a file has no size or sha256")
    except (ValueError, TypeError, AttributeError) as error:
        raise OutputError(
            f"{out.uri}/{MANIFEST}: malformed",
            str(error),
            "Delete that folder, or give another `out`, and run again.",
        ) from None
    return manifest


def check_ours(out: Folder) -> None:
    """Raise OutputError if the folder holds anything but an output of svdmerge, whole or not."""
    if out.stat() is not None:
        raise OutputError(f"{out.uri}: is a file", "Expected a folder.", "Give another `out`.")
    names = out.names()
    if names and UNFINISHED not in names and read_manifest(out) is None:
        raise OutputError(
            f"{out.uri}: holds something else ({', '.join(names[:3])})",
            f"Only an output of svdmerge, with its {MANIFEST}, is ever replaced.",
            "Give another `out`, or empty that folder yourself.",
        )


def staging(out: Folder, *, plan_hash: str) -> Folder:
    """Where an output is written before it is published.

    A local folder is renamed at the end. Object stores have no rename: files go in place, the old
    ones removed first. The index, without which shards are no model, goes first of those and last
    of the new ones but for the manifest.
    """
    if not out.is_local:
        out.put(UNFINISHED, b"")
        for name in sorted(out.find(), key=lambda n: n != INDEX):
            if name != UNFINISHED:
                out.remove(name)
        return out
    parent, _, name = out.uri.rpartition("/")
    folder = Folder(f"{parent}/.{name}.partial-{plan_hash[:8]}")
    _hold(out, Path(f"{folder.path()}.lock"))
    folder.remove()
    return folder


# Open lock files by path: a process keeps its locks until it publishes or ends, however it ends.
_HELD: dict[Path, Any] = {}


def _hold(out: Folder, path: Path) -> None:
    """Take the lock on an output that is being written. Raises: OutputError, if another has it."""
    if path in _HELD:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise OutputError(
            f"{out.uri}: is being written by another run",
            "Both would write the same files.",
            "Wait for it to end, or give another `out`.",
        ) from None
    except OSError:
        file.close()  # a filesystem without locks: one run at a time is then the user's rule
        return
    if not _is_at(file, path):  # its run ended, and took the name away, before this lock was had
        file.close()
        _hold(out, path)
        return
    _HELD[path] = file


def _is_at(file: Any, path: Path) -> bool:
    return path.exists() and os.path.samestat(path.stat(), os.fstat(file.fileno()))


def release(staged: Folder) -> None:
    """Give up the lock on an output, published or not."""
    path = Path(f"{staged.path()}.lock")
    file = _HELD.pop(path, None)
    if file is not None:
        path.unlink(missing_ok=True)
        file.close()


def publish(staged: Folder, out: Folder, *, manifest: Manifest) -> None:
    """Write the manifest and put the staged folder in the output's place, the old one replaced.

    Raises:
        OutputError: the place cannot be taken, or holds something else by now.
    """
    check_ours(out)  # once more: a user may have put files there meanwhile
    staged.put(MANIFEST, manifest.to_json())
    take_place(staged, out)


def take_place(staged: Folder, out: Folder) -> None:
    """Rename a local staged folder to the output's place, the old one replaced; give up the lock.
    One that was written in its place is told to be whole.

    Raises:
        OutputError: the place cannot be taken.
    """
    if staged == out:
        staged.remove(UNFINISHED)
        return
    target, old = Path(out.path()), Folder(f"{staged.uri}.old")
    try:
        if target.exists():
            old.remove()  # left by an attempt that was killed right here
            target.rename(old.path())
        Path(staged.path()).rename(target)
        old.remove()
        release(staged)
    except OSError as error:
        raise OutputError(
            f"{out.uri}: cannot be replaced",
            str(error),
            f"Check its permissions, or give another `out`; what was written is in {staged.uri}.",
        ) from error


def written_files(out: Folder, *, known: Sequence[WrittenFile]) -> dict[str, dict[str, Any]]:
    """Size and sha256 of every file in a folder; those known are not read again.

    What a killed worker left half-written is removed.
    """
    files = {f.file: {"size": f.size, "sha256": f.sha256} for f in known}
    for name, size in out.find().items():
        if is_partial(name):
            out.remove(name)
        elif name not in files and name not in (MANIFEST, UNFINISHED):
            digest = hashlib.sha256(out.read(name)).hexdigest()
            files[name] = {"size": size, "sha256": digest}
    return dict(sorted(files.items()))


def damaged_files(out: Folder, manifest: Manifest) -> list[str]:
    """What differs from the manifest, one line a file: missing, changed, or not of this output."""
    faults: list[str] = []
    sizes = out.find()
    for name, claim in manifest.files.items():
        if name not in sizes:
            faults.append(f"{name}: missing")
        elif sizes[name] != claim["size"]:
            faults.append(f"{name}: {sizes[name]} bytes, expected {claim['size']}")
        elif file_sha256(out, name) != claim["sha256"]:
            faults.append(f"{name}: its content changed")
    # A stray weights file would be loaded by some tools in place of ours.
    known = set(manifest.files)
    faults += [f"{n}: not of this output" for n in sizes if _is_weights(n) and n not in known]
    return faults


def is_partial(path: str) -> bool:
    """Whether a file is one that `Folder.writing` had not finished when its process was killed."""
    name = path.rsplit("/", 1)[-1]
    return name.startswith(".") and name.endswith(".partial")


def _is_weights(name: str) -> bool:
    return name.endswith((".safetensors", ".safetensors.index.json"))
