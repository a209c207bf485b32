"""Matrices that no task may hold, decomposed from products that tasks make of blocks of rows.

Lanczos itself runs here, in the driver; what it needs of the matrix is one pass over its rows per
step. Vectors travel as scratch objects of the store, and parts are added in the order of the rows:
the same bits for any number of workers.
"""

import threading
import time
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from svdmerge.core.block_shape import WIDTH, steps_within
from svdmerge.core.blocks import lanczos_block
from svdmerge.core.noise import edge_of
from svdmerge.engine import row_tasks
from svdmerge.engine.memory import pass_bytes, survey_bytes
from svdmerge.engine.plan import decompose_bytes
from svdmerge.engine.row_tasks import Pass, PassReceipt, RowBlock, Survey, get_tensors, put_tensors
from svdmerge.engine.runtime import Runtime
from svdmerge.engine.solve import first_of, to_store
from svdmerge.engine.tasks import DecomposeUnit, Receipt, commit_solved, load, peak_rss_bytes
from svdmerge.errors import ResourceError, SolverError
from svdmerge.progress import SILENT, Progress
from svdmerge.storage import layout
from svdmerge.storage.filesystem import Folder
from svdmerge.storage.manifest import Covered

# Times that Lanczos starts again where no solver can take over: the leading values of noise, a
# thousandth of themselves apart, converge after one or two.
RESTARTS = 8


class _Stopped(Exception):
    """Another matrix failed, or the run was interrupted."""


