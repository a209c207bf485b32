import hashlib
import itertools
import json
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from svdmerge.core.components import RankOneComponents, concatenate
from svdmerge.errors import StoreError
from svdmerge.storage import schema
from svdmerge.storage.filesystem import Folder
from svdmerge.storage.manifest import Block, Commit, Committed, Covered, Entry, objects, put_unit
from svdmerge.storage.shards import Rows, Spectrum

COMMITS, DATA = "commits/base/source", "components/base/source"
M, N = 5, 4


def components(parameter: str, first: int, count: int, *, salt: int = 0) -> RankOneComponents:
    """A function of name and indices, so that any part can be asked what it should be."""
    parts: list[RankOneComponents] = []
    for index in range(first, first + count):
        generator = torch.Generator().manual_seed(len(parameter) + 100 * index + 10_000 * salt)
        u = torch.randn(M, 1, generator=generator)
        vh = torch.randn(1, N, generator=generator)
        parts.append(RankOneComponents(u=u, s=torch.tensor([1.0 / (index + 1)]), vh=vh))
    return concatenate(parts)


def same(one: RankOneComponents, other: RankOneComponents) -> bool:
    return all(
        torch.equal(a, b) for a, b in ((one.u, other.u), (one.s, other.s), (one.vh, other.vh))
    )


def put(
    store: Folder,
    *ranges: tuple[str, int, int],
    group: str = "g",
    salt: int = 0,
    spectra: bool = True,
    numerics: str = "cpu",
) -> Commit:
    """Commit components first..stop-1 of each matrix as one unit."""
    name = f"{group}/{ranges[0][1]}-{ranges[0][2]}"
    rows, listed, covered = [], [], []
    for parameter, first, stop in ranges:
        c = components(parameter, first, stop - first, salt=salt)
        rows.append(Rows(parameter=parameter, kind="svd", first=first, components=c))
        listed.append(
            Spectrum(
                parameter=parameter,
                sha256="ab",
                m=M,
                n=N,
                fro=2.0,
                base_fro=None,
                bound=0.5,
                noise=0.25,
                first=first,
                s=c.s.numpy(),
                solver="exact",
            )
        )
        covered.append(
            Covered(
                parameter=parameter,
                first=first,
                depth=stop,
                source_sha256=f"source of {parameter}",
                base_sha256="base",
            )
        )
    return put_unit(
        store,
        data_prefix=f"{DATA}/{name}",
        commit_path=f"{COMMITS}/{name}.json",
        rows=rows,
        spectra=listed if spectra else [],
        covered=covered,
        solver="exact",
        numerics=numerics,
    )


def load(store: Folder) -> Committed:
    return Committed.load(store, commits=COMMITS, data=DATA)


def commit_path(store: Folder) -> str:
    (path,) = store.find(COMMITS)
    return path


def damage(store: Folder, path: str) -> None:
    """Flip a bit of the first number, keeping the size."""
    data = bytearray(store.read(path))
    marker = np.float32(1.0).tobytes()
    data[data.find(marker)] ^= 1
    store.put(path, bytes(data))


@pytest.fixture
def store(tmp_path: Path) -> Folder:
    return Folder.at(tmp_path / "store")


# --- records ---


def test_a_commit_comes_back_from_its_bytes(store: Folder) -> None:
    for commit in (put(store, ("a", 0, 20)), put(store, ("b", 0, 3), group="h", spectra=False)):
        assert Commit.from_json(commit.to_json()) == commit
        assert Commit.from_json(commit.to_json()).to_json() == commit.to_json()


def changed(data: bytes, **changes: Any) -> bytes:
    return json.dumps(json.loads(data) | changes).encode()


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b"[]", b"null", b"7", b'"text"', b"{}", b"\xff\xfe", b"[" * 200_000],
    ids=lambda data: repr(data[:8]),
)
def test_what_is_no_record_is_refused(data: bytes) -> None:
    with pytest.raises(StoreError):
        Commit.from_json(data)


@pytest.mark.parametrize(
    "changes",
    [
        {"shard": None},
        {"shard": {}},
        {"shard": "path"},
        {"shard": {"path": "p", "size": 1, "sha256": "x", "extra": 1}},
        {"spectrum": 3},
        {"covered": None},
        {"covered": ["abc"]},
        {"covered": [{"parameter": "a"}]},
        {"blocks": {"a": 1}},
        {"blocks": [None]},
        {"unknown": 1},
    ],
)
def test_a_record_with_a_wrong_field_is_refused(store: Folder, changes: dict[str, Any]) -> None:
    data = put(store, ("a", 0, 3)).to_json()
    with pytest.raises(StoreError, match="commit"):
        Commit.from_json(changed(data, **changes))


