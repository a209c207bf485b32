"""Safetensors checkpoints read by ranges: headers first, then exactly the bytes of one matrix.

Headers are bounded before they are believed; names from an index never leave their folder.
"""

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, cast

from svdmerge.errors import CheckpointError
from svdmerge.storage.filesystem import FileStat, Folder
from svdmerge.storage.model_ref import parse_reference, pinned
from svdmerge.storage.quantised import FP8, Scale, dequantised, scaled

if TYPE_CHECKING:
    import torch

    from svdmerge.storage.low_rank import LowRank

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# The format's own limit on headers.
MAX_HEADER_BYTES = 100_000_000
# Configurations have kilobytes; an adapter's with a rank for every layer, a megabyte.
MAX_CONFIG_BYTES = 16 << 20
# Of a file's name, on common filesystems.
MAX_NAME = 255
ITEM_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2,
    "F8_E4M3": 1, "F8_E5M2": 1,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "U16": 2, "U32": 4, "U64": 8, "BOOL": 1,
}  # fmt: skip
FLOATING = frozenset({"F64", "F32", "F16", "BF16"}) | FP8
TORCH_NAMES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8",
    "U8": "uint8", "U16": "uint16", "U32": "uint32", "U64": "uint64", "BOOL": "bool",
}  # fmt: skip
# Entries read at once of what is too large to be held: 8 MiB of bfloat16 are what a range read of
# an object store is fast with, and a product of so many entries as fast as of more.
TILE = 1 << 22
# The name of one file of several.
_PART = re.compile(r"-\d{5}-of-(?!00001)\d{5}\.safetensors$")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_CONVERT = (
    "Convert it once where you trust it: "
    "`model.save_pretrained(folder, safe_serialization=True)` writes safetensors."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorRef:
    """Where one tensor's bytes lie. Self-contained: a worker needs nothing else to read it."""

    name: str
    folder: Folder
    file: str
    stat: FileStat
    dtype: str
    shape: tuple[int, ...]
    offset: int
    scale: Scale | None = None
    """Of FP8 weights: what they are multiplied by."""

    @property
    def numel(self) -> int:
        """Elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.numel * ITEM_BYTES[self.dtype]

    def read_bytes(self, *, start: int = 0, count: int | None = None) -> bytes:
        """`count` elements from element `start`, as stored.

        Raises:
            CheckpointError: the file changed since its header was read.
        """
        item = ITEM_BYTES[self.dtype]
        size = (self.numel - start if count is None else count) * item
        if self.folder.stat(self.file) != self.stat:
            raise CheckpointError(
                f"{self.folder.uri}/{self.file}: changed or vanished while it was being read",
                "Its size or version is no longer what its header was read at.",
                "Run the same command again; the new content is another revision.",
            )
        begin = self.offset + start * item
        return self.folder.read_exactly(self.file, start=begin, count=size) if size else b""

    def decode(self, data: bytes, *, start: int = 0) -> "torch.Tensor":
        """A flat tensor of stored bytes, of elements from `start` on; FP8 in float32."""
        import torch

        dtype = getattr(torch, TORCH_NAMES[self.dtype])
        # frombuffer takes no empty buffer.
        values = (
            torch.frombuffer(bytearray(data), dtype=dtype) if data else torch.empty(0).to(dtype)
        )
        if self.scale is not None:
            return dequantised(values, self.scale, shape=self.shape, start=start)
        return values.to(torch.float32) if self.dtype in FP8 else values

    def digest(self, data: bytes) -> str:
        """sha256 of what the values of stored bytes depend on."""
        digest = hashlib.sha256(data)
        digest.update(self.scale_bytes())
        return digest.hexdigest()

    def scale_bytes(self) -> bytes:
        """What stored values are multiplied by, as stored; nothing if they are not."""
        return self.scale.ref.read_bytes() if self.scale is not None else b""

    def read(self) -> "torch.Tensor":
        """The whole tensor."""
        return self.decode(self.read_bytes()).reshape(self.shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A model's headers: every tensor's place, the configuration, and the immutable revision."""

    reference: str
    folder: Folder
    tensors: Mapping[str, TensorRef]
    config: Mapping[str, Any]
    revision: str
    low_rank: "Mapping[str, LowRank]" = field(default_factory=dict[str, "LowRank"])
    """Of an adapter: differences that come on top of the tensors, by name."""
    is_partial: bool = False
    """Whether a tensor that is not there is the base's: so it is in adapters."""

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.nbytes for t in self.tensors.values())

    @property
    def vocab_size(self) -> int | None:
        """The configuration's vocabulary size."""
        size = self.config.get("vocab_size")
        return size if type(size) is int and size > 0 else None