class Rows:
    """Products of a source's difference, each made in one pass of tasks over its blocks of rows."""

    device = torch.device("cpu")

    def __init__(
        self, unit: DecomposeUnit, dtype: torch.dtype, *, runtime: Runtime, scratch: Folder,
        done: list[PassReceipt], stopped: threading.Event,
    ) -> None:  # fmt: skip
        item = unit.items[0]
        self.shape = item.parameter.m, item.parameter.n
        self.dtype, self._unit = dtype, unit
        self._runtime, self._scratch = runtime, scratch
        self._done, self._stopped = done, stopped
        self._blocks = _blocks(unit)

    def step(self, x: Float[Tensor, "n b"]) -> tuple[Float[Tensor, "m b"], Float[Tensor, "n b"]]:
        """A x and A^T A x."""
        found = self._pass(Pass.STEP, [x] * len(self._blocks), self.dtype)
        return found["y"], found["z"].T

    def image(self, x: Float[Tensor, "n b"]) -> Float[Tensor, "m b"]:
        """A x in float64."""
        return self._pass(Pass.IMAGE, [x] * len(self._blocks), torch.float64)["y"]

    def pulled(self, u: Float[Tensor, "m b"]) -> Float[Tensor, "n b"]:
        """A^T u."""
        parts = [u[rows.first : rows.stop] for rows in self._blocks]
        return self._pass(Pass.PULL, parts, self.dtype)["z"].T

    def _pass(self, kind: Pass, given: Sequence[Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
        """What the blocks gave: `y` one below the other, `z` added, in the order of the rows."""
        if self._stopped.is_set():
            raise _Stopped
        # Another name each time: what a task lost on its way writes late must not be read.
        scratch = self._scratch.child(f"pass-{len(self._done)}")
        names = [f"given-{i if kind is Pass.PULL else 0}" for i in range(len(given))]
        for name, x in dict(zip(names, given, strict=True)).items():
            put_tensors(scratch, name, x=x)
        units = [
            row_tasks.PassUnit(
                name=f"{self._unit.name}: {kind} of rows {rows.first}-{rows.stop - 1}",
                memory_bytes=pass_bytes(
                    m=rows.stop - rows.first, n=rows.parameter.n, columns=x.shape[1],
                    itemsize=dtype.itemsize,
                ),
                threads=self._unit.threads, kind=kind, rows=rows,
                dtype=str(dtype).removeprefix("torch."), scratch=scratch, given=name,
                product=f"product-{i}",
            )
            for i, (rows, x, name) in enumerate(zip(self._blocks, given, names, strict=True))
        ]  # fmt: skip
        self._done += self._runtime.map(
            row_tasks.multiply, units, stage=f"pass: {kind}", progress=SILENT
        )
        found = _gathered(scratch, [unit.product for unit in units])
        scratch.remove()
        return found


def _gathered(scratch: Folder, names: Sequence[str]) -> dict[str, Tensor]:
    """`y` of all parts one below the other, and the sum of their `z`, one part in memory."""
    below, total = list[Tensor](), dict[str, Tensor]()
    for name in names:
        part = get_tensors(scratch, name)
        below += [part["y"]] if "y" in part else []
        if "z" in part:
            total["z"] = total["z"].add_(part["z"]) if total else part["z"]
    return total | ({"y": torch.cat(below)} if below else {})


def _blocks(unit: DecomposeUnit) -> list[RowBlock]:
    item, height = unit.items[0], unit.block_rows or unit.items[0].parameter.m
    return [
        _rows(unit, first, min(first + height, item.parameter.m))
        for first in range(0, item.parameter.m, height)
    ]


def _rows(unit: DecomposeUnit, first: int, stop: int) -> RowBlock:
    item = unit.items[0]
    if item.source is None or item.low_rank is not None:
        raise ResourceError(
            f"{unit.reference}: {item.parameter.id}: an adapter lies on another model's matrix",
            "It is too large for one task, and rows of the two are not read together.",
            "Merge the adapter into its model first, or raise `resources: {max_matrix: ...}`.",
        )
    return RowBlock(
        parameter=item.parameter, source=item.source, base=item.base, first=first, stop=stop
    )


def decompose_by_rows(
    units: Sequence[DecomposeUnit], *, memory_bytes: int, runtime: Runtime, progress: Progress
) -> list[Receipt]:
    """Receipts of units of one matrix each, whose components are stored and committed by blocks.
    As many at once as fit `memory_bytes`, for the blocks of one may be fewer than the workers.

    Raises:
        ContentError: NaN or Inf in a tensor.
        SolverError: the spectrum is too flat for Lanczos.
    """
    # Its own: another driver at the same matrices would take its scratch away from this one.
    folder = layout.scratch_path(uuid.uuid4().hex)
    at_once = max(1, memory_bytes // max(unit.memory_bytes for unit in units))
    try:
        surveys = _surveys(units, folder=folder, runtime=runtime, progress=progress)
        works = [
            partial(
                _decompose, unit, survey=survey, scratch=unit.store.child(f"{folder}/{i}"),
                runtime=runtime,
            )
            for i, (unit, survey) in enumerate(zip(units, surveys, strict=True))
        ]  # fmt: skip
        with progress.stage("decompose by rows", len(units)) as bar:
            return _at_once(
                works, 1 if runtime.address == "none" else at_once, threads=units[0].threads,
                done=bar.advance,
            )  # fmt: skip
    finally:
        for store in {unit.store for unit in units}:
            store.remove(folder)


def _at_once(
    works: Sequence[Callable[..., Receipt]], num: int, *, threads: int, done: Callable[[], None]
) -> list[Receipt]:
    """What each work gives, `num` of them at once; all end once one fails, and that is raised."""
    stopped, before, causes = threading.Event(), torch.get_num_threads(), list[BaseException]()

    def one(work: Callable[..., Receipt]) -> Receipt:
        torch.set_num_threads(threads)  # of this thread, in some builds
        try:
            receipt = work(stopped=stopped)
        except BaseException as error:
            causes.append(error)
            stopped.set()
            raise
        done()
        return receipt

    torch.set_num_threads(threads)
    pool = ThreadPoolExecutor(num)
    try:
        return list(pool.map(one, works))
    except _Stopped:
        raise causes[0] from None
    finally:
        stopped.set()
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(before)


def _surveys(
    units: Sequence[DecomposeUnit], *, folder: str, runtime: Runtime, progress: Progress
) -> list[Survey]:
    wanted = [
        row_tasks.SurveyUnit(
            name=f"{unit.name}: survey",
            memory_bytes=survey_bytes(unit.items[0].parameter.n),
            threads=unit.threads,
            rows=_rows(unit, 0, unit.items[0].parameter.m),
            scratch=unit.store.child(f"{folder}/{i}"),
        )
        for i, unit in enumerate(units)
    ]  # fmt: skip
    return runtime.map(row_tasks.survey, wanted, stage="survey", progress=progress)


def _decompose(
    unit: DecomposeUnit, *, survey: Survey, scratch: Folder, runtime: Runtime,
    stopped: threading.Event,
) -> Receipt:  # fmt: skip
    """Blocks of one matrix, each committed before the next, until there are as many as wanted."""
    start, stored_bytes, done = time.perf_counter(), 0, list[PassReceipt]()
    depth = unit.first
    while depth < unit.items[0].wanted:
        products = partial(Rows, unit, runtime=runtime, scratch=scratch, done=done, stopped=stopped)
        depth, size = _next(unit, survey, products, scratch=scratch, done=done)
        stored_bytes += size
    return Receipt(
        name=unit.name,
        num_matrices=1,
        bytes_read=survey.bytes_read + sum(part.bytes_read for part in done),
        bytes_stored=stored_bytes,
        seconds=time.perf_counter() - start,
        peak_rss_bytes=max(
            peak_rss_bytes(), survey.peak_rss_bytes, *(part.peak_rss_bytes for part in done)
        ),
    )


def _next(
    unit: DecomposeUnit, survey: Survey, products: Callable[[torch.dtype], Rows], *,
    scratch: Folder, done: list[PassReceipt],
) -> tuple[int, int]:  # fmt: skip
    """The depth once the next block is committed, and the bytes that this took."""
    item, p = unit.items[0], unit.items[0].parameter
    committed = load(unit.store, unit.base_key, unit.revision)
    # All of them: what an exact solver took over, when a task could hold the matrix, cannot be
    # found again from the blocks before it.
    first = committed.held(p.source_id)
    before = len(done)
    found = lanczos_block(
        products, shape=(p.m, p.n), stored=lambda: first_of(committed, p, num=first),
        fro=survey.fro, parameter=p.id, restarts=RESTARTS,
        steps=lambda dtype: steps_within(p.rank, itemsize=dtype.itemsize),
    )  # fmt: skip
    if found is None:
        raise _too_flat(unit, depth=first)
    passes = (len(done) - before) // len(_blocks(unit))
    block = replace(found, solver=f"{found.solver} by rows, {passes} passes")
    solved = to_store(
        [(first, block)], parameter=p, start=first, depth=max(item.depth, item.wanted),
        digest=survey.source_sha256, fro=survey.fro, base_fro=survey.base_fro,
        noise=edge_of(
            row_tasks.surveyed_norms(scratch), leading=block.components.slice(0, WIDTH)
        ) if first == 0 else 0.0,
    )  # fmt: skip
    covered = Covered(
        parameter=p.source_id, first=first, depth=solved.depth,
        source_sha256=survey.source_sha256, base_sha256=survey.base_sha256,
    )  # fmt: skip
    group = layout.group_key([f"{p.source_id} by rows"])
    place = f"{group}/{first}-{solved.depth - 1}"
    return solved.depth, commit_solved(unit, [(solved, covered)], place=place).shard.size


def _too_flat(unit: DecomposeUnit, *, depth: int) -> SolverError:
    p = unit.items[0].parameter
    need = decompose_bytes(p, depth=unit.items[0].depth)
    whole = f"max_matrix: {-(-8 * p.numel >> 20)}MiB, memory: {-(-need >> 20)}MiB"
    return SolverError(
        f"{unit.reference}: {p.id} ({p.m} x {p.n}): after the first {depth} components none "
        "converged",
        "Its spectrum is flat there, as that of noise; the exact solver that such matrices need "
        "takes them whole, in one task.",
        f"Set `resources: {{{{{whole}}}}}`, or give the tensor `policy: average` or `base`.",
    )
