import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny import POSITION_IDS, QUERY, read_model, tiny_base, write_model

from svdmerge.errors import CheckpointError, SvdmergeError
from svdmerge.storage.checkpoint import (
    INDEX,
    ITEM_BYTES,
    MAX_HEADER_BYTES,
    SINGLE,
    TORCH_NAMES,
    Checkpoint,
    open_checkpoint,
)
from svdmerge.storage.filesystem import Folder
from svdmerge.storage.quantised import FP8


def frame(header: object, data: bytes = b"") -> bytes:
    """A safetensors file, byte by byte: length of the header, header, data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def put(folder: Path, data: bytes, name: str = SINGLE) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(data)
    return folder


def put_index(folder: Path, weight_map: object) -> Path:
    return put(folder, json.dumps({"metadata": {}, "weight_map": weight_map}).encode(), INDEX)


def refusal(reference: str | Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(str(reference))
    return str(caught.value)


def assert_equals(checkpoint: Checkpoint, tensors: Mapping[str, torch.Tensor]) -> None:
    """Bit by bit what safetensors' own reader gives."""
    assert set(checkpoint.tensors) == set(tensors)
    for name, expected in tensors.items():
        got = checkpoint.tensors[name].read()
        assert got.dtype == expected.dtype
        assert got.shape == expected.shape
        assert (
            got.contiguous()
            .view(-1)
            .view(torch.uint8)
            .equal(expected.contiguous().view(-1).view(torch.uint8))
        )


# --- what is read ---


def test_literal_bytes_are_read(tmp_path: Path) -> None:
    header = (
        b'{"b":{"dtype":"F32","shape":[2],"data_offsets":[2,10]},'
        b'"__metadata__":{"format":"pt"},'
        b'"a":{"dtype":"I8","shape":[1,2],"data_offsets":[0,2]}}   '
    )
    data = b"\x07\xff" + struct.pack("<ff", 1.5, -2.0)
    checkpoint = open_checkpoint(str(put(tmp_path, frame(header, data))))
    assert list(checkpoint.tensors) == ["a", "b"]
    assert checkpoint.tensors["a"].read().tolist() == [[7, -1]]
    assert checkpoint.tensors["b"].read().tolist() == [1.5, -2.0]
    assert checkpoint.nbytes == 10


@pytest.mark.parametrize("shards", [1, 3])
def test_a_model_is_read_as_safetensors_own_reader_reads_it(tmp_path: Path, shards: int) -> None:
    folder = tiny_base(tmp_path, shards=shards)
    checkpoint = open_checkpoint(str(folder))
    assert_equals(checkpoint, read_model(folder))
    assert checkpoint.vocab_size == 64
    assert checkpoint.nbytes == sum(
        t.numel() * t.element_size() for t in read_model(folder).values()
    )


# FP8 is read in float32: see test_quantised.
DTYPES = [getattr(torch, name) for key, name in TORCH_NAMES.items() if key not in FP8]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (3, 5), (2, 3, 4), (0,), (3, 0, 2)])
def test_every_dtype_and_shape_is_read_bit_by_bit(
    tmp_path: Path, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    values = (torch.randn(shape) * 50).to(torch.int64) if not dtype.is_floating_point else None
    tensor = torch.randn(shape).to(dtype) if values is None else values.abs().to(dtype)
    save_file({"t": tensor}, tmp_path / SINGLE)
    assert_equals(open_checkpoint(str(tmp_path)), load_file(tmp_path / SINGLE))


def test_infinities_and_nans_are_read_as_they_are(tmp_path: Path) -> None:
    odd = torch.tensor([float("nan"), float("inf"), -0.0, 5e-324, 2**-149])
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        save_file({"t": odd.to(dtype)}, tmp_path / SINGLE)
        assert_equals(open_checkpoint(str(tmp_path)), load_file(tmp_path / SINGLE))


@st.composite
def models(draw: st.DrawFn) -> dict[str, torch.Tensor]:
    name = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8)
    names = draw(st.lists(name, unique=True, max_size=5))
    tensors: dict[str, torch.Tensor] = {}
    for name in names:
        shape = draw(st.lists(st.integers(0, 4), max_size=3))
        dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.bool]))
        values = torch.randint(-3, 4, shape, generator=torch.Generator().manual_seed(len(name)))
        tensors[name] = values.to(dtype)
    return tensors