@pytest.mark.parametrize("field", ["shard", "covered", "blocks", "solver", "schema_version"])
def test_a_record_that_lacks_a_field_is_refused(store: Folder, field: str) -> None:
    raw = json.loads(put(store, ("a", 0, 3)).to_json())
    del raw[field]
    with pytest.raises(StoreError, match="commit"):
        Commit.from_json(json.dumps(raw).encode())


def test_a_record_of_another_version_is_refused_with_both(store: Folder) -> None:
    data = changed(put(store, ("a", 0, 3)).to_json(), schema_version=999)
    with pytest.raises(StoreError, match=rf"999[\s\S]*{schema.VERSION}"):
        Commit.from_json(data)


def test_a_malformed_record_in_a_store_is_told_with_its_path(store: Folder) -> None:
    put(store, ("a", 0, 3))
    path = commit_path(store)
    store.put(path, b"{half")
    with pytest.raises(StoreError) as caught:
        load(store)
    assert path in str(caught.value)


# --- storing ---


def test_objects_are_named_and_described_by_their_content(store: Folder) -> None:
    commit = put(store, ("a", 0, 20), ("bb", 0, 3))
    assert len(objects(commit)) == 2
    for entry in objects(commit):
        data = store.read(entry.path)
        assert len(data) == entry.size
        assert hashlib.sha256(data).hexdigest() == entry.sha256
        assert entry.sha256[:16] in entry.path
    assert store.find() == {commit_path(store): len(commit.to_json())} | {
        e.path: e.size for e in objects(commit)
    }


