"""What decomposing, merging and writing run on workers: read, compute, write, give a receipt.

What matrices that no worker may hold take is in `row_tasks`.
"""

import contextlib
import hashlib
import json
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache, partial

import torch

from svdmerge.core.blocks import EXACT, FAILURES
from svdmerge.core.components import RankOneComponents, flat, none
from svdmerge.core.delta import all_finite, delta
from svdmerge.core.methods.merging import Merging, Part
from svdmerge.core.params import Action, Parameter
from svdmerge.engine.device import Pair, device_class, full_float32
from svdmerge.engine.solve import Solved, Stored, solve, solve_low_rank, stored_of, to_store
from svdmerge.engine.stacked import first_blocks_on
from svdmerge.errors import ContentError, SolverError, StoreError
from svdmerge.storage import layout
from svdmerge.storage.adapter import LowRank
from svdmerge.storage.checkpoint import ITEM_BYTES, TensorRef
from svdmerge.storage.filesystem import Folder
from svdmerge.storage.hf_model import (
    OutputTensor,
    WrittenFile,
    read_factors,
    write_safetensors,
)
from svdmerge.storage.manifest import Commit, Committed, Covered, put_unit
from svdmerge.storage.shards import Rows


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """What a unit did."""

    name: str
    num_matrices: int
    bytes_read: int
    bytes_stored: int
    seconds: float
    peak_rss_bytes: int
    """Of the worker so far, Python and torch included."""


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
class DecomposeUnit:
    """Matrices of one source that are decomposed and committed together."""

    name: str
    memory_bytes: int
    threads: int
    device: str
    """`cpu` or `cuda`: where it computes."""
    store: Folder
    base_key: str
    revision: str
    reference: str
    first: int
    """Components of each that are stored already."""
    items: tuple[Item, ...]
    solver: str
    block_rows: int | None = None
    """Rows of a block, where the only item is a matrix that no task may hold."""


def decompose(unit: DecomposeUnit) -> Receipt:
    """Components of one source's matrices, stored and committed.

    Raises:
        ContentError: NaN or Inf in a tensor, or an integer buffer that differs from the base's.
        SolverError: an SVD did not converge.
        StoreError: what is stored already is damaged.
    """
    start = time.perf_counter()
    before = load(unit.store, unit.base_key, unit.revision) if unit.first else None
    together = {} if unit.device == "cpu" else dict(_together(unit))
    solved = [
        together.get(item.parameter.source_id) or _decomposed(unit, item, before)
        for item in unit.items
    ]
    # With the depths: another budget may reach the same last component with other matrices shorter.
    group = layout.group_key(f"{i.parameter.source_id} {i.wanted} {i.depth}" for i in unit.items)
    place = f"{group}/{unit.first}-{max(i.wanted for i in unit.items) - 1}"
    commit = commit_solved(unit, solved, place=place)
    return Receipt(
        name=unit.name,
        num_matrices=len(unit.items),
        bytes_read=sum(i.nbytes for i in unit.items),
        bytes_stored=commit.shard.size,
        seconds=time.perf_counter() - start,
        peak_rss_bytes=peak_rss_bytes(),
    )


def commit_solved(
    unit: DecomposeUnit, solved: Sequence[tuple[Solved | None, Covered]], *, place: str
) -> Commit:
    """The commit of what was found of a unit's matrices, stored and in force."""
    rows = f"/rows-{unit.block_rows}" if unit.block_rows else ""
    return put_unit(
        unit.store,
        data_prefix=f"{layout.components_path(unit.base_key, unit.revision)}/{place}",
        commit_path=f"{layout.commits_path(unit.base_key, unit.revision)}/{place}.json",
        rows=[row for found, _ in solved if found for row in found.rows],
        spectra=[spectrum for found, _ in solved if found for spectrum in found.spectra],
        covered=[covered for _, covered in solved],
        solver=unit.solver,
        numerics=f"{device_class(torch.device(unit.device))}/torch-{torch.__version__}"
        f"/threads-{unit.threads}{rows}",
    )


def _together(unit: DecomposeUnit) -> Iterator[tuple[str, tuple[Solved, Covered]]]:
    """By name, what is found of the unit's plain differences by stacks, where a first block is
    enough."""
    read: dict[str, tuple[Item, Pair, tuple[str, str]]] = {}
    for item in unit.items:
        plain = item.parameter.action is Action.DECOMPOSE and item.low_rank is None
        if unit.first == 0 and unit.solver != EXACT and plain and item.source is not None:
            source, base, digests = _tensors(item.source, item)
            pair = Pair(name=item.parameter.source_id, source=source, base=base)
            read[pair.name] = item, pair, digests
    pairs = [pair for _, pair, _ in read.values()]
    # What fails for a stack is tried for each.
    with contextlib.suppress(*FAILURES):
        for found in first_blocks_on(torch.device(unit.device), pairs):
            item, _, digests = read[found.name]
            if found.block.bound > 0.0 and len(found.block.components) < item.wanted:
                continue
            solved = to_store(
                [(0, found.block)], parameter=item.parameter, start=0, fro=found.fro,
                depth=max(item.depth, item.wanted), digest=digests[0], noise=found.noise,
            )  # fmt: skip
            yield found.name, (solved, _covered(unit, item, solved, digests))


