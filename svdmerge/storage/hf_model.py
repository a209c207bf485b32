"""The output's weights in the base's layout: streamed by tiles, checked, indexed."""

import hashlib
import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float

from svdmerge.core.components import RankOneComponents, none
from svdmerge.core.delta import DTYPE, all_finite
from svdmerge.core.params import Action, Parameter
from svdmerge.errors import ContentError, RetryableError, StoreError
from svdmerge.storage.checkpoint import (
    FLOATING,
    INDEX,
    ITEM_BYTES,
    SINGLE,
    TILE,
    TORCH_NAMES,
    Checkpoint,
    TensorRef,
    read_header,
)
from svdmerge.storage.filesystem import Folder
from svdmerge.storage.manifest import Committed
from svdmerge.storage.quantised import FP8

RECIPE = "svdmerge_recipe.yml"
PROVENANCE = "provenance/components.parquet"
# Read at once where a file is read whole: what a range read of an object store is fast with.
PIECE_BYTES = 16 << 20
DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputTensor:
    """A tensor of the output: the base's, and the matrices to add to it."""

    base: TensorRef
    dtype: str
    matrices: tuple[Parameter, ...]

    @property
    def nbytes(self) -> int:
        """Size in the output."""
        return self.base.numel * ITEM_BYTES[self.dtype]


@dataclass(frozen=True, slots=True, kw_only=True)
class WrittenFile:
    """A file as it was written."""

    file: str
    size: int
    sha256: str


def output_tensors(
    base: Checkpoint, *, parameters: Sequence[Parameter], out_dtype: str
) -> list[OutputTensor]:
    """Every tensor of the output, in the base's order of names; integers keep their dtype."""
    by_tensor: dict[str, list[Parameter]] = {}
    for p in parameters:
        if p.action is not Action.EQUAL:
            by_tensor.setdefault(p.tensor, []).append(p)
    return [
        OutputTensor(
            base=ref,
            dtype=_written_as(ref, out_dtype),
            matrices=tuple(by_tensor.get(name, ())),
        )
        for name, ref in base.tensors.items()
    ]


def _written_as(ref: TensorRef, out_dtype: str) -> str:
    if ref.dtype not in FLOATING:
        return ref.dtype
    # FP8 would need scales of its own: merged weights are written without.
    return DTYPES.get(out_dtype, "BF16" if ref.dtype in FP8 else ref.dtype)


def split(
    tensors: Sequence[OutputTensor], *, max_bytes: int | None
) -> dict[str, list[OutputTensor]]:
    """Tensors by file name: one `model.safetensors`, or numbered shards.

    They lie together as in the files of the base, or with `max_bytes` in shards of at most so many;
    a tensor larger than that gets a shard of its own.
    """
    shards = _as_in_base(tensors) if max_bytes is None else _of_size(tensors, max_bytes)
    if len(shards) == 1:
        return {SINGLE: shards[0]}
    total = len(shards)
    return {f"model-{i:05d}-of-{total:05d}.safetensors": s for i, s in enumerate(shards, start=1)}


def _as_in_base(tensors: Sequence[OutputTensor]) -> list[list[OutputTensor]]:
    shards: dict[str, list[OutputTensor]] = {t.base.file: [] for t in tensors}
    for tensor in tensors:
        shards[tensor.base.file].append(tensor)
    return [shards[file] for file in sorted(shards)] or [[]]