@settings(max_examples=60)
@given(
    tensors=models(),
    # Of no tensors and an empty dictionary safetensors 0.8 makes a header that it cannot read.
    metadata=st.none() | st.dictionaries(st.text(max_size=5), st.text(), min_size=1),
)
def test_whatever_safetensors_writes_is_read_back(
    tmp_path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None
) -> None:
    save_file(tensors, tmp_path / SINGLE, metadata=metadata)
    assert_equals(open_checkpoint(str(tmp_path)), tensors)


@given(data=st.data())
def test_any_run_of_elements_is_read_alone(tmp_path: Path, data: st.DataObject) -> None:
    whole = torch.arange(24, dtype=torch.int32).reshape(2, 3, 4)
    save_file({"a": whole, "z": torch.zeros(3)}, tmp_path / SINGLE)
    ref = open_checkpoint(str(tmp_path)).tensors["a"]
    start = data.draw(st.integers(0, 24))
    count = data.draw(st.none() | st.integers(0, 24 - start))
    stop = 24 if count is None else start + count
    got = ref.decode(ref.read_bytes(start=start, count=count))
    assert got.tolist() == list(range(start, stop))


def test_a_read_tensor_may_be_changed_and_the_file_stays(tmp_path: Path) -> None:
    ref = open_checkpoint(str(tiny_base(tmp_path))).tensors[QUERY]
    first = ref.read()
    before = first.clone()
    first.zero_()
    assert torch.equal(ref.read(), before)


# --- where models lie ---


def test_a_single_file_is_a_model(tmp_path: Path) -> None:
    folder = tiny_base(tmp_path / "model")
    (folder / "other.safetensors").write_bytes(frame({"x": entry()}, bytes(8)))
    checkpoint = open_checkpoint(str(folder / SINGLE))
    assert_equals(checkpoint, load_file(folder / SINGLE))
    assert checkpoint.vocab_size == 64
    assert list(open_checkpoint(str(folder / "other.safetensors")).tensors) == ["x"]


def test_the_only_safetensors_file_of_a_folder_is_the_model(tmp_path: Path) -> None:
    save_file({"x": torch.ones(2)}, tmp_path / "weights.safetensors")
    assert list(open_checkpoint(str(tmp_path)).tensors) == ["x"]


def test_two_files_without_an_index_are_refused(tmp_path: Path) -> None:
    for name in ("one", "two"):
        save_file({name: torch.ones(2)}, tmp_path / f"{name}.safetensors")
    text = refusal(tmp_path)
    assert "one.safetensors" in text
    assert INDEX in text


def test_files_beside_an_indexed_model_are_ignored(tmp_path: Path) -> None:
    folder = tiny_base(tmp_path, shards=2)
    expected = read_model(folder)
    save_file({"stray": torch.ones(2)}, folder / "consolidated.safetensors")
    save_file({QUERY: torch.ones(2)}, folder / "aaa.safetensors")
    assert_equals(open_checkpoint(str(folder)), expected)


def test_a_model_linked_into_a_folder_is_read(tmp_path: Path) -> None:
    """As in the cache of a hub."""
    blob = tiny_base(tmp_path / "blobs") / SINGLE
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot" / SINGLE).symlink_to(blob)
    assert_equals(open_checkpoint(str(tmp_path / "snapshot")), load_file(blob))


@pytest.mark.parametrize("shards", [1, 2])
def test_a_model_in_memory_is_read(tmp_path: Path, memory_uri: str, shards: int) -> None:
    source, target = tiny_base(tmp_path, shards=shards), Folder.at(memory_uri)
    for file in source.iterdir():
        target.put(file.name, file.read_bytes())
    assert_equals(open_checkpoint(memory_uri), read_model(source))


