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
from svdmerge.core.methods.merging import Merging, Part
from svdmerge.core.params import Action, Parameter
from svdmerge.engine.device import Pair, device_class, full_float32
from svdmerge.engine.differences import (
    Difference,
    Item,
    Origin,
    TwoMatrices,
    read_both,
    read_difference,
)
from svdmerge.engine.flops import block_flops, svd_flops
from svdmerge.engine.solve import Solved, Stored, solve, solve_low_rank, stored_of, to_store
from svdmerge.engine.stacked import first_blocks_on
from svdmerge.errors import SolverError, StoreError
from svdmerge.storage import layout
from svdmerge.storage.filesystem import Folder
from svdmerge.storage.hf_model import (
    OutputTensor,
    WrittenFile,
    read_factors,
    write_safetensors,
)
from svdmerge.storage.layout import BLOCK
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
    flops: float = 0.0
    """Of its solvers, by their formulas."""


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
        flops=sum(_flops(item, unit) for item in unit.items),
    )


def _flops(item: Item, unit: DecomposeUnit) -> float:
    """Of the blocks that were wanted of one matrix; of factors, which take next to none, zero."""
    if item.parameter.action is not Action.DECOMPOSE or item.is_factored:
        return 0.0
    num_blocks = -(-(item.wanted - unit.first) // BLOCK)
    exact = unit.solver == EXACT
    return (
        svd_flops(item.parameter) if exact else block_flops(item.parameter, num_blocks=num_blocks)
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
    read: dict[str, tuple[Item, TwoMatrices]] = {}
    for item in unit.items:
        plain = item.parameter.action is Action.DECOMPOSE and item.low_rank is None
        if unit.first == 0 and unit.solver != EXACT and plain and item.source is not None:
            read[item.parameter.source_id] = item, read_both(item, item.source)
    pairs = [Pair(name=name, source=x.source, base=x.base) for name, (_, x) in read.items()]
    # What fails for a stack is tried for each.
    with contextlib.suppress(*FAILURES):
        for found in first_blocks_on(torch.device(unit.device), pairs):
            item, both = read[found.name]
            if found.block.bound > 0.0 and len(found.block.components) < item.wanted:
                continue
            solved = to_store(
                [(0, found.block)], parameter=item.parameter, start=0,
                depth=max(item.depth, item.wanted), digest=both.origin.source_sha256,
                fro=found.fro, base_fro=both.origin.base_fro, noise=found.noise,
            )  # fmt: skip
            yield found.name, (solved, _covered(unit, item, solved, both.origin))


def _decomposed(
    unit: DecomposeUnit, item: Item, before: Committed | None
) -> tuple[Solved | None, Covered]:
    """What is found of one matrix, nothing if it is or must be the base's, and what that covers."""
    read = read_difference(item, reference=unit.reference, device=unit.device)
    solved = _solved(unit, item, read, before) if read.tensors else None
    return solved, _covered(unit, item, solved, read.origin)


def _covered(unit: DecomposeUnit, item: Item, solved: Solved | None, origin: Origin) -> Covered:
    return Covered(
        parameter=item.parameter.source_id,
        first=unit.first,
        depth=solved.depth if solved else item.depth,
        source_sha256=origin.source_sha256,
        base_sha256=origin.base_sha256,
    )


def _solved(
    unit: DecomposeUnit, item: Item, read: Difference, before: Committed | None
) -> Solved:  # fmt: skip
    p, origin = item.parameter, read.origin
    stored = stored_of(before, p) if before else Stored(blocks=none(p.m, p.n))
    try:
        if item.is_factored:
            up, down = read.tensors
            return solve_low_rank(
                up, down, parameter=p, stored=stored, wanted=item.wanted, depth=item.depth,
                digest=origin.source_sha256,
            )  # fmt: skip
        with full_float32():
            return solve(
                *read.tensors, parameter=p, stored=stored, wanted=item.wanted, depth=item.depth,
                solver=unit.solver, digest=origin.source_sha256, base_fro=origin.base_fro,
            )  # fmt: skip
    except torch.linalg.LinAlgError as error:  # pyright: ignore[reportPrivateImportUsage]
        raise SolverError(
            f"{unit.reference}: {p.id}: the SVD did not converge", str(error)
        ) from error


def peak_rss_bytes() -> int:
    """The largest resident size of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts KiB


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