def test_the_commit_is_written_last(store: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    whole_put, whole_once = Folder.put, Folder.put_once

    def log_put(self: Folder, relative: str, data: bytes) -> None:
        whole_put(self, relative, data)
        order.append(relative)

    def log_once(self: Folder, relative: str, data: bytes) -> bool:
        won = whole_once(self, relative, data)
        order.append(relative)
        return won

    monkeypatch.setattr(Folder, "put", log_put)
    monkeypatch.setattr(Folder, "put_once", log_once)
    put(store, ("a", 0, 3))
    assert order[-1] == commit_path(store)
    assert len(order) == 3


def test_without_spectra_there_is_no_sidecar(store: Folder) -> None:
    commit = put(store, ("a", 0, 3), spectra=False)
    assert commit.spectrum is None
    assert len(store.find(DATA)) == 1
    assert load(store).spectra() == {}


def test_the_same_unit_again_changes_nothing(store: Folder) -> None:
    first = put(store, ("a", 0, 20))
    files = store.find()
    assert put(store, ("a", 0, 20)) == first
    assert store.find() == files


def test_a_second_unit_with_other_numbers_yields_to_the_first(store: Folder) -> None:
    first = put(store, ("a", 0, 3))
    assert put(store, ("a", 0, 3), salt=1, numerics="gpu") == first
    assert same(load(store).read("a", [0, 1, 2]), components("a", 0, 3))


def test_of_many_that_commit_one_unit_all_get_the_same_commit(store: Folder) -> None:
    start = threading.Barrier(8)

    def work(salt: int) -> Commit:
        start.wait()
        return put(store, ("a", 0, 20), salt=salt)

    with ThreadPoolExecutor(8) as pool:
        commits = list(pool.map(work, range(8)))
    assert len({c.to_json() for c in commits}) == 1
    assert Commit.from_json(store.read(commit_path(store))) == commits[0]
    assert load(store).depth("a") == 20
    load(store).read("a", range(20))


def test_a_store_in_memory_and_one_in_a_bucket_hold_the_same(
    store: Folder, memory_uri: str, s3_uri: str
) -> None:
    expected = put(store, ("a", 0, 20))
    for uri in (memory_uri, f"{s3_uri}/store"):
        other = Folder.at(uri)
        assert put(other, ("a", 0, 20)) == expected
        assert put(other, ("a", 0, 20), salt=1) == expected
        assert same(load(other).read("a", [19, 0]), load(store).read("a", [19, 0]))
        assert load(other).spectra().keys() == {"a"}


# --- what is lost ---


@pytest.mark.parametrize("suffix", [".spectrum.arrow", ".arrow"])
def test_a_dropped_object_does_not_count_and_the_same_unit_heals_it(
    store: Folder, suffix: str
) -> None:
    commit = put(store, ("a", 0, 20))
    store.remove(next(e.path for e in objects(commit) if e.path.endswith(suffix)))
    assert load(store).depth("a") == 0
    assert put(store, ("a", 0, 20)) == commit
    assert load(store).depth("a") == 20
    assert same(load(store).read("a", range(20)), components("a", 0, 20))


def test_a_truncated_object_does_not_count_and_the_same_unit_heals_it(store: Folder) -> None:
    commit = put(store, ("a", 0, 20))
    store.put(commit.shard.path, store.read(commit.shard.path)[:-1])
    assert load(store).depth("a") == 0
    put(store, ("a", 0, 20))
    assert same(load(store).read("a", range(20)), components("a", 0, 20))


@pytest.mark.parametrize("loss", ["removed", "truncated"])
def test_a_lost_object_that_other_numbers_cannot_heal_is_an_error_with_the_way_out(
    store: Folder, loss: str
) -> None:
    commit = put(store, ("a", 0, 20))
    data = store.read(commit.shard.path)
    store.remove(commit.shard.path)
    if loss == "truncated":
        store.put(commit.shard.path, data[:-1])
    with pytest.raises(StoreError) as caught:
        put(store, ("a", 0, 20), salt=1)
    assert commit.shard.path in str(caught.value)
    assert commit_path(store) in str(caught.value)
    store.remove(commit_path(store))
    put(store, ("a", 0, 20), salt=1)
    assert same(load(store).read("a", range(20)), components("a", 0, 20, salt=1))


@pytest.mark.parametrize("suffix", [".spectrum.arrow", ".arrow"])
def test_after_damage_deleting_the_commit_and_running_again_heals(
    store: Folder, suffix: str
) -> None:
    commit = put(store, ("a", 0, 20))
    damage(store, next(e.path for e in objects(commit) if e.path.endswith(suffix)))
    store.remove(commit_path(store))
    put(store, ("a", 0, 20))
    assert same(load(store).read("a", range(20)), components("a", 0, 20))
    (spectrum,) = load(store).spectra()["a"]
    assert spectrum.s.tobytes() == components("a", 0, 20).s.numpy().tobytes()


def test_a_damaged_shard_is_told_when_it_is_read(store: Folder) -> None:
    commit = put(store, ("a", 0, 20))
    damage(store, commit.shard.path)
    with pytest.raises(StoreError) as caught:
        load(store).read("a", [0])
    assert commit.shard.path in str(caught.value)


@pytest.mark.parametrize("loss", ["damaged", "removed"])
def test_a_sidecar_that_is_not_what_its_commit_says_is_told(store: Folder, loss: str) -> None:
    commit = put(store, ("a", 0, 20))
    assert commit.spectrum is not None
    committed = load(store)
    if loss == "damaged":
        damage(store, commit.spectrum.path)
    else:
        store.remove(commit.spectrum.path)
    with pytest.raises(StoreError) as caught:
        committed.spectra()
    assert commit.spectrum.path in str(caught.value)


def test_orphans_and_half_written_files_are_not_seen(store: Folder) -> None:
    put(store, ("a", 0, 3))
    whole = store.read(commit_path(store))
    store.put(f"{COMMITS}/g/.tmp123.partial", whole[:40])
    store.put(f"{DATA}/g/0-3-ffff.arrow", b"orphan")
    assert load(store).depth("a") == 3
    assert len(load(store).commits) == 1


def test_another_sources_commits_are_not_seen(store: Folder) -> None:
    put(store, ("a", 0, 3))
    other = Committed.load(store, commits=f"{COMMITS}2", data=f"{DATA}2")
    assert other.depth("a") == 0
    assert "a" not in other
    assert "a" in load(store)


# --- coverage ---


@pytest.mark.parametrize(
    ("ranges", "depth"),
    [
        ([(0, 16)], 16),
        ([(0, 16), (16, 32)], 32),
        ([(16, 32), (0, 16)], 32),
        ([(0, 16), (32, 48)], 16),
        ([(16, 32)], 0),
        ([(0, 16), (8, 24), (24, 30)], 30),
        ([(0, 32), (0, 16)], 32),
        ([], 0),
    ],
)
def test_depth_is_what_is_stored_without_a_gap(
    store: Folder, ranges: list[tuple[int, int]], depth: int
) -> None:
    for first, stop in ranges:
        put(store, ("a", first, stop))
    assert load(store).depth("a") == depth
    assert load(store).depth("b") == 0


def test_deepening_keeps_what_is_there(store: Folder) -> None:
    put(store, ("a", 0, 16))
    put(store, ("a", 16, 40))
    committed = load(store)
    assert committed.depth("a") == 40
    assert same(committed.read("a", range(40)), components("a", 0, 40))
    assert [x.first for x in committed.spectra()["a"]] == [0, 16]


def test_the_hash_of_what_was_read_is_kept(store: Folder) -> None:
    put(store, ("a", 0, 3), ("bb", 0, 2))
    assert load(store).sha256("a") == "source of a"
    assert load(store).sha256("bb") == "source of bb"


def test_a_matrix_of_no_components_is_covered_to_depth_zero(store: Folder) -> None:
    commit = put(store, ("a", 0, 3))
    empty = replace(
        commit, covered=(replace(commit.covered[0], parameter="empty", depth=0),), blocks=()
    )
    committed = Committed(store, [commit, empty])
    assert "empty" in committed
    assert committed.depth("empty") == 0


# --- reading by ids ---


@settings(max_examples=50)
@given(
    cuts=st.lists(st.integers(1, 50), max_size=4),
    indices=st.lists(st.integers(0, 59), min_size=1, max_size=12),
)
def test_any_ids_are_read_in_their_order_however_they_were_stored(
    tmp_path_factory: pytest.TempPathFactory, cuts: list[int], indices: list[int]
) -> None:
    store = Folder.at(tmp_path_factory.mktemp("store"))
    edges = sorted({0, 60, *cuts})
    for first, stop in itertools.pairwise(edges):
        put(store, ("a", first, stop), ("other", first, stop))
    got = load(store).read("a", indices)
    assert len(got) == len(indices)
    for place, index in enumerate(indices):
        assert same(got.slice(place, place + 1), components("a", index, 1))


def test_overlapping_commits_give_the_numbers_of_the_earlier_block(store: Folder) -> None:
    put(store, ("a", 0, 20))
    put(store, ("a", 16, 24), salt=1)
    got = load(store).read("a", [18, 22])
    assert same(got.slice(0, 1), components("a", 18, 1))
    assert same(got.slice(1, 2), components("a", 22, 1, salt=1))


@pytest.mark.parametrize("indices", [[3], [0, 16], [-1], [1, 2, 99]])
def test_an_id_that_is_not_stored_is_named_with_its_matrix(
    store: Folder, indices: Sequence[int]
) -> None:
    put(store, ("a", 0, 3))
    put(store, ("a", 32, 40))
    with pytest.raises(StoreError, match=r"component (-1|3|16|99) of a is not stored"):
        load(store).read("a", indices)


def test_a_matrix_that_is_not_stored_is_named(store: Folder) -> None:
    put(store, ("a", 0, 3))
    with pytest.raises(StoreError, match=r"layer\.weight"):
        load(store).read("layer.weight", [0])


def test_spectra_come_back_by_matrix_and_first_index(store: Folder) -> None:
    put(store, ("a", 16, 20), ("bb", 16, 18))
    put(store, ("a", 0, 16), ("bb", 0, 16))
    spectra = load(store).spectra()
    assert {p: [x.first for x in parts] for p, parts in spectra.items()} == {
        "a": [0, 16],
        "bb": [0, 16],
    }
    values = np.concatenate([x.s for x in spectra["a"]])
    assert values.tobytes() == components("a", 0, 20).s.numpy().tobytes()
    assert (spectra["a"][0].m, spectra["a"][0].fro, spectra["a"][0].bound) == (M, 2.0, 0.5)


def test_a_commit_of_a_shard_that_is_elsewhere_is_refused_when_read(store: Folder) -> None:
    block = Block(parameter="a", first=0, count=1, offset=0, size=1, sha256="0" * 64)
    covered = Covered(parameter="a", first=0, depth=1, source_sha256="", base_sha256="")
    nowhere = Entry(path=f"{DATA}/none.arrow", size=1, sha256="")
    commit = Commit(
        shard=nowhere, spectrum=None, covered=(covered,), blocks=(block,),
        solver="exact", numerics="cpu",
    )  # fmt: skip
    with pytest.raises(StoreError, match=r"none\.arrow"):
        Committed(store, [commit]).read("a", [0])