@pytest.mark.parametrize("shards", [1, 2])
def test_a_model_in_a_bucket_is_read(tmp_path: Path, s3_uri: str, shards: int) -> None:
    source, target = tiny_base(tmp_path, shards=shards), Folder.at(f"{s3_uri}/org/model")
    for file in source.iterdir():
        target.put(file.name, file.read_bytes())
    checkpoint = open_checkpoint(f"{s3_uri}/org/model/")
    assert_equals(checkpoint, read_model(source))
    assert checkpoint.vocab_size == 64


def test_a_bucket_without_the_model_is_told(s3_uri: str) -> None:
    assert "no such model" in refusal(f"{s3_uri}/none")
    assert "no such model" in refusal("s3://no-such-bucket-at-all/none")


def test_a_truncated_file_in_a_bucket_is_told(s3_uri: str) -> None:
    Folder.at(s3_uri).put(f"m/{SINGLE}", frame({"a": entry()}, bytes(8))[:-1])
    assert SINGLE in refusal(f"{s3_uri}/m")
    Folder.at(s3_uri).put(f"empty/{SINGLE}", b"")
    assert SINGLE in refusal(f"{s3_uri}/empty")


def test_a_folder_that_is_not_there_is_told(tmp_path: Path) -> None:
    assert str(tmp_path / "none") in refusal(tmp_path / "none")


def test_an_empty_folder_is_told(tmp_path: Path) -> None:
    assert str(tmp_path) in refusal(tmp_path)


def test_a_folder_without_weights_is_told(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("hello")
    assert SINGLE in refusal(tmp_path)


def test_a_path_below_a_file_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    assert str(tmp_path / "file") in refusal(tmp_path / "file" / "model")


def test_a_protocol_that_is_not_known_is_told() -> None:
    with pytest.raises(SvdmergeError, match="nosuch"):
        open_checkpoint("nosuch://bucket/model")


# --- pickles ---


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "a.ckpt", "a.pkl"])
def test_a_pickle_is_refused_with_the_way_out_and_never_opened(tmp_path: Path, name: str) -> None:
    bomb = b"cos\nsystem\n(S'touch " + str(tmp_path / "ran").encode() + b"'\ntR."
    (tmp_path / name).write_bytes(bomb)
    for reference in (tmp_path, tmp_path / name):
        text = refusal(reference)
        assert "pickle" in text
        assert "safe_serialization" in text
    assert not (tmp_path / "ran").exists()


def test_a_pickle_beside_safetensors_is_ignored(tmp_path: Path) -> None:
    folder = tiny_base(tmp_path)
    (folder / "pytorch_model.bin").write_bytes(b"whatever")
    assert_equals(open_checkpoint(str(folder)), load_file(folder / SINGLE))


def test_an_index_cannot_bring_a_pickle_in(tmp_path: Path) -> None:
    put(tmp_path, b"\x80\x04whatever, long enough", "pytorch_model.bin")
    assert "pytorch_model.bin" in refusal(put_index(tmp_path, {"a": "pytorch_model.bin"}))


# --- headers that lie ---


GOOD = frame({"a": entry()}, bytes(8))