def _decomposed(
    unit: DecomposeUnit, item: Item, before: Committed | None
) -> tuple[Solved | None, Covered]:
    """What is found of one matrix, nothing if it is or must be the base's, and what that covers."""
    found, digests = _read(unit, item)
    solved = _solved(unit, item, found, digests[0], before) if found else None
    return solved, _covered(unit, item, solved, digests)


def _covered(
    unit: DecomposeUnit, item: Item, solved: Solved | None, digests: tuple[str, str]
) -> Covered:
    return Covered(
        parameter=item.parameter.source_id,
        first=unit.first,
        depth=solved.depth if solved else item.depth,
        source_sha256=digests[0],
        base_sha256=digests[1],
    )


def _solved(
    unit: DecomposeUnit, item: Item, found: tuple[torch.Tensor, ...], digest: str,
    before: Committed | None,
) -> Solved:  # fmt: skip
    p = item.parameter
    stored = stored_of(before, p) if before else Stored(blocks=none(p.m, p.n))
    depths = {"stored": stored, "wanted": item.wanted, "depth": item.depth}
    try:
        if item.is_factored:
            return solve_low_rank(*found, parameter=p, digest=digest, **depths)
        with full_float32():
            return solve(*found, parameter=p, digest=digest, solver=unit.solver, **depths)
    except torch.linalg.LinAlgError as error:  # pyright: ignore[reportPrivateImportUsage]
        raise SolverError(
            f"{unit.reference}: {p.id}: the SVD did not converge", str(error)
        ) from error


def peak_rss_bytes() -> int:
    """The largest resident size of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts KiB


def _read(unit: DecomposeUnit, item: Item) -> tuple[tuple[torch.Tensor, ...], tuple[str, str]]:
    """A matrix's difference, or its factors, or nothing if the source is the base there; and
    sha256 of what was read of the source, and of the base."""
    if item.source is not None and item.parameter.action is Action.EQUAL:
        return (), _equal(unit, item.source, item)
    digests = hashlib.sha256(b"").hexdigest(), ""
    difference: tuple[torch.Tensor, ...] = ()
    if item.source is not None:
        source, base, digests = _tensors(item.source, item)
        difference = (delta(source.to(unit.device), base=base.to(unit.device)),)
    if item.low_rank is not None:
        up, down, digest = item.low_rank.read()
        if item.is_factored:
            return (up, down), (digest, "")
        product = (up @ down).reshape(item.parameter.m, item.parameter.n).to(unit.device)
        difference = (product + difference[0] if difference else product,)
        digests = hashlib.sha256(f"{digests[0]} {digest}".encode()).hexdigest(), digests[1]
    return difference, digests


def _tensors(ref: TensorRef, item: Item) -> tuple[torch.Tensor, torch.Tensor, tuple[str, str]]:
    """A matrix of the source and of the base, and sha256 of what was read of each."""
    p, pair = item.parameter, (ref, item.base)
    read = [r.read_bytes(start=p.start, count=p.numel) for r in pair]
    source, base = (
        r.decode(data, start=p.start).reshape(p.m, p.n) for r, data in zip(pair, read, strict=True)
    )
    for tensor, r in zip((source, base), pair, strict=True):
        check_finite(tensor, r)
    return source, base, (ref.digest(read[0]), item.base.digest(read[1]))


def _equal(unit: DecomposeUnit, ref: TensorRef, item: Item) -> tuple[str, str]:
    """sha256 of both, which must be the same bytes."""
    p = item.parameter
    source, base = (r.read_bytes(start=p.start, count=p.numel) for r in (ref, item.base))
    if source != base:
        raise ContentError(
            f"{unit.reference}: {ref.name} differs from the base's",
            f"It is {ref.dtype}: integers cannot be merged.",
            "Give it `policy: base` to keep the base's, or remove the source.",
        )
    return ref.digest(source), item.base.digest(base)


def check_finite(tensor: torch.Tensor, ref: TensorRef) -> None:
    """Raise ContentError if what was read of a tensor holds NaN or Inf."""
    if not all_finite(tensor):
        raise ContentError(
            f"{ref.folder.uri}/{ref.file}: {ref.name} holds NaN or Inf",
            f"{int((~torch.isfinite(tensor)).sum())} of its {tensor.numel()} values are not "
            "finite; nothing of this unit was published.",
            "Remove or repair the model.",
        )


@lru_cache(maxsize=256)
def _committed(store: Folder, base_key: str, revision: str, attempt: str) -> Committed:
    """A source's commits, read once per process and attempt: they only grow between attempts."""
    del attempt
    return load(store, base_key, revision)


