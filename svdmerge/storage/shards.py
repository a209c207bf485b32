"""Component shards: Arrow IPC files whose batches are blocks of one matrix's components."""

import hashlib
import io
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch

from svdmerge.core.components import RankOneComponents
from svdmerge.core.delta import all_finite
from svdmerge.errors import ContentError, StoreError
from svdmerge.storage import schema
from svdmerge.storage.filesystem import Folder
from svdmerge.storage.layout import BLOCK

# An IPC file starts with its magic, padded to eight bytes, and the schema's message.
_PRELUDE_BYTES = 8 + schema.SHARD.serialize().size


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """Components of one matrix, numbered from `first`, to be stored."""

    parameter: str
    kind: str
    first: int
    components: RankOneComponents
    class_group: int | None = None
    """Of tailors: the group that they belong to, counted from 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """A stored batch: which components it holds, where its bytes lie, and their sha256.

    The bytes are an Arrow record batch message: read by range, and parsed only once they are known
    to be what was written, for a damaged message can crash its parser.
    """

    parameter: str
    first: int
    count: int
    offset: int
    size: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Spectrum:
    """A matrix's singular values from `first` on, and what bounds those not listed."""

    parameter: str
    sha256: str
    m: int
    n: int
    fro: float
    base_fro: float | None
    """Of the base's matrix; None where it was not read, as of adapters."""
    bound: float
    noise: float
    """Edge of the noise, by the record of the first values."""
    first: int
    s: np.ndarray
    solver: str
    """What found them."""


def encode(rows: Iterable[Rows]) -> tuple[bytes, tuple[Block, ...]]:
    """A shard's bytes, and its blocks. The same rows give the same bytes."""
    sink, blocks = io.BytesIO(), list[Block]()
    with pa.ipc.new_file(sink, schema.SHARD) as writer:
        for row in rows:
            for start in range(0, len(row.components), BLOCK):
                part = row.components.slice(start, start + BLOCK).to(torch.float32)
                if not all(all_finite(t) for t in (part.u, part.s, part.vh)):
                    raise ContentError(
                        f"{row.parameter}: a component is not finite in float32",
                        f"One of those from {row.first + start} on.",
                        "Use smaller weights and `scale`, or remove the source.",
                    )
                # The magic and the schema are written with the first batch.
                offset = max(sink.tell(), _PRELUDE_BYTES)
                writer.write_batch(_batch(row, start=row.first + start, part=part))
                message = sink.getbuffer()[offset : sink.tell()]
                blocks.append(
                    Block(
                        parameter=row.parameter,
                        first=row.first + start,
                        count=len(part),
                        offset=offset,
                        size=len(message),
                        sha256=hashlib.sha256(message).hexdigest(),
                    )
                )
                message.release()  # a file in memory cannot grow while it is looked at
    return sink.getvalue(), tuple(blocks)


def read_blocks(
    folder: Folder, path: str, blocks: Sequence[Block]
) -> Iterator[tuple[Block, RankOneComponents]]:
    """The blocks' components, by one range read from the first block to the last.

    Raises:
        StoreError: the shard is missing, or a block is not what its commit says.
    """
    if not blocks:
        return
    start = min(b.offset for b in blocks)
    try:
        end = max(b.offset + b.size for b in blocks)
        data = folder.read_exactly(path, start=start, count=end - start)
    except FileNotFoundError:
        raise _damaged(folder, path, "missing") from None
    for block in blocks:
        message = data[block.offset - start : block.offset - start + block.size]
        if hashlib.sha256(message).hexdigest() != block.sha256:
            raise _damaged(folder, path, block.parameter)
        yield block, _components(pa.ipc.read_record_batch(pa.py_buffer(message), schema.SHARD))


def encode_table(table: pa.Table) -> bytes:
    """An Arrow IPC file of a table."""
    sink = io.BytesIO()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


def decode_table(data: bytes) -> pa.Table:
    """The table in an Arrow IPC file. Raises: StoreError, if it is none."""
    try:
        return pa.ipc.open_file(pa.BufferReader(data)).read_all()
    except pa.ArrowException as error:
        raise StoreError("a table of the store is damaged", str(error)) from error


def encode_spectra(spectra: Sequence[Spectrum]) -> bytes:
    """A sidecar's bytes."""
    columns = [[getattr(x, f.name) for x in spectra] for f in schema.SPECTRUM if f.name != "s"]
    values = [pa.array(x.s, pa.float32()) for x in spectra]
    columns.append(_lists(values))
    return encode_table(pa.table(columns, schema=schema.SPECTRUM))


def decode_spectra(data: bytes) -> list[Spectrum]:
    """The spectra in a sidecar."""
    table = decode_table(data)
    if table.schema.metadata != schema.SPECTRUM.metadata:
        raise StoreError(
            f"a spectrum sidecar has schema {table.schema.metadata}",
            f"This version reads {schema.SPECTRUM.metadata}.",
            "Use a fresh store.",
        )
    lists = table.column("s").combine_chunks()
    # Columns, not rows: a row at a time takes longer than reading the file.
    values, ends = lists.values.to_numpy(), lists.offsets.to_numpy()
    names = [f.name for f in schema.SPECTRUM if f.name != "s"]
    columns = [table.column(name).to_pylist() for name in names]
    return [
        Spectrum(**dict(zip(names, row, strict=True)), s=values[start:end])
        for *row, start, end in zip(*columns, ends[:-1], ends[1:], strict=True)
    ]


def _lists(parts: Sequence[pa.Array]) -> pa.Array:
    offsets = np.cumsum([0, *(len(p) for p in parts)])
    values = pa.concat_arrays(parts) if parts else pa.array([], pa.float32())
    return pa.LargeListArray.from_arrays(
        pa.array(offsets, pa.int64()), values, type=schema.SPECTRUM.field("s").type
    )


def _batch(row: Rows, *, start: int, part: RankOneComponents) -> pa.RecordBatch:
    count = len(part)
    return pa.record_batch(
        [
            pa.array([row.parameter] * count),
            pa.array(range(start, start + count), pa.int32()),
            pa.array([row.kind] * count),
            pa.array([row.class_group] * count, pa.int32()),
            pa.array(part.s.numpy()),
            _vectors(part.u.T),
            _vectors(part.vh),
        ],
        schema=schema.SHARD,
    )


def _vectors(rows: torch.Tensor) -> pa.Array:
    """A list column from the rows of (count, length)."""
    values = pa.array(rows.contiguous().numpy().reshape(-1))
    offsets = pa.array(np.arange(rows.shape[0] + 1, dtype=np.int64) * rows.shape[1])
    return pa.LargeListArray.from_arrays(offsets, values, type=schema.SHARD.field("u").type)


def _matrix(batch: pa.RecordBatch, column: str) -> torch.Tensor:
    """(count, length) from a list column; copied, for Arrow's memory is read-only."""
    values = batch.column(column).flatten().to_numpy(zero_copy_only=False)
    return torch.from_numpy(values.reshape(batch.num_rows, -1).copy())


def _components(batch: pa.RecordBatch) -> RankOneComponents:
    s = batch.column("s").to_numpy(zero_copy_only=False)
    return RankOneComponents(
        u=_matrix(batch, "u").T, s=torch.from_numpy(s.copy()), vh=_matrix(batch, "vh")
    )


def _damaged(folder: Folder, path: str, what: str) -> StoreError:
    return StoreError(
        f"{folder.uri}/{path}: shard is missing or damaged ({what})",
        "It is not what its commit says.",
        f"`svdmerge store verify {folder.uri}` names everything damaged; delete the commits it "
        "names and run again.",
    )