LIES: dict[str, bytes] = {
    "empty file": b"",
    "shorter than a length": b"\x01\x00\x00",
    "length beyond the file": struct.pack("<Q", 1000) + b"{}",
    "huge length": struct.pack("<Q", 2**63) + b"{}",
    "largest length": b"\xff" * 8 + b"{}",
    "no header": struct.pack("<Q", 0),
    "not json": frame(b"{not json}"),
    "not utf-8": frame(b'{"\xff\xfe": 1}'),
    "nested too deep": frame(b'{"a":' + b"[" * 200_000),
    "a list": frame([]),
    "a number": frame(7),
    "null": frame(None),
    "entry is a list": frame({"a": []}),
    "entry is text": frame({"a": "F32"}),
    "entry is null": frame({"a": None}),
    "no dtype": frame({"a": {"shape": [2], "data_offsets": [0, 8]}}, bytes(8)),
    "no shape": frame({"a": {"dtype": "F32", "data_offsets": [0, 8]}}, bytes(8)),
    "no offsets": frame({"a": {"dtype": "F32", "shape": [2]}}, bytes(8)),
    "one offset": frame({"a": entry(offsets=[8])}, bytes(8)),
    "three offsets": frame({"a": entry(offsets=[0, 4, 8])}, bytes(8)),
    "offsets are null": frame({"a": entry(offsets=None)}, bytes(8)),
    "offset is text": frame({"a": entry(offsets=["0", "8"])}, bytes(8)),
    "offset is a fraction": frame({"a": entry(offsets=[0.0, 8.0])}, bytes(8)),
    "offset is not a number": frame({"a": entry(offsets=[0, float("nan")])}, bytes(8)),
    "negative offset": frame({"a": entry(offsets=[-8, 0])}, bytes(8)),
    "backward offsets": frame({"a": entry(offsets=[8, 0])}, bytes(8)),
    "dtype is a number": frame({"a": entry(dtype=32)}, bytes(8)),
    "shape is null": frame({"a": entry(shape=None)}, bytes(8)),
    "shape is text": frame({"a": entry(shape="2")}, bytes(8)),
    "shape has text": frame({"a": entry(shape=["2"])}, bytes(8)),
    "shape has a fraction": frame({"a": entry(shape=[2.0])}, bytes(8)),
    "shape has a boolean": frame({"a": entry(shape=[True, 2])}, bytes(8)),
    "shape is negative": frame({"a": entry(shape=[-2])}, bytes(8)),
    "shape is twice negative": frame({"a": entry(shape=[-1, -2])}, bytes(8)),
    "shape is too large": frame({"a": entry(shape=[3])}, bytes(8)),
    "shape overflows": frame({"a": entry(shape=[2**62, 4])}, bytes(8)),
    "shape is too small": frame({"a": entry(shape=[1])}, bytes(8)),
    "overlap": frame({"a": entry(), "b": entry(offsets=[4, 12])}, bytes(12)),
    "the same bytes twice": frame({"a": entry(), "b": entry()}, bytes(8)),
    "gap": frame({"a": entry(), "b": entry(offsets=[12, 20])}, bytes(20)),
    "starts late": frame({"a": entry(offsets=[4, 12])}, bytes(12)),
    "beyond the end": frame({"a": entry(), "b": entry(offsets=[8, 16])}, bytes(8)),
    "truncated": GOOD[:-1],
    "something appended": GOOD + b"\0",
}


@pytest.mark.parametrize("kind", LIES)
def test_a_header_that_lies_is_refused_with_the_file(tmp_path: Path, kind: str) -> None:
    text = refusal(put(tmp_path, LIES[kind]))
    assert f"{tmp_path}/{SINGLE}" in text


def test_the_good_file_the_lies_are_made_from_is_read(tmp_path: Path) -> None:
    assert open_checkpoint(str(put(tmp_path, GOOD))).tensors["a"].read().tolist() == [0.0, 0.0]


def test_a_header_larger_than_the_format_allows_is_not_read(tmp_path: Path) -> None:
    with (put(tmp_path, b"") / SINGLE).open("wb") as file:
        file.write(struct.pack("<Q", MAX_HEADER_BYTES + 1))
        file.truncate(MAX_HEADER_BYTES + 100)  # sparse
    assert str(MAX_HEADER_BYTES + 1) in refusal(tmp_path)


@pytest.mark.parametrize("size", range(0, len(GOOD), 3))
def test_a_file_cut_anywhere_is_refused(tmp_path: Path, size: int) -> None:
    assert SINGLE in refusal(put(tmp_path, GOOD[:size]))


