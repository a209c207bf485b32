"""Commits: records put once, written last, that say which objects of the store to trust."""

import contextlib
import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

from svdmerge.core.components import RankOneComponents, concatenate
from svdmerge.errors import StoreError
from svdmerge.storage import schema
from svdmerge.storage.filesystem import Folder
from svdmerge.storage.shards import (
    Block,
    Rows,
    Spectrum,
    decode_spectra,
    encode,
    encode_spectra,
    read_blocks,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A stored object: its path in the store, size and sha256."""

    path: str
    size: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Covered:
    """A matrix a commit covers: components first..depth-1, and the sha256 of what was read; of a
    merge's factors, as the source's, that of all they were made of."""

    parameter: str
    first: int
    depth: int
    source_sha256: str
    base_sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Coverage:
    """What a commit covers and which objects it names: its record less the blocks, which are most
    of it, and which only who reads components needs."""

    shard: Entry
    spectrum: Entry | None
    covered: tuple[Covered, ...]

    @staticmethod
    def from_json(data: bytes, *, place: str = "commit") -> "Coverage":
        """Of the record in bytes, read at a place. Raises: StoreError, if it is not one."""
        with _told(place):
            raw = _record(data, place)
            return Coverage(**{name: raw[name] for name in ("shard", "spectrum", "covered")})


@dataclass(frozen=True, slots=True, kw_only=True)
class Commit(Coverage):
    """What one unit of work left in the store."""

    blocks: tuple[Block, ...]
    solver: str
    numerics: str
    schema_version: int = schema.VERSION
    about: dict[str, Any] = field(default_factory=dict[str, Any])
    """What else belongs to a decomposable model: its gate and configuration."""

    def to_json(self) -> bytes:
        """The record's bytes."""
        return json.dumps(asdict(self), sort_keys=True, indent=1).encode()

    @staticmethod
    def from_json(data: bytes, *, place: str = "commit") -> "Commit":
        """The record in bytes, read at a place. Raises: StoreError, if it is not one."""
        with _told(place):
            raw = _record(data, place)
            raw["blocks"] = tuple(Block(**b) for b in raw["blocks"])
            return Commit(**raw)


def _record(data: bytes, place: str) -> dict[str, Any]:
    """A record's fields, the blocks as they are."""
    raw: dict[str, Any] = json.loads(data)
    if raw["schema_version"] != schema.VERSION:
        raise StoreError(
            f"{place}: has schema version {raw['schema_version']}",
            f"This version reads {schema.VERSION}.",
            "Use a fresh store.",
        )
    return raw | {
        "shard": Entry(**raw["shard"]),
        "spectrum": Entry(**raw["spectrum"]) if raw["spectrum"] else None,
        "covered": tuple(Covered(**c) for c in raw["covered"]),
    }


@contextlib.contextmanager
def _told(place: str) -> Generator[None]:
    """Turn whatever a malformed record raises into an error that names its place."""
    try:
        yield
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise StoreError(
            f"{place}: malformed commit record", str(error), "Delete it and run again."
        ) from error


def put_unit(
    store: Folder,
    *,
    data_prefix: str,
    commit_path: str,
    rows: Sequence[Rows],
    spectra: Sequence[Spectrum],
    covered: Sequence[Covered],
    solver: str,
    numerics: str,
    about: Mapping[str, Any] | None = None,
) -> Commit:
    """Store a unit's objects, then its commit; the commit in force, which may be an earlier one.

    Objects are named by their own hash: a second attempt can only add an orphan. If a commit is
    there already its objects win; if they were lost, identical ones just written heal it.

    Raises:
        StoreError: the earlier commit names objects that are lost and differ from these.
    """
    shard, blocks = encode(rows)
    entry = _put(store, data_prefix, ".arrow", shard)
    sidecar = None
    if spectra:
        sidecar = _put(store, data_prefix, ".spectrum.arrow", encode_spectra(spectra))
    commit = Commit(
        shard=entry, spectrum=sidecar, covered=tuple(covered), blocks=blocks,
        solver=solver, numerics=numerics, about=dict(about or {}),
    )  # fmt: skip
    if store.put_once(commit_path, commit.to_json()):
        return commit
    earlier = read_commit(store, commit_path)
    lost = [e.path for e in objects(earlier) if not _is_whole(store, e)]
    if lost:
        raise StoreError(
            f"{store.uri}/{commit_path}: names {lost[0]}, which is gone",
            "Recomputing gave other bytes, as another kind of machine may.",
            "Delete that commit, then run the same command again.",
        )
    return earlier


def read_commit(store: Folder, path: str) -> Commit:
    """The record at a path. Raises: StoreError, if it is not one."""
    return Commit.from_json(store.read(path), place=f"{store.uri}/{path}")


def objects(commit: Coverage) -> list[Entry]:
    """The objects a commit names."""
    return [commit.shard] + ([commit.spectrum] if commit.spectrum else [])


def _is_whole(store: Folder, entry: Entry) -> bool:
    stat = store.stat(entry.path)
    return stat is not None and stat.size == entry.size


def _put(store: Folder, prefix: str, suffix: str, data: bytes) -> Entry:
    sha256 = hashlib.sha256(data).hexdigest()
    path = f"{prefix}-{sha256[:16]}{suffix}"
    # Written also where it is: the one there may be damaged, and its name says what it must hold.
    store.put(path, data)
    return Entry(path=path, size=len(data), sha256=sha256)


C = TypeVar("C", bound=Coverage)


def _whole(store: Folder, read: Callable[..., C], *, commits: str, data: str) -> list[C]:
    """Commits below a prefix, less those whose objects are not listed below `data`."""
    sizes = store.find(data)
    paths = [p for p in store.find(commits) if p.endswith(".json")]
    found = [read(store.read(p), place=f"{store.uri}/{p}") for p in paths]
    return [c for c in found if all(sizes.get(e.path) == e.size for e in objects(c))]


def load_coverage(store: Folder, *, commits: str, data: str) -> list[Coverage]:
    """What the commits below a prefix cover, as `Committed.load` would have it."""
    return _whole(store, Coverage.from_json, commits=commits, data=data)


def depth_of(covered: Iterable[Covered]) -> int:
    """Components of a matrix that are stored without a gap, by its records in order of `first`."""
    depth = 0
    for part in covered:
        if part.first <= depth:
            depth = max(depth, part.depth)
    return depth


def read_sidecar(store: Folder, entry: Entry) -> list[Spectrum]:
    """The spectra in a sidecar. Raises: StoreError, if it is not what its commit says."""
    data = b""
    with contextlib.suppress(FileNotFoundError):
        data = store.read(entry.path)
    if hashlib.sha256(data).hexdigest() != entry.sha256:
        raise StoreError(
            f"{store.uri}/{entry.path}: not what its commit says",
            "The sidecar was damaged or replaced.",
            f"Delete the commits that `svdmerge store verify {store.uri}` names, then run again.",
        )
    return decode_spectra(data)


class Committed:
    """What one source has in the store, by matrix: only what commits name and listings confirm."""

    def __init__(self, store: Folder, commits: Sequence[Commit]) -> None:
        self.store = store
        self.commits = tuple(commits)
        self._covered: dict[str, list[tuple[Covered, Commit]]] = defaultdict(list)
        for commit in self.commits:
            for c in commit.covered:
                self._covered[c.parameter].append((c, commit))
        for parts in self._covered.values():
            parts.sort(key=lambda part: part[0].first)

    @staticmethod
    def load(store: Folder, *, commits: str, data: str) -> "Committed":
        """Commits below a prefix, less those whose objects are not listed below `data`."""
        return Committed(store, _whole(store, Commit.from_json, commits=commits, data=data))

    def __contains__(self, parameter: str) -> bool:
        return parameter in self._covered

    def depth(self, parameter: str) -> int:
        """Components of the matrix that are stored without a gap from the first on."""
        return depth_of(covered for covered, _ in self._covered.get(parameter, []))

    def held(self, parameter: str) -> int:
        """Components there are to read: fewer than the depth where the difference has less rank."""
        ends = (
            b.first + b.count
            for _, commit in self._covered.get(parameter, [])
            for b in commit.blocks
            if b.parameter == parameter
        )
        return min(self.depth(parameter), max(ends, default=0))

    def only(self, parameters: Iterable[str]) -> "Committed":
        """What covers these matrices."""
        wanted = set(parameters)
        covering = [c for c in self.commits if wanted & {part.parameter for part in c.covered}]
        return Committed(self.store, covering)

    def sha256(self, parameter: str) -> str:
        """sha256 of the source's bytes of the matrix, or of what its factors were made of."""
        return self._covered[parameter][0][0].source_sha256

    def read(self, parameter: str, indices: Sequence[int]) -> RankOneComponents:
        """The components with these indices, in their order.

        Raises:
            StoreError: one is not stored, or damaged.
        """
        wanted, found = set(indices), dict[int, RankOneComponents]()
        for _, commit in self._covered.get(parameter, []):
            blocks = [
                b
                for b in commit.blocks
                if b.parameter == parameter and wanted & set(range(b.first, b.first + b.count))
            ]
            for block, part in read_blocks(self.store, commit.shard.path, blocks):
                for i in range(block.count):
                    found.setdefault(block.first + i, part.slice(i, i + 1))
            if wanted <= set(found):
                return concatenate([found[i] for i in indices])
        raise StoreError(
            f"{self.store.uri}: component {min(wanted - set(found))} of {parameter} is not stored",
            f"Stored without a gap: {self.depth(parameter)}.",
            "Run `svdmerge decompose` first.",
        )

    def spectra(self) -> Mapping[str, list[Spectrum]]:
        """Every matrix's listed values, by first index.

        Raises:
            StoreError: a sidecar is damaged.
        """
        found: dict[str, list[Spectrum]] = defaultdict(list)
        for commit in self.commits:
            if commit.spectrum is None:
                continue
            for spectrum in read_sidecar(self.store, commit.spectrum):
                found[spectrum.parameter].append(spectrum)
        for parts in found.values():
            parts.sort(key=lambda x: x.first)
        return found
