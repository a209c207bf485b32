import itertools
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from svdmerge.core.components import RankOneComponents, none
from svdmerge.core.svd import exact
from svdmerge.errors import ContentError, StoreError
from svdmerge.storage import schema
from svdmerge.storage.filesystem import Folder
from svdmerge.storage.layout import BLOCK
from svdmerge.storage.shards import (
    Block,
    Rows,
    Spectrum,
    decode_spectra,
    decode_table,
    encode,
    encode_spectra,
    encode_table,
    read_blocks,
)


def components(m: int, n: int, k: int, *, seed: int = 0) -> RankOneComponents:
    generator = torch.Generator().manual_seed(seed)
    return RankOneComponents(
        u=torch.randn(m, k, generator=generator),
        s=torch.randn(k, generator=generator),
        vh=torch.randn(k, n, generator=generator),
    )


def rows(parameter: str, m: int, n: int, k: int, *, first: int = 0, kind: str = "svd") -> Rows:
    c = components(m, n, k, seed=len(parameter) + first)
    return Rows(parameter=parameter, kind=kind, first=first, components=c)


def same_bits(one: RankOneComponents, other: RankOneComponents) -> bool:
    return all(
        a.dtype == b.dtype
        and a.shape == b.shape
        and a.contiguous().numpy().tobytes() == b.contiguous().numpy().tobytes()
        for a, b in ((one.u, other.u), (one.s, other.s), (one.vh, other.vh))
    )


def stored(folder: Folder, *parts: Rows) -> tuple[Block, ...]:
    data, blocks = encode(parts)
    folder.put("shard.arrow", data)
    return blocks


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder.at(tmp_path)


# --- back and forth ---


@settings(max_examples=40)
@given(
    m=st.integers(1, 9),
    n=st.integers(1, 9),
    counts=st.lists(st.integers(0, 2 * BLOCK + 2), min_size=1, max_size=3),
    first=st.integers(0, 40),
)
def test_components_come_back_bit_by_bit(
    tmp_path: Path, m: int, n: int, counts: list[int], first: int
) -> None:
    folder = Folder.at(tmp_path)
    parts = [rows("p" * (i + 1), m, n, k, first=first) for i, k in enumerate(counts)]
    blocks = stored(folder, *parts)
    found = {(b.parameter, b.first): c for b, c in read_blocks(folder, "shard.arrow", blocks)}
    assert len(found) == len(blocks)
    for part in parts:
        for start in range(0, len(part.components), BLOCK):
            got = found.pop((part.parameter, first + start))
            assert same_bits(got, part.components.slice(start, start + BLOCK))
    assert not found


def test_blocks_are_sixteen_wide_and_numbered_from_the_first() -> None:
    data, blocks = encode([rows("a", 3, 4, 35), rows("b", 5, 2, 16, first=32)])
    assert [(b.parameter, b.first, b.count) for b in blocks] == [
        ("a", 0, 16),
        ("a", 16, 16),
        ("a", 32, 3),
        ("b", 32, 16),
    ]
    for block, later in itertools.pairwise(blocks):
        assert 0 < block.offset < block.offset + block.size <= later.offset
    assert blocks[-1].offset + blocks[-1].size < len(data)
    assert BLOCK == 16


def test_the_same_rows_give_the_same_bytes() -> None:
    parts = [rows("a", 3, 4, 20), rows("b", 5, 2, 3)]
    assert encode(parts) == encode(list(parts))


def test_the_same_bytes_come_from_another_layout_in_memory() -> None:
    part = rows("a", 6, 4, 5)
    c = part.components
    turned = RankOneComponents(u=c.u.T.contiguous().T, s=c.s.clone(), vh=c.vh.T.contiguous().T)
    assert encode([part]) == encode([replace(part, components=turned)])


def test_float64_is_stored_as_its_nearest_float32(folder: Folder) -> None:
    c = exact(torch.randn(6, 5, generator=torch.Generator().manual_seed(0)))
    blocks = stored(folder, Rows(parameter="a", kind="svd", first=0, components=c))
    ((_, got),) = read_blocks(folder, "shard.arrow", blocks)
    assert same_bits(got, c.to(torch.float32))


def test_odd_numbers_are_stored_as_they_are(folder: Folder) -> None:
    odd = torch.tensor([torch.finfo(torch.float32).max, -0.0, 1e-45, -1.0])
    c = RankOneComponents(u=odd[None].repeat(2, 1), s=odd, vh=odd[:, None].repeat(1, 3))
    blocks = stored(folder, Rows(parameter="a", kind="svd", first=0, components=c))
    ((_, got),) = read_blocks(folder, "shard.arrow", blocks)
    assert same_bits(got, c)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e39])