def _of_size(tensors: Sequence[OutputTensor], max_bytes: int) -> list[list[OutputTensor]]:
    shards: list[list[OutputTensor]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.nbytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    return shards


def put_index(folder: Folder, files: Mapping[str, Sequence[OutputTensor]]) -> list[WrittenFile]:
    """The index of a sharded model as written; none where a single file holds it.

    It makes the shards a model: put it when all of them are there.
    """
    return [put_file(folder, INDEX, index_json(files))] if len(files) > 1 else []


def put_file(folder: Folder, name: str, data: bytes) -> WrittenFile:
    """A small file as written."""
    folder.put(name, data)
    return WrittenFile(file=name, size=len(data), sha256=hashlib.sha256(data).hexdigest())


def index_json(files: Mapping[str, Sequence[OutputTensor]]) -> bytes:
    """The index of a sharded model; `total_size` counts bytes."""
    every = [t for tensors in files.values() for t in tensors]
    weight_map = {t.base.name: file for file, tensors in files.items() for t in tensors}
    metadata = {
        "total_size": sum(t.nbytes for t in every),
        "total_parameters": sum(t.base.numel for t in every),
    }
    index = {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
    return (json.dumps(index, indent=2) + "\n").encode()


def write_safetensors(
    folder: Folder, file: str, *, tensors: Sequence[OutputTensor], factors: Folder
) -> WrittenFile:
    """A weights file, streamed, reopened and checked: memory is that of a tile and one matrix's
    factors, whatever the file's size.

    The safetensors library writes from tensors that are all in memory, so the header (the format's
    few lines) is made here.
    """
    committed = load_factors(factors)
    header = _header(tensors)
    digest, size = hashlib.sha256(), 0
    tiles = (output_tiles(t, factors=committed) for t in tensors)
    blocks = itertools.chain([header], itertools.chain.from_iterable(tiles))
    with folder.writing(file) as out:
        for block in blocks:
            out.write(block)
            digest.update(block)
            size += len(block)
    written = WrittenFile(file=file, size=size, sha256=digest.hexdigest())
    check_written(folder, written, tensors=tensors)
    return written


def check_written(folder: Folder, written: WrittenFile, *, tensors: Sequence[OutputTensor]) -> None:
    """Read a weights file once more: its header, its length, its sha256.

    Raises:
        StoreError: it does not hold what was written; RetryableError, if another try may help.
    """
    found, _, stat = read_header(folder, written.file)
    got = {name: (ref.dtype, ref.shape) for name, ref in found.items()}
    same = got == {t.base.name: (t.dtype, t.base.shape) for t in tensors}
    if same and stat.size == written.size and file_sha256(folder, written.file) == written.sha256:
        return
    kind = StoreError if folder.is_local else RetryableError
    raise kind(
        f"{folder.uri}/{written.file}: is not what was written to it",
        f"It has {stat.size} bytes, expected {written.size} of sha256 {written.sha256}.",
        "Check the disk or the store, then run the same command again.",
    )


def file_size(tensors: Sequence[OutputTensor]) -> int:
    """Bytes of a weights file."""
    return len(_header(tensors)) + sum(t.nbytes for t in tensors)


def file_sha256(folder: Folder, name: str) -> str:
    """sha256 of a file, read in pieces.

    Raises:
        FileNotFoundError: there is none.
    """
    stat, digest = folder.stat(name), hashlib.sha256()
    if stat is None:
        raise FileNotFoundError(f"{folder.uri}/{name}")
    for start in range(0, stat.size, PIECE_BYTES):
        count = min(PIECE_BYTES, stat.size - start)
        digest.update(folder.read_exactly(name, start=start, count=count))
    return digest.hexdigest()


def load_factors(folder: Folder) -> Committed:
    """The merged factors in a run's folder."""
    return Committed.load(folder, commits="", data="")


def output_tiles(tensor: OutputTensor, *, factors: Committed) -> Iterator[bytes]:
    """A tensor of the output as stored, by tiles: the base's own bytes where nothing is added or
    cast.

    Raises:
        ContentError: a value does not fit the output's dtype.
    """
    if not tensor.matrices and tensor.dtype == tensor.base.dtype:
        for start in range(0, tensor.base.numel, TILE):
            yield tensor.base.read_bytes(start=start, count=min(TILE, tensor.base.numel - start))
        return
    for _, merged in merged_tiles(tensor, factors=factors):
        cast = merged.to(getattr(torch, TORCH_NAMES[tensor.dtype]))
        if not all_finite(cast) and (tensor.matrices or all_finite(merged)):
            largest = float(merged.nan_to_num(posinf=math.inf, neginf=-math.inf).abs().max())
            raise ContentError(
                f"{tensor.base.name}: overflows {tensor.dtype}",
                f"Its largest value is {largest:.3g}.",
                "Use a wider `out_dtype`, or smaller weights and `scale`.",
            )
        yield cast.view(torch.uint8).numpy().tobytes()


def merged_tiles(
    tensor: OutputTensor, *, factors: Committed
) -> Iterator[tuple[int, Float[torch.Tensor, " t"]]]:
    """Base + merged difference in float64, before the cast: tiles of entries one after another, and
    the first entry of each."""
    for p in tensor.matrices or (_as_row(tensor.base),):
        added = read_factors(factors, p) if tensor.matrices else none(p.m, p.n)
        for rows, columns in _tiles(p):
            start = p.start + rows.start * p.n + columns.start
            data = tensor.base.read_bytes(start=start, count=len(rows) * len(columns))
            part = RankOneComponents(
                u=added.u[rows.start : rows.stop], s=added.s,
                vh=added.vh[:, columns.start : columns.stop],
            )  # fmt: skip
            yield start, tensor.base.decode(data).to(DTYPE) + part.dense().reshape(-1)


def _as_row(ref: TensorRef) -> Parameter:
    return Parameter(id="", tensor=ref.name, start=0, m=1, n=ref.numel, action=Action.BASE)


def _tiles(p: Parameter) -> Iterator[tuple[range, range]]:
    """Rows and columns of a matrix's tiles, each without a gap in memory: whole rows, or parts of
    one."""
    height = max(1, TILE // max(1, p.n))
    width = max(1, p.n if height > 1 else TILE)
    for first in range(0, p.m, height):
        for left in range(0, p.n, width):
            yield range(first, min(first + height, p.m)), range(left, min(left + width, p.n))


def read_factors(factors: Committed, parameter: Parameter) -> RankOneComponents:
    """The merged factors of a matrix, in float64."""
    depth = factors.depth(parameter.id)
    if depth == 0:
        if parameter.id not in factors:
            raise StoreError(
                f"{factors.store.uri}: {parameter.id} has no merged factors",
                "The run that should have stored them did not finish.",
                "Run the same command again.",
            )
        return none(parameter.m, parameter.n)
    return factors.read(parameter.id, range(depth)).to(DTYPE)


def _header(tensors: Sequence[OutputTensor]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for tensor in tensors:
        entries[tensor.base.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.base.shape),
            "data_offsets": [position, position + tensor.nbytes],
        }
        position += tensor.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    # Padded to eight bytes, as the library does, so that the data are aligned.
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
