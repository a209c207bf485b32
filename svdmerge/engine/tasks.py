"""What decomposing, merging and writing run on workers: read, compute, write, give a receipt."""

import hashlib
import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial

import torch

from svdmerge.core.components import RankOneComponents, flat, none
from svdmerge.core.delta import all_finite, delta
from svdmerge.core.methods.merging import Merging, Part
from svdmerge.core.params import Action, Parameter
from svdmerge.engine.solve import Solved, Stored, solve, stored_of
from svdmerge.errors import ContentError, SolverError
from svdmerge.storage import layout
from svdmerge.storage.checkpoint import ITEM_BYTES, TensorRef
from svdmerge.storage.filesystem import Folder
from svdmerge.storage.hf_model import OutputTensor, WrittenFile, write_safetensors
from svdmerge.storage.manifest import Committed, Covered, put_unit
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
    source: TensorRef
    base: TensorRef
    wanted: int
    depth: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DecomposeUnit:
    """Matrices of one source that are decomposed and committed together."""

    name: str
    memory_bytes: int
    threads: int
    store: Folder
    base_key: str
    revision: str
    reference: str
    first: int
    """Components of each that are stored already."""
    items: tuple[Item, ...]
    solver: str


def decompose(unit: DecomposeUnit) -> Receipt:
    """Components of one source's matrices, stored and committed.

    Raises:
        ContentError: NaN or Inf in a tensor, or an integer buffer that differs from the base's.
        SolverError: an SVD did not converge.
        StoreError: what is stored already is damaged.
    """
    start = time.perf_counter()
    before = _load(unit.store, unit.base_key, unit.revision) if unit.first else None
    solved = [_decomposed(unit, item, before) for item in unit.items]
    # With the depths: another budget may reach the same last component with other matrices shorter.
    group = layout.group_key(f"{i.parameter.source_id} {i.wanted} {i.depth}" for i in unit.items)
    place = f"{group}/{unit.first}-{max(i.wanted for i in unit.items) - 1}"
    commit = put_unit(
        unit.store,
        data_prefix=f"{layout.components_path(unit.base_key, unit.revision)}/{place}",
        commit_path=f"{layout.commits_path(unit.base_key, unit.revision)}/{place}.json",
        rows=[row for found, _ in solved if found for row in found.rows],
        spectra=[spectrum for found, _ in solved if found for spectrum in found.spectra],
        covered=[covered for _, covered in solved],
        solver=unit.solver,
        numerics=f"cpu/{torch.backends.cpu.get_cpu_capability()}/torch-{torch.__version__}"
        f"/threads-{unit.threads}",
    )
    return Receipt(
        name=unit.name,
        num_matrices=len(unit.items),
        bytes_read=sum(
            i.parameter.numel * (ITEM_BYTES[i.source.dtype] + ITEM_BYTES[i.base.dtype])
            for i in unit.items
        ),
        bytes_stored=commit.shard.size,
        seconds=time.perf_counter() - start,
        peak_rss_bytes=_peak_rss_bytes(),
    )


def _decomposed(
    unit: DecomposeUnit, item: Item, before: Committed | None
) -> tuple[Solved | None, Covered]:
    """What is found of one matrix and what that covers; nothing, if it must be the base's."""
    p = item.parameter
    source, base = _read(item.source, p), _read(item.base, p)
    digest = hashlib.sha256(source).hexdigest()
    solved = None
    if p.action is Action.EQUAL:
        _check_equal(unit, item, source == base)
    else:
        solved = _solved(unit, item, _delta(unit, item, source, base), digest, before)
    covered = Covered(
        parameter=p.source_id,
        first=unit.first,
        depth=solved.depth if solved else item.depth,
        source_sha256=digest,
        base_sha256=hashlib.sha256(base).hexdigest(),
    )
    return solved, covered


def _solved(
    unit: DecomposeUnit, item: Item, d: torch.Tensor, digest: str, before: Committed | None
) -> Solved:
    p = item.parameter
    stored = stored_of(before, p) if before else Stored(blocks=none(p.m, p.n))
    try:
        return solve(
            d, parameter=p, stored=stored, wanted=item.wanted, depth=item.depth,
            solver=unit.solver, digest=digest,
        )  # fmt: skip
    except torch.linalg.LinAlgError as error:  # pyright: ignore[reportPrivateImportUsage]
        raise SolverError(
            f"{unit.reference}: {p.id}: the SVD did not converge", str(error)
        ) from error


def _peak_rss_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts KiB


def _read(ref: TensorRef, parameter: Parameter) -> bytes:
    return ref.read_bytes(start=parameter.start, count=parameter.numel)


def _check_equal(unit: DecomposeUnit, item: Item, same: bool) -> None:
    if not same:
        raise ContentError(
            f"{unit.reference}: {item.parameter.tensor} differs from the base's",
            f"It is {item.source.dtype}: integers cannot be merged.",
            "Give it `policy: base` to keep the base's, or remove the source.",
        )


def _delta(unit: DecomposeUnit, item: Item, source: bytes, base: bytes) -> torch.Tensor:
    shape = (item.parameter.m, item.parameter.n)
    tensors = item.source.decode(source).reshape(shape), item.base.decode(base).reshape(shape)
    for tensor, ref in zip(tensors, (item.source, item.base), strict=True):
        if not all_finite(tensor):
            raise ContentError(
                f"{ref.folder.uri}/{ref.file}: {item.parameter.tensor} holds NaN or Inf",
                f"{int((~torch.isfinite(tensor)).sum())} of its {tensor.numel()} values are not "
                "finite; nothing of this unit was published.",
                "Remove or repair the model.",
            )
    return delta(tensors[0], base=tensors[1])


@lru_cache(maxsize=256)
def _committed(store: Folder, base_key: str, revision: str, attempt: str) -> Committed:
    """A source's commits, read once per process and attempt: they only grow between attempts."""
    del attempt
    return _load(store, base_key, revision)


def _load(store: Folder, base_key: str, revision: str) -> Committed:
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
    attempt: str
    factors: Folder
    picks: tuple[tuple[Parameter, tuple[Pick, ...]], ...]
    merging: Merging


def factor(unit: FactorUnit) -> Receipt:
    """Merged factors of matrices, stored and committed in the run's folder."""
    start = time.perf_counter()
    rows, covered = list[Rows](), list[Covered]()
    for parameter, picks in unit.picks:
        merged = _merge(unit, parameter, picks)
        kind = "merged" if parameter.is_factored else "flat"
        rows.append(Rows(parameter=parameter.id, kind=kind, first=0, components=merged))
        covered.append(
            Covered(
                parameter=parameter.id, first=0, depth=len(merged), source_sha256="", base_sha256=""
            )
        )
    place = layout.group_key(p.id for p, _ in unit.picks)
    commit = put_unit(
        unit.factors, data_prefix=place, commit_path=f"{place}.json", rows=rows, spectra=[],
        covered=covered, solver=unit.merging.method, numerics="",
    )  # fmt: skip
    return Receipt(
        name=unit.name, num_matrices=len(unit.picks), bytes_read=0, bytes_stored=commit.shard.size,
        seconds=time.perf_counter() - start, peak_rss_bytes=_peak_rss_bytes(),
    )  # fmt: skip


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
