"""What a task reads of one source's matrix: its difference to the base's, and checksums."""

import hashlib
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from svdmerge.core.delta import all_finite, delta
from svdmerge.core.params import Action, Parameter
from svdmerge.errors import ContentError
from svdmerge.storage.checkpoint import ITEM_BYTES, TensorRef
from svdmerge.storage.low_rank import LowRank


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """A matrix of one source to decompose: `wanted` components for now, `depth` at most ever."""

    parameter: Parameter
    source: TensorRef | None
    """Its tensor; None if that is the base's, as in adapters."""
    base: TensorRef
    wanted: int
    depth: int
    low_rank: LowRank | None = None
    """What comes on top of the difference."""

    @property
    def is_factored(self) -> bool:
        """Whether the difference is known by its factors alone."""
        factored = self.source is None and self.low_rank is not None
        return factored and self.parameter.action is Action.DECOMPOSE

    @property
    def nbytes(self) -> int:
        """What is read."""
        pair = () if self.source is None else (self.source, self.base)
        dense = self.parameter.numel * sum(ITEM_BYTES[ref.dtype] for ref in pair)
        return dense + (self.low_rank.nbytes if self.low_rank else 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """What a difference was made of."""

    source_sha256: str
    base_sha256: str
    base_fro: float | None = None
    """Frobenius norm of the base's matrix, if it was read."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Difference:
    """What was read of a matrix."""

    origin: Origin
    tensors: tuple[Float[Tensor, "_ _"], ...] = ()
    """The difference, or its two factors, or nothing if the source is the base there."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TwoMatrices:
    """A matrix of a source and the base's, in the host's memory."""

    origin: Origin
    source: Float[Tensor, "m n"]
    base: Float[Tensor, "m n"]


def read_difference(item: Item, *, reference: str, device: str) -> Difference:
    """A matrix's difference, on a device.

    Raises:
        ContentError: NaN or Inf, or an integer buffer that differs from the base's.
    """
    p = item.parameter
    if item.source is not None and p.action is Action.EQUAL:
        return Difference(origin=_equal(item, item.source, reference=reference))
    origin = Origin(source_sha256=hashlib.sha256(b"").hexdigest(), base_sha256="")
    tensors: tuple[Tensor, ...] = ()
    if item.source is not None:
        read = read_both(item, item.source)
        origin = read.origin
        tensors = (delta(read.source.to(device), base=read.base.to(device)),)
    if item.low_rank is None:
        return Difference(origin=origin, tensors=tensors)
    if item.is_factored:
        up, down, digest = item.low_rank.read(p.start // p.numel)
        return Difference(origin=Origin(source_sha256=digest, base_sha256=""), tensors=(up, down))
    flat, digest = item.low_rank.read_dense(start=p.start, count=p.numel)
    product = flat.reshape(p.m, p.n).to(device)
    both = hashlib.sha256(f"{origin.source_sha256} {digest}".encode()).hexdigest()
    return Difference(
        origin=Origin(source_sha256=both, base_sha256=origin.base_sha256, base_fro=origin.base_fro),
        tensors=(product + tensors[0] if tensors else product,),
    )


def read_both(item: Item, ref: TensorRef) -> TwoMatrices:
    """A matrix of the source, whose tensor `ref` is, and of the base.

    Raises:
        ContentError: NaN or Inf.
    """
    p, pair = item.parameter, (ref, item.base)
    read = [r.read_bytes(start=p.start, count=p.numel) for r in pair]
    source, base = (
        r.decode(data, start=p.start).reshape(p.m, p.n) for r, data in zip(pair, read, strict=True)
    )
    for tensor, r in zip((source, base), pair, strict=True):
        check_finite(tensor, r)
    origin = Origin(
        source_sha256=ref.digest(read[0]), base_sha256=item.base.digest(read[1]),
        base_fro=norm_of(base),
    )  # fmt: skip
    return TwoMatrices(origin=origin, source=source, base=base)


def _equal(item: Item, ref: TensorRef, *, reference: str) -> Origin:
    """Of two tensors that must be the same bytes."""
    p = item.parameter
    source, base = (r.read_bytes(start=p.start, count=p.numel) for r in (ref, item.base))
    if source != base:
        raise ContentError(
            f"{reference}: {ref.name} differs from the base's",
            f"It is {ref.dtype}: integers cannot be merged.",
            "Give it `policy: base` to keep the base's, or remove the source.",
        )
    return Origin(source_sha256=ref.digest(source), base_sha256=item.base.digest(base))


def norm_of(tensor: Tensor) -> float:
    """Frobenius norm, its sum in float64."""
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64))


def check_finite(tensor: Tensor, ref: TensorRef) -> None:
    """Raise ContentError if what was read of a tensor holds NaN or Inf."""
    if not all_finite(tensor):
        raise ContentError(
            f"{ref.folder.uri}/{ref.file}: {ref.name} holds NaN or Inf",
            f"{int((~torch.isfinite(tensor)).sum())} of its {tensor.numel()} values are not "
            "finite; nothing of this unit was published.",
            "Remove or repair the model.",
        )