@settings(max_examples=150)
@given(data=st.binary(max_size=200))
def test_noise_is_refused_and_never_crashes(tmp_path: Path, data: bytes) -> None:
    refusal(put(tmp_path, struct.pack("<Q", len(data) // 2) + data))


@settings(max_examples=150)
@given(place=st.integers(0, len(GOOD) - 9), bit=st.integers(0, 7))
def test_a_flipped_bit_of_a_header_is_read_or_refused(tmp_path: Path, place: int, bit: int) -> None:
    damaged = bytearray(GOOD)
    damaged[place] ^= 1 << bit
    put(tmp_path, bytes(damaged))
    try:
        checkpoint = open_checkpoint(str(tmp_path))
    except CheckpointError as error:
        assert SINGLE in str(error)  # noqa: PT017
        return
    assert sum(t.nbytes for t in checkpoint.tensors.values()) == 8


@pytest.mark.parametrize("dtype", ["F8_E8M0", "F4", "I128", "", "f32"])
def test_a_dtype_that_is_not_known_is_named_with_its_tensor(tmp_path: Path, dtype: str) -> None:
    text = refusal(put(tmp_path, frame({"layer.weight": entry(dtype=dtype)}, bytes(8))))
    assert f"layer.weight: dtype {dtype}" in text
    assert "BF16" in text


def test_every_known_dtype_has_a_size_and_a_torch_name() -> None:
    assert set(ITEM_BYTES) == set(TORCH_NAMES)
    for name, torch_name in TORCH_NAMES.items():
        assert getattr(torch, torch_name).itemsize == ITEM_BYTES[name]


# --- indexes ---


@pytest.mark.parametrize(
    "name",
    [
        "../secret.safetensors",
        "sub/../../secret.safetensors",
        "/etc/passwd",
        "..\\secret.safetensors",
        "C:\\secret.safetensors",
        "s3://bucket/secret.safetensors",
        "file:///etc/passwd",
        "..",
    ],
)
def test_an_index_that_points_outside_its_folder_is_refused(tmp_path: Path, name: str) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "secret.safetensors")
    text = refusal(put_index(tmp_path / "model", {"a": name}))
    assert INDEX in text
    assert repr(name) in text


@pytest.mark.parametrize("name", ["", ".", "nul\0byte", "x" * 300, 5, None, ["a"], "missing"])
def test_an_index_that_names_no_file_is_refused(tmp_path: Path, name: object) -> None:
    put_index(tmp_path, {"a": name})
    with pytest.raises(SvdmergeError) as caught:
        open_checkpoint(str(tmp_path))
    assert str(tmp_path) in str(caught.value)


NO_INDEXES = [b"", b"nonsense", b"[]", b"{}", b"\xff", b'{"weight_map": []}']
NO_INDEXES += [b'{"weight_map": null}', b'{"weight_map": "a"}', b'{"weight_map": 3}']
NO_INDEXES += [b"[" * 200_000]


@pytest.mark.parametrize("data", NO_INDEXES, ids=lambda data: data[:20].decode("latin-1"))
def test_an_index_that_is_none_is_refused(tmp_path: Path, data: bytes) -> None:
    assert INDEX in refusal(put(tmp_path, data, INDEX))


def test_an_index_of_nothing_is_refused(tmp_path: Path) -> None:
    assert INDEX in refusal(put_index(tmp_path, {}))


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    folder = tiny_base(tmp_path, shards=3)
    lost = folder / "model-00002-of-00003.safetensors"
    lost.unlink()
    assert lost.name in refusal(folder)


def test_a_tensor_that_is_in_no_shard_is_named(tmp_path: Path) -> None:
    folder = tiny_base(tmp_path, shards=2)
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["ghost.weight"] = "model-00001-of-00002.safetensors"
    (folder / INDEX).write_text(json.dumps(index))
    assert "ghost.weight" in refusal(folder)


def test_a_tensor_in_two_shards_is_named(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2), "twice": torch.ones(2)}, tmp_path / "1.safetensors")
    save_file({"b": torch.ones(2), "twice": torch.zeros(2)}, tmp_path / "2.safetensors")
    put_index(tmp_path, {"a": "1.safetensors", "b": "2.safetensors", "twice": "1.safetensors"})
    assert "twice" in refusal(tmp_path)