def open_checkpoint(reference: str) -> Checkpoint:
    """The checkpoint at a folder, a single safetensors file, an fsspec URI of either, or a hub id.

    Raises:
        CheckpointError: nothing is there, it is a pickle, or a header or index is malformed.
    """
    folder = Folder.at(pinned(parse_reference(reference).model))
    if folder.uri.endswith(PICKLES):
        raise _pickle(reference)
    if folder.stat() is not None:
        parent, _, name = folder.uri.rpartition("/")
        folder, files = Folder(parent), [name]
    else:
        files = _weight_files(folder, reference)
    tensors: dict[str, TensorRef] = {}
    digest = hashlib.sha256()
    if folder.is_local:
        # Archives and images normalise times: two fine-tunes may agree in all but their place.
        digest.update(folder.uri.encode())
    for file in sorted(files):
        found, header, stat = read_header(folder, file)
        if twice := sorted(set(found) & set(tensors)):
            raise CheckpointError(
                f"{folder.uri}/{file}: {twice[0]} stands in another file of the model too"
            )
        tensors |= found
        digest.update(f"{file}\0{stat.size}\0{stat.version}\0{header}\0".encode())
    config = _config(folder)
    tensors = scaled(tensors, config=config, place=folder.uri)
    return Checkpoint(
        reference=reference,
        folder=folder,
        tensors=dict(sorted(tensors.items())),
        config=config,
        revision=digest.hexdigest()[:32],
    )


def _weight_files(folder: Folder, reference: str) -> list[str]:
    names = folder.names()
    if INDEX in names:
        return _indexed(folder)
    if SINGLE in names:
        return [SINGLE]
    others = [n for n in names if n.endswith(".safetensors")]
    if len(others) == 1 and not _PART.search(others[0]):
        return others
    if others:
        raise CheckpointError(
            f"{reference}: has no {INDEX}",
            f"Found {', '.join(others[:3])}; it cannot be told which files make up the model.",
            "Point at one file, or add the index.",
        )
    if any(n.endswith(PICKLES) for n in names):
        raise _pickle(reference)
    if names:
        raise CheckpointError(
            f"{reference}: holds no weights", f"Expected {SINGLE} or {INDEX}.", "Check the path."
        )
    raise CheckpointError(
        f"{reference}: no such model",
        "Expected a folder, a .safetensors file or an fsspec URI (a hub model is hf://org/name).",
        "Check the path.",
    )


def _pickle(reference: str) -> CheckpointError:
    return CheckpointError(
        f"{reference}: is a pickle checkpoint",
        "Loading a pickle runs whatever code it holds, so only safetensors are read.",
        _CONVERT,
    )


