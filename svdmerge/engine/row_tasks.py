"""What runs on workers for a matrix that none may hold: norms and products of blocks of rows."""

import hashlib
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

import torch
from safetensors import torch as files
from torch import Tensor

from svdmerge.core.delta import delta
from svdmerge.core.noise import SquaredNorms, squared_norms
from svdmerge.core.params import Parameter
from svdmerge.core.products import DOUBLED, image, step
from svdmerge.engine.differences import check_finite, norm_of
from svdmerge.engine.tasks import peak_rss_bytes
from svdmerge.storage.checkpoint import ITEM_BYTES, TILE, TensorRef
from svdmerge.storage.filesystem import Folder


class Pass(StrEnum):
    """What is made of a matrix A in one pass over it."""

    STEP = "step"  # A x and A^T A x
    IMAGE = "image"  # A x in float64
    PULL = "pull"  # A^T u


@dataclass(frozen=True, slots=True, kw_only=True)
class RowBlock:
    """Rows first..stop-1 of a source's matrix and the base's, where they lie."""

    parameter: Parameter
    source: TensorRef
    base: TensorRef
    first: int
    stop: int

    @property
    def nbytes(self) -> int:
        """What a pass reads."""
        items = ITEM_BYTES[self.source.dtype] + ITEM_BYTES[self.base.dtype]
        return (self.stop - self.first) * self.parameter.n * items

    @property
    def tile_rows(self) -> int:
        """Rows of a tile at most."""
        return min(max(1, TILE // self.parameter.n), self.stop - self.first)

    def read(self) -> Iterator[tuple[int, tuple[bytes, bytes]]]:
        """The source's and the base's bytes, a tile of rows at a time, and the element of the
        tensors that it begins at."""
        p, height = self.parameter, self.tile_rows
        for first in range(self.first, self.stop, height):
            start, count = p.start + first * p.n, (min(first + height, self.stop) - first) * p.n
            yield (
                start,
                (
                    self.source.read_bytes(start=start, count=count),
                    self.base.read_bytes(start=start, count=count),
                ),
            )

    def decoded(self, start: int, raw: tuple[bytes, bytes]) -> tuple[Tensor, Tensor]:
        """A tile of what `read` gave, both of (rows, n)."""
        source, base = (
            ref.decode(data, start=start).reshape(-1, self.parameter.n)
            for ref, data in zip((self.source, self.base), raw, strict=True)
        )
        return source, base

    def differences(self, dtype: torch.dtype) -> Iterator[Tensor]:
        """Their difference, a tile of rows at a time, each in the place of the one before."""
        buffers = torch.empty(2, self.tile_rows, self.parameter.n, dtype=dtype)
        for start, raw in self.read():
            source, base = self.decoded(start, raw)
            yield delta(source, base=base, dtype=dtype, buffers=buffers[:, : len(source)])


def put_tensors(folder: Folder, name: str, **tensors: Tensor) -> None:
    """Write tensors as one scratch object."""
    folder.put_scratch(name, files.save({key: t.contiguous() for key, t in tensors.items()}))


def get_tensors(folder: Folder, name: str) -> dict[str, Tensor]:
    """The tensors of a scratch object."""
    return files.load(folder.read(name))


@dataclass(frozen=True, slots=True, kw_only=True)
class SurveyUnit:
    """A whole matrix of one source, to be read once in order."""

    name: str
    memory_bytes: int
    threads: int
    rows: RowBlock
    scratch: Folder


@dataclass(frozen=True, slots=True, kw_only=True)
class Survey:
    """What one pass over a matrix tells of it."""

    source_sha256: str
    base_sha256: str
    fro: float
    base_fro: float
    bytes_read: int
    peak_rss_bytes: int


NORMS = "norms.safetensors"


def survey(unit: SurveyUnit) -> Survey:
    """Checksums of a matrix as its bytes lie, and its norms, of rows and columns in the scratch.

    One task, for a checksum has an order.

    Raises:
        ContentError: NaN or Inf in a tensor.
    """
    digests, base_norms = (hashlib.sha256(), hashlib.sha256()), list[float]()
    refs = unit.rows.source, unit.rows.base

    def tiles() -> Iterator[Tensor]:
        for start, raw in unit.rows.read():
            pair = unit.rows.decoded(start, raw)
            for digest, data, tensor, ref in zip(digests, raw, pair, refs, strict=True):
                digest.update(data)
                check_finite(tensor, ref)
            base_norms.append(norm_of(pair[1]))
            yield from delta(pair[0], base=pair[1]).split(DOUBLED)

    norms = squared_norms(tiles(), n=unit.rows.parameter.n)
    for digest, ref in zip(digests, refs, strict=True):
        digest.update(ref.scale_bytes())
    put_tensors(unit.scratch, NORMS, rows=norms.rows, columns=norms.columns)
    return Survey(
        source_sha256=digests[0].hexdigest(),
        base_sha256=digests[1].hexdigest(),
        fro=float(norms.rows.sum()) ** 0.5,
        base_fro=math.hypot(*base_norms),
        bytes_read=unit.rows.nbytes,
        peak_rss_bytes=peak_rss_bytes(),
    )


def surveyed_norms(scratch: Folder) -> SquaredNorms:
    """The norms that `survey` left."""
    found = get_tensors(scratch, NORMS)
    return SquaredNorms(rows=found["rows"], columns=found["columns"])


@dataclass(frozen=True, slots=True, kw_only=True)
class PassUnit:
    """A block's part in a pass: what it is multiplied with, and where the products go."""

    name: str
    memory_bytes: int
    threads: int
    kind: Pass
    rows: RowBlock
    dtype: str
    scratch: Folder
    given: str
    product: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PassReceipt:
    """What a block's part in a pass took."""

    bytes_read: int
    seconds: float
    peak_rss_bytes: int


def multiply(unit: PassUnit) -> PassReceipt:
    """Products of one block of rows, written to the scratch: the same bits whoever does it."""
    start = time.perf_counter()
    x = get_tensors(unit.scratch, unit.given)["x"]
    tiles = unit.rows.differences(getattr(torch, unit.dtype))
    if unit.kind is Pass.STEP:
        y, z = step(tiles, x)
        put_tensors(unit.scratch, unit.product, y=y, z=z.T)
    elif unit.kind is Pass.IMAGE:
        put_tensors(unit.scratch, unit.product, y=image(tiles, x))
    else:
        put_tensors(unit.scratch, unit.product, z=_pulled(tiles, x))
    return PassReceipt(
        bytes_read=unit.rows.nbytes,
        seconds=time.perf_counter() - start,
        peak_rss_bytes=peak_rss_bytes(),
    )


def _pulled(tiles: Iterator[Tensor], u: Tensor) -> Tensor:
    """(A^T u)^T of the rows in the tiles."""
    turned: Tensor | None = None
    first = 0
    for rows in tiles:
        part = u[first : first + len(rows)]
        first += len(rows)
        turned = part.T @ rows if turned is None else turned.addmm_(part.T, rows)
    return turned if turned is not None else u.new_zeros(u.shape[1], 0)