def test_shards_in_a_folder_below_are_read(tmp_path: Path) -> None:
    put(tmp_path / "parts", GOOD, "1.safetensors")
    assert list(
        open_checkpoint(str(put_index(tmp_path, {"a": "parts/1.safetensors"}))).tensors
    ) == ["a"]


# --- configuration ---


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"vocab_size": 100}, 100),
        ({"vocab_size": 0}, None),
        ({"vocab_size": "100"}, None),
        ({"vocab_size": True}, None),
        ({}, None),
        (None, None),
    ],
)
def test_the_vocabulary_is_the_configurations(
    tmp_path: Path, config: dict[str, Any] | None, expected: int | None
) -> None:
    write_model(tmp_path, {"a": torch.ones(2)}, config)
    assert open_checkpoint(str(tmp_path)).vocab_size == expected


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"7", b"\xff\xfe", b"[" * 200_000])
def test_a_configuration_that_is_none_is_told_with_its_file(tmp_path: Path, data: bytes) -> None:
    put(tmp_path, GOOD)
    assert "config.json" in refusal(put(tmp_path, data, "config.json"))


# --- revisions, and files that change ---


def test_a_revision_changes_with_the_content_and_not_with_the_reference(tmp_path: Path) -> None:
    folder = tiny_base(tmp_path / "model")
    first = open_checkpoint(str(folder)).revision
    assert open_checkpoint(f"{folder}/").revision == first
    assert open_checkpoint(str(folder / ".." / "model")).revision == first
    tiny_base(tmp_path / "model", seed=1)
    assert open_checkpoint(str(folder)).revision != first


def test_two_places_are_two_revisions_even_if_times_and_sizes_agree(tmp_path: Path) -> None:
    one, other = tiny_base(tmp_path / "one"), tiny_base(tmp_path / "other", seed=1)
    for folder in (one, other):
        os.utime(folder / SINGLE, (1, 1))
    assert open_checkpoint(str(one)).revision != open_checkpoint(str(other)).revision


def test_a_revision_does_not_depend_on_side_files(tmp_path: Path) -> None:
    folder = tiny_base(tmp_path)
    first = open_checkpoint(str(folder)).revision
    (folder / "README.md").write_text("changed")
    assert open_checkpoint(str(folder)).revision == first


@pytest.mark.parametrize("change", ["grown", "touched", "shrunk", "gone", "replaced"])
def test_a_file_that_changed_after_its_header_was_read_is_told(tmp_path: Path, change: str) -> None:
    file = tiny_base(tmp_path) / SINGLE
    ref = open_checkpoint(str(tmp_path)).tensors[POSITION_IDS]
    data, time = file.read_bytes(), file.stat().st_mtime_ns
    if change == "gone":
        file.unlink()
    elif change == "touched":
        os.utime(file, ns=(time, time + 1))
    else:
        new = {"grown": data + b"\0", "shrunk": data[:-1], "replaced": bytes(len(data))}[change]
        file.write_bytes(new)
        os.utime(file, ns=(time, time + (change == "replaced")))
    with pytest.raises(CheckpointError, match="changed or vanished"):
        ref.read()


def test_an_object_that_was_replaced_in_a_bucket_is_told(s3_uri: str) -> None:
    folder = Folder.at(s3_uri)
    folder.put(SINGLE, GOOD)
    ref = open_checkpoint(s3_uri).tensors["a"]
    folder.put(SINGLE, frame({"a": entry()}, b"\1" * 8))
    with pytest.raises(CheckpointError, match="changed or vanished"):
        ref.read()