def _indexed(folder: Folder) -> list[str]:
    place = f"{folder.uri}/{INDEX}"
    try:
        raw = json.loads(folder.read(INDEX, start=0, stop=MAX_HEADER_BYTES))
        weight_map = raw["weight_map"]
        files = {str(v) for v in weight_map.values()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        weight_map, files = {}, set[str]()
    if not files:
        raise CheckpointError(f"{place}: not an index", "Expected a `weight_map` object.") from None
    for file in files:
        path = PurePosixPath(file)
        if "\0" in file or len(path.name) > MAX_NAME:
            raise CheckpointError(f"{place}: names {file[:80]!r}, which can be no file")
        if path.is_absolute() or ".." in path.parts or "\\" in file or "://" in file:
            raise CheckpointError(
                f"{place}: points outside its folder, at {file!r}",
                "An index may only name files beside it.",
                "Do not use this checkpoint unless you know who wrote it.",
            )
    found = {name for file in files for name in read_header(folder, file)[0]}
    if missing := sorted(set(weight_map) - found):
        raise CheckpointError(
            f"{place}: names {missing[0]}, which is in none of its files",
            f"{len(missing)} tensors of the index are missing.",
            "Fetch the checkpoint again.",
        )
    return sorted(files)


def read_header(folder: Folder, file: str) -> tuple[dict[str, TensorRef], str, FileStat]:
    """A file's tensors, its header's sha256, and its version."""
    place = f"{folder.uri}/{file}"
    stat = folder.stat(file)
    if stat is None:
        raise CheckpointError(f"{place}: missing", "The index names it.", "Fetch it.")
    length = int.from_bytes(folder.read_exactly(file, start=0, count=min(8, stat.size)), "little")
    if stat.size < 8 or length > min(MAX_HEADER_BYTES, stat.size - 8):
        raise CheckpointError(
            f"{place}: not a safetensors file",
            f"Its header claims {length} bytes; the file has {stat.size}.",
            "Fetch it again; it may be truncated.",
        )
    data = folder.read_exactly(file, start=8, count=length)
    try:
        header = json.loads(data)
        entries = {k: v for k, v in header.items() if k != "__metadata__"}
        tensors = {
            name: _tensor(folder, file, stat, name, cast(dict[str, Any], entry), length + 8)
            for name, entry in entries.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{place}: malformed header", str(error), "Fetch it again.") from None
    _check_layout(place, tensors, start=length + 8, size=stat.size)
    return tensors, hashlib.sha256(data).hexdigest(), stat


def _tensor(
    folder: Folder, file: str, stat: FileStat, name: str, entry: dict[str, Any], data_start: int
) -> TensorRef:
    dtype, shape = str(entry["dtype"]), tuple(entry["shape"])
    begin, end = entry["data_offsets"]
    place = f"{folder.uri}/{file}: {name}"
    if dtype not in ITEM_BYTES:
        raise CheckpointError(
            f"{place}: dtype {dtype} is not supported",
            f"Known dtypes: {', '.join(ITEM_BYTES)}. Quantised weights need their scales.",
            "Dequantise the checkpoint first.",
        )
    if not all(type(v) is int and v >= 0 for v in (*shape, begin, end)):
        raise CheckpointError(f"{place}: shape or offsets are not whole numbers")
    ref = TensorRef(
        name=name, folder=folder, file=file, stat=stat, dtype=dtype, shape=shape,
        offset=data_start + begin,
    )  # fmt: skip
    if end - begin != ref.nbytes:
        raise CheckpointError(
            f"{place}: claims {end - begin} bytes, but {dtype} {list(shape)} has {ref.nbytes}",
            "The header lies about this tensor.",
            "Do not use this checkpoint unless you know who wrote it.",
        )
    return ref


def _check_layout(place: str, tensors: Mapping[str, TensorRef], *, start: int, size: int) -> None:
    """Raise unless tensors fill the file from its header to its end: the format's rule."""
    position = start
    for ref in sorted(tensors.values(), key=lambda t: (t.offset, t.nbytes)):
        if ref.offset != position:
            raise CheckpointError(
                f"{place}: {ref.name} starts at byte {ref.offset}, expected {position}",
                "Tensors must follow each other without gap or overlap.",
                "Do not use this checkpoint unless you know who wrote it.",
            )
        position += ref.nbytes
    if position != size:
        raise CheckpointError(
            f"{place}: has {size} bytes, its header describes {position}",
            "The file is truncated or something was appended.",
            "Fetch it again.",
        )


def _config(folder: Folder) -> Mapping[str, Any]:
    if folder.stat("config.json") is None:
        return {}
    try:
        config = json.loads(folder.read("config.json", start=0, stop=MAX_CONFIG_BYTES))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{folder.uri}/config.json: not valid JSON", str(error)) from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{folder.uri}/config.json: not an object")
    return cast(dict[str, Any], config)