@pytest.mark.parametrize("part", ["u", "s", "vh"])
def test_what_is_not_finite_in_float32_is_refused_with_its_matrix(part: str, value: float) -> None:
    found = {n: torch.ones(s, dtype=torch.float64) for n, s in (("u", (2, 1)), ("vh", (1, 3)))}
    found["s"] = torch.ones(1, dtype=torch.float64)
    found[part].reshape(-1)[0] = value
    row = Rows(parameter="a.weight", kind="svd", first=0, components=RankOneComponents(**found))
    with pytest.raises(ContentError, match=r"a\.weight: a component is not finite"):
        encode([row])


def test_a_matrix_of_no_components_leaves_no_block() -> None:
    _, blocks = encode([Rows(parameter="a", kind="svd", first=0, components=none(3, 4))])
    assert blocks == ()


def test_a_file_is_of_the_contracts_schema_and_one_matrix_a_batch() -> None:
    data, _ = encode([rows("a", 3, 4, 17), rows("b", 2, 5, 1, kind="flat")])
    reader = pa.ipc.open_file(pa.BufferReader(data))
    assert reader.schema.equals(schema.SHARD, check_metadata=True)
    batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
    assert [set(b.column("parameter").to_pylist()) for b in batches] == [{"a"}, {"a"}, {"b"}]
    assert [b.column("index").to_pylist() for b in batches] == [list(range(16)), [16], [0]]
    assert batches[2].column("kind").to_pylist() == ["flat"]
    assert batches[0].column("class_group").null_count == 16


def test_blocks_are_read_in_the_order_asked_for(folder: Folder) -> None:
    blocks = stored(folder, rows("a", 3, 4, 40), rows("b", 5, 2, 20))
    order = [blocks[4], blocks[0], blocks[2], blocks[0]]
    assert [b for b, _ in read_blocks(folder, "shard.arrow", order)] == order


def test_read_components_may_be_changed(folder: Folder) -> None:
    blocks = stored(folder, rows("a", 3, 4, 2))
    ((_, got),) = read_blocks(folder, "shard.arrow", blocks)
    got.u.zero_()
    got.s.zero_()
    ((_, again),) = read_blocks(folder, "shard.arrow", blocks)
    assert float(again.u.abs().sum()) > 0


def test_only_the_blocks_asked_for_are_fetched(s3_uri: str) -> None:
    folder = Folder.at(s3_uri)
    blocks = stored(folder, *(rows(f"p{i}", 64, 64, 16) for i in range(4)))
    got = list(read_blocks(folder, "shard.arrow", [blocks[2]]))
    assert same_bits(got[0][1], rows("p2", 64, 64, 16).components)


# --- damage ---


def test_a_missing_shard_is_named(folder: Folder) -> None:
    _, blocks = encode([rows("a", 3, 4, 2)])
    with pytest.raises(StoreError, match=r"shard\.arrow"):
        list(read_blocks(folder, "shard.arrow", blocks))


