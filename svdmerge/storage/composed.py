"""Tensors put together from rows of others: fused from split, split from fused, by vocabulary."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from svdmerge.errors import MismatchError
from svdmerge.storage.checkpoint import FLOATING, TORCH_NAMES, TensorRef
from svdmerge.storage.quantised import FP8

# Pieces of one tensor are read at once with what lies between them if that is no more than this
# many times as much: a request to a store costs as much as reading a megabyte.
SPREAD = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """Rows first..stop-1 of a tensor, along its first axis."""

    ref: TensorRef
    first: int
    stop: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Span:
    """Elements of a tensor, and where they go."""

    ref: TensorRef
    start: int
    count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Composed(TensorRef):
    """Pieces one below the other, read as one tensor."""

    pieces: tuple[Piece, ...]

    def read_bytes(self, *, start: int = 0, count: int | None = None) -> bytes:
        """`count` elements from element `start`, in this tensor's dtype.

        Raises:
            CheckpointError: a file changed since its header was read.
        """
        stop = self.numel if count is None else start + count
        spans = list(self._spans(start, stop))
        held = {id(ref): (lo, ref.read_bytes(start=lo, count=n)) for ref, lo, n in _close(spans)}
        return b"".join(self._cast(span, held.get(id(span.ref))) for span in spans)

    def _spans(self, start: int, stop: int) -> Iterator[_Span]:
        width, position = math.prod(self.shape[1:]), 0
        for piece in self.pieces:
            size = (piece.stop - piece.first) * width
            first, last = max(start, position), min(stop, position + size)
            if first < last:
                begin = piece.first * width + first - position
                yield _Span(ref=piece.ref, start=begin, count=last - first)
            position += size

    def _cast(self, span: _Span, held: tuple[int, bytes] | None) -> bytes:
        """A span's bytes in this tensor's dtype, from what is `held` of its tensor from an element
        on."""
        ref = span.ref
        if held is None:
            data = ref.read_bytes(start=span.start, count=span.count)
        else:
            item = ref.nbytes // ref.numel
            data = held[1][(span.start - held[0]) * item :][: span.count * item]
        if ref.dtype == self.dtype:
            return data
        import torch

        values = ref.decode(data, start=span.start).to(getattr(torch, TORCH_NAMES[self.dtype]))
        return values.view(torch.uint8).numpy().tobytes()


def _close(spans: Sequence[_Span]) -> Iterator[tuple[TensorRef, int, int]]:
    """Tensors that are read once from an element on, so many elements, for several of the spans."""
    by_ref: dict[int, list[_Span]] = {}
    for span in spans:
        by_ref.setdefault(id(span.ref), []).append(span)
    for found in by_ref.values():
        low = min(s.start for s in found)
        size = max(s.start + s.count for s in found) - low
        if len(found) > 1 and size <= SPREAD * sum(s.count for s in found):
            yield found[0].ref, low, size


def compose(name: str, pieces: Sequence[Piece], *, model: str) -> Composed:
    """The tensor of pieces of a model; of differing dtypes, in one that holds all of them.

    Raises:
        MismatchError: rows are not there, or the pieces do not lie one below the other.
    """
    first = pieces[0].ref
    for piece in pieces:
        ref = piece.ref
        if not ref.shape or not 0 <= piece.first < piece.stop <= ref.shape[0]:
            raise MismatchError(
                f"{model}: {ref.name} {list(ref.shape)} has no rows {piece.first}:{piece.stop}",
                f"{name} is to be put together from them.",
                "Correct the rows in the recipe's `tensors`.",
            )
        if ref.shape[1:] != first.shape[1:] or (
            ref.dtype != first.dtype and not {ref.dtype, first.dtype} <= FLOATING
        ):
            raise MismatchError(
                f"{model}: {ref.name} {ref.dtype} {list(ref.shape)} does not lie below "
                f"{first.name} {first.dtype} {list(first.shape)}",
                f"{name} is to be put together from their rows.",
                "Correct the recipe's `tensors`.",
            )
    rows = sum(piece.stop - piece.first for piece in pieces)
    return Composed(
        name=name, folder=first.folder, file=first.file, stat=first.stat, offset=first.offset,
        dtype=_widest({piece.ref.dtype for piece in pieces}), shape=(rows, *first.shape[1:]),
        pieces=tuple(pieces),
    )  # fmt: skip


def _widest(dtypes: set[str]) -> str:
    if len(dtypes) == 1 and not dtypes & FP8:
        return next(iter(dtypes))
    return "F64" if "F64" in dtypes else "F32"