def load(store: Folder, base_key: str, revision: str) -> Committed:
    """What the store holds of a source."""
    return Committed.load(
        store,
        commits=layout.commits_path(base_key, revision),
        data=layout.components_path(base_key, revision),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Pick:
    """The kept components of one source in one matrix."""

    revision: str
    weight: float
    content: str
    """sha256 of the source's bytes of the matrix."""
    indices: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class FactorUnit:
    """Matrices whose kept components are merged and committed together."""

    name: str
    memory_bytes: int
    threads: int
    store: Folder
    base_key: str
    numerics: str
    attempt: str
    factors: Folder
    picks: tuple[tuple[Parameter, tuple[Pick, ...]], ...]
    merging: Merging
    earlier: Committed | None = None
    """Factors of another run: those made of the very same are taken over."""

    def made_of(self, parameter: Parameter, picks: Sequence[Pick]) -> str:
        """sha256 of all that the factors of a matrix depend on."""
        settings = self.merging.of(parameter)
        taken = [(p.content, p.weight, p.indices) for p in picks]
        fields = [
            self.base_key, self.numerics, parameter.id, parameter.action, asdict(settings), taken,
        ]  # fmt: skip
        return hashlib.sha256(json.dumps(fields).encode()).hexdigest()


def factor(unit: FactorUnit) -> Receipt:
    """Merged factors of matrices, stored and committed in the run's folder."""
    start = time.perf_counter()
    rows, covered = list[Rows](), list[Covered]()
    num_merged = 0
    for parameter, picks in unit.picks:
        made_of, merged = unit.made_of(parameter, picks), None
        if unit.earlier is not None:
            merged = _taken_over(unit.earlier, parameter, made_of)
        if merged is None:
            num_merged += 1
            merged = _merge(unit, parameter, picks)
        kind = "merged" if parameter.is_factored else "flat"
        rows.append(Rows(parameter=parameter.id, kind=kind, first=0, components=merged))
        covered.append(
            Covered(
                parameter=parameter.id, first=0, depth=len(merged), source_sha256=made_of,
                base_sha256="",
            )
        )  # fmt: skip
    place = layout.group_key(p.id for p, _ in unit.picks)
    commit = put_unit(
        unit.factors, data_prefix=place, commit_path=f"{place}.json", rows=rows, spectra=[],
        covered=covered, solver=unit.merging.method, numerics="",
    )  # fmt: skip
    return Receipt(
        name=unit.name, num_matrices=num_merged, bytes_read=0, bytes_stored=commit.shard.size,
        seconds=time.perf_counter() - start, peak_rss_bytes=peak_rss_bytes(),
    )  # fmt: skip


def _taken_over(earlier: Committed, parameter: Parameter, made_of: str) -> RankOneComponents | None:
    """A matrix's factors in another run, if they were made of the very same and are whole."""
    if parameter.id not in earlier or earlier.sha256(parameter.id) != made_of:
        return None
    try:
        return read_factors(earlier, parameter)
    except StoreError:
        return None  # they can be made again


def _merge(unit: FactorUnit, parameter: Parameter, picks: Sequence[Pick]) -> RankOneComponents:
    def part(pick: Pick) -> Part:
        source = _committed(unit.store, unit.base_key, pick.revision, unit.attempt)
        return Part(
            weight=pick.weight,
            content=pick.content,
            read=partial(source.read, parameter.source_id, pick.indices),
        )

    if not picks and not parameter.is_factored:
        return flat(torch.zeros(1, parameter.n))
    if not picks:
        return none(parameter.m, parameter.n)
    try:
        return unit.merging.merge(parameter, [part(p) for p in picks])
    except torch.linalg.LinAlgError as error:  # pyright: ignore[reportPrivateImportUsage]
        raise SolverError(f"{parameter.id}: the merge did not converge", str(error)) from error


@dataclass(frozen=True, slots=True, kw_only=True)
class WriteUnit:
    """One weights file of the output."""

    name: str
    memory_bytes: int
    threads: int
    folder: Folder
    file: str
    tensors: tuple[OutputTensor, ...]
    factors: Folder


def write(unit: WriteUnit) -> WrittenFile:
    """A safetensors file of base + merged difference, streamed tensor by tensor."""
    return write_safetensors(unit.folder, unit.file, tensors=unit.tensors, factors=unit.factors)
