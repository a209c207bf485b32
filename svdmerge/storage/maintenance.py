"""Looking after a store: what it holds, whether it is whole, and removing orphans."""

import hashlib
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass

from svdmerge.errors import StoreError
from svdmerge.storage.filesystem import Folder
from svdmerge.storage.manifest import Commit, objects, read_commit
from svdmerge.storage.output import is_partial
from svdmerge.storage.shards import decode_spectra, read_blocks

# An object without a commit may belong to a task that is still running; a day is longer than any.
GRACE_S = 24 * 3600.0
# Where a run's merged factors lie, with their own commits beside them.
FACTORS = "/factors"


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredSource:
    """What the store holds of one source under one base."""

    base: str
    source: str
    num_commits: int
    num_components: int
    size_bytes: int


def list_sources(store: Folder) -> list[StoredSource]:
    """One row per base and source."""
    found: dict[tuple[str, str], list[Commit]] = {}
    for path, commit in _commits(store):
        _, base, source = path.split("/")[:3]
        found.setdefault((base, source), []).append(commit)
    return [
        StoredSource(
            base=base,
            source=source,
            num_commits=len(commits),
            num_components=sum(b.count for c in commits for b in c.blocks),
            size_bytes=sum(e.size for c in commits for e in objects(c)),
        )
        for (base, source), commits in sorted(found.items())
    ]


def verify(store: Folder) -> list[str]:
    """Faults, one line each: every committed object, factors of runs too, is read and compared."""
    faults: list[str] = []
    for path in [*_commit_paths(store), *_factor_commit_paths(store)]:
        # Factors are named from their run's folder on, components from the store's.
        root = _factors_root(path) if FACTORS in path else ""
        try:
            commit = read_commit(store, path)
            _check_objects(store.child(root) if root else store, commit)
        except StoreError as error:
            faults.append(f"{path}: {error.args[0]}")
    return faults


def _check_objects(folder: Folder, commit: Commit) -> None:
    for entry in objects(commit):
        if folder.stat(entry.path) is None:
            raise StoreError(f"{entry.path}: missing")
        if hashlib.sha256(folder.read(entry.path)).hexdigest() != entry.sha256:
            raise StoreError(f"{entry.path}: its content changed")
    if commit.spectrum is not None:
        decode_spectra(folder.read(commit.spectrum.path))
    for _ in read_blocks(folder, commit.shard.path, commit.blocks):
        pass


def collect_garbage(store: Folder, *, grace_s: float = GRACE_S) -> list[str]:
    """Remove what no commit names and half-written files, older than the grace; their paths."""
    named = {e.path for _, commit in _commits(store) for e in objects(commit)}
    for path in _factor_commit_paths(store):
        root, commit = _factors_root(path), read_commit(store, path)
        named |= {f"{root}/{e.path}" for e in objects(commit)}
    removed: list[str] = []
    partial = [path for path in store.find() if is_partial(path)]
    factors = [p for p in store.find("runs") if f"{FACTORS}/" in p and p.endswith(".arrow")]
    scratch = store.find("scratch")  # of drivers that were killed
    for path in sorted({*store.find("components"), *factors, *partial, *scratch}):
        if path not in named and _age_s(store, path) >= grace_s:
            store.remove(path)
            removed.append(path)
    return removed


def _age_s(store: Folder, path: str) -> float:
    """Seconds since a file was written; below zero if a driver has just removed it."""
    try:
        return time.time() - store.fs.modified(store.path(path)).timestamp()
    except FileNotFoundError:
        return -math.inf


def _commit_paths(store: Folder) -> list[str]:
    return [path for path in store.find("commits") if path.endswith(".json")]


def _factor_commit_paths(store: Folder) -> list[str]:
    return [p for p in store.find("runs") if FACTORS in p and p.endswith(".json")]


def _factors_root(path: str) -> str:
    return path.partition(FACTORS)[0] + FACTORS


def _commits(store: Folder) -> Iterator[tuple[str, Commit]]:
    for path in _commit_paths(store):
        yield path, read_commit(store, path)