LIES: dict[str, Callable[[Block], Block]] = {
    "hash": lambda block: replace(block, sha256="0" * 64),
    "offset": lambda block: replace(block, offset=block.offset + 8),
    "first byte": lambda block: replace(block, offset=0),
    "shorter": lambda block: replace(block, size=block.size - 8),
    "longer": lambda block: replace(block, size=block.size + 8),
    "empty": lambda block: replace(block, size=0),
    "beyond the end": lambda block: replace(block, offset=10**9),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_block_that_is_not_what_its_commit_says_is_refused(folder: Folder, lie: str) -> None:
    blocks = stored(folder, rows("a", 3, 4, 2), rows("bb", 3, 4, 2))
    with pytest.raises(StoreError, match=r"shard\.arrow"):
        list(read_blocks(folder, "shard.arrow", [LIES[lie](blocks[0])]))


def test_a_damaged_number_is_refused_with_shard_and_matrix(folder: Folder) -> None:
    part = rows("layer.weight", 3, 4, 2)
    blocks = stored(folder, part)
    data = bytearray(folder.read("shard.arrow"))
    place = data.find(part.components.vh.numpy().tobytes())
    assert place > 0
    data[place + 5] ^= 1
    folder.put("shard.arrow", bytes(data))
    with pytest.raises(StoreError, match=r"shard\.arrow.*layer\.weight"):
        list(read_blocks(folder, "shard.arrow", blocks))


def test_damage_in_one_block_leaves_the_others_readable(folder: Folder) -> None:
    parts = [rows("a", 3, 4, 2), rows("bb", 3, 4, 2)]
    blocks = stored(folder, *parts)
    data = bytearray(folder.read("shard.arrow"))
    data[data.find(parts[0].components.vh.numpy().tobytes())] ^= 1
    folder.put("shard.arrow", bytes(data))
    ((_, got),) = read_blocks(folder, "shard.arrow", blocks[1:])
    assert same_bits(got, parts[1].components)


def test_a_shard_cut_before_the_end_of_a_block_is_refused(folder: Folder) -> None:
    data, (block,) = encode([rows("a", 3, 4, 2)])
    end = block.offset + block.size
    for size in (*range(0, end, 7), end - 1):
        folder.put("shard.arrow", data[:size])
        with pytest.raises(StoreError, match=r"shard\.arrow"):
            list(read_blocks(folder, "shard.arrow", [block]))
    folder.put("shard.arrow", data[:end])
    ((_, got),) = read_blocks(folder, "shard.arrow", [block])
    assert same_bits(got, rows("a", 3, 4, 2).components)


DAMAGE = """
import sys
import torch
from svdmerge.core.svd import exact
from svdmerge.errors import StoreError
from svdmerge.storage.filesystem import Folder
from svdmerge.storage.shards import Rows, encode, read_blocks

torch.manual_seed(0)
parts = {"a": exact(torch.randn(4, 3))}
rows = [Rows(parameter=p, kind="svd", first=0, components=c) for p, c in parts.items()]
data, blocks = encode(rows)
folder, refused = Folder.at(sys.argv[1]), 0
for place in range(len(data)):
    damaged = bytearray(data)
    damaged[place] ^= 0x80 >> place % 8
    open(folder.path("shard.arrow"), "wb").write(damaged)
    print(place, flush=True)
    try:
        for block, got in read_blocks(folder, "shard.arrow", blocks):
            whole = parts[block.parameter].slice(block.first, block.first + block.count)
            assert torch.equal(got.u, whole.u.float())
            assert torch.equal(got.s, whole.s.float())
            assert torch.equal(got.vh, whole.vh.float())
    except StoreError:
        refused += 1
assert refused > len(data) / 3, refused
print("done")
"""


def test_a_damaged_byte_anywhere_is_refused_or_harmless_and_never_kills(tmp_path: Path) -> None:
    """In a process of its own, for what Arrow's C++ cannot check ends the process."""
    done = subprocess.run(
        [sys.executable, "-c", DAMAGE, str(tmp_path)], capture_output=True, text=True
    )
    assert done.returncode == 0, f"byte {done.stdout.split()[-1]}: {done.stderr[-600:]}"


# --- spectra and tables ---


def spectrum(parameter: str, count: int, *, first: int = 0, seed: int = 0) -> Spectrum:
    s = np.sort(np.random.default_rng(seed).random(count).astype(np.float32))[::-1].copy()
    return Spectrum(
        parameter=parameter,
        sha256=f"{seed:064x}",
        m=7,
        n=2**40,
        fro=float(np.linalg.norm(s.astype(np.float64))),
        base_fro=None if seed else 5.5,
        bound=1e-300,
        noise=0.125,
        first=first,
        s=s,
        solver="exact",
    )


def assert_same_spectra(got: list[Spectrum], expected: list[Spectrum]) -> None:
    assert len(got) == len(expected)
    for one, other in zip(got, expected, strict=True):
        assert one.s.dtype == np.float32
        assert one.s.tobytes() == other.s.astype(np.float32).tobytes()
        assert replace(one, s=0) == replace(other, s=0)  # pyright: ignore[reportArgumentType]


@given(st.lists(st.integers(0, 40), max_size=6))
def test_spectra_come_back_as_they_were(counts: list[int]) -> None:
    spectra = [spectrum(f"p{i}", c, first=i, seed=i) for i, c in enumerate(counts)]
    assert_same_spectra(decode_spectra(encode_spectra(spectra)), spectra)


def test_the_same_spectra_give_the_same_bytes_and_float64_its_nearest_float32() -> None:
    one = spectrum("a", 5)
    wide = replace(one, s=one.s.astype(np.float64))
    assert encode_spectra([one]) == encode_spectra([one])
    assert_same_spectra(decode_spectra(encode_spectra([wide])), [one])
    third = replace(one, s=np.array([1 / 3]))
    (got,) = decode_spectra(encode_spectra([third]))
    assert got.s[0] == np.float32(1 / 3)


def test_a_sidecar_of_another_version_is_refused() -> None:
    table = decode_table(encode_spectra([spectrum("a", 3)]))
    later = table.replace_schema_metadata({"svdmerge_schema": "spectrum/999"})
    with pytest.raises(StoreError, match="spectrum/999"):
        decode_spectra(encode_table(later))


def test_what_is_no_sidecar_is_refused() -> None:
    shard, _ = encode([rows("a", 3, 4, 2)])
    for data in (b"", b"nonsense", encode_spectra([spectrum("a", 3)])[:-20], shard):
        with pytest.raises(StoreError):
            decode_spectra(data)


def test_a_table_comes_back_with_its_schema() -> None:
    table = pa.table({"a": [1, 2]}, schema=pa.schema([("a", pa.int8())], metadata={"k": "v"}))
    got = decode_table(encode_table(table))
    assert got.equals(table, check_metadata=True)
