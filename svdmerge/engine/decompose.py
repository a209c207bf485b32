"""Decompose: every source's differences into stored components, less what is stored already."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

from svdmerge.core.params import Parameter
from svdmerge.engine import select_tasks, tasks
from svdmerge.engine.differences import Item
from svdmerge.engine.inventory import Inventory, take_inventory
from svdmerge.engine.plan import Plan, Source, unit_bytes
from svdmerge.engine.row_blocks import decompose_by_rows
from svdmerge.engine.runtime import Runtime
from svdmerge.engine.select import find_cut, select_units
from svdmerge.engine.tally import MATRICES
from svdmerge.engine.tasks import Receipt
from svdmerge.progress import Progress
from svdmerge.storage import layout
from svdmerge.storage.manifest import Committed

# Of a GPU that a task takes: while one of two reads, the other's matrices are decomposed.
GPU_SHARE = 0.5


def load_source(plan: Plan, source: Source) -> Committed:
    """What the store holds of a source."""
    return Committed.load(
        plan.store,
        commits=layout.commits_path(plan.base_key, source.revision),
        data=layout.components_path(plan.base_key, source.revision),
    )


def pending(
    plan: Plan, inventory: Inventory, *, whole: bool = False
) -> Iterator[tasks.DecomposeUnit]:
    """The units that nothing is known of yet: the first block of every matrix, or all components
    that a merge could take where sources do not compete, or `whole` asks for them."""
    shared = plan.is_shared and not whole

    def wanted(_: Source, parameter: Parameter) -> int:
        # A block may hold less than others: whether more is needed the selection tells.
        return min(plan.depth(parameter), 1) if shared else plan.depth(parameter)

    yield from _units(plan, inventory, wanted)


def _units(
    plan: Plan, inventory: Inventory, wanted: Callable[[Source, Parameter], int]
) -> Iterator[tasks.DecomposeUnit]:
    """What is missing to have so many components of each source's matrices."""
    for source in plan.sources:
        for number, group in enumerate(plan.groups):
            # A matrix stored to a lesser depth goes on from there; the rest of its group is done.
            by_first: dict[int, list[tuple[Parameter, int]]] = defaultdict(list)
            for parameter in group:
                first = inventory.depth(source.revision, parameter)
                if first < (depth := wanted(source, parameter)):
                    by_first[first].append((parameter, depth))
            for first, items in sorted(by_first.items()):
                yield _unit(plan, source, items, first=first, number=number)


def _unit(
    plan: Plan, source: Source, wanted: list[tuple[Parameter, int]], *, first: int, number: int
) -> tasks.DecomposeUnit:
    return tasks.DecomposeUnit(
        name=f"decompose {source.reference} [{number + 1}/{len(plan.groups)}]",
        memory_bytes=unit_bytes(plan, [p for p, _ in wanted]),
        threads=plan.recipe.resources.threads,
        device=plan.recipe.resources.device,
        store=plan.store,
        base_key=plan.base_key,
        revision=source.revision,
        reference=source.reference,
        first=first,
        items=tuple(
            Item(
                parameter=p,
                source=source.checkpoint.tensors.get(p.tensor),
                low_rank=source.checkpoint.low_rank.get(p.tensor),
                base=plan.base.tensors[p.tensor],
                wanted=depth,
                depth=plan.depth_for(p, depth),
            )
            for p, depth in wanted
        ),
        solver=plan.recipe.parameters.svd,
        block_rows=plan.block_rows(wanted[0][0]) if source.reads_weights(wanted[0][0]) else None,
    )


def shortfalls(
    plan: Plan, inventory: Inventory, *, runtime: Runtime, progress: Progress
) -> dict[tuple[str, str], int]:
    """How many components of a source (revision) and matrix must be there for the selection to be
    certain, where fewer are."""
    cut = find_cut(plan, inventory, runtime=runtime, progress=progress)
    units = list(select_units(plan, inventory, cut))
    task = partial(select_tasks.shortfalls, floor=cut.floor)
    found = runtime.map(task, units, stage="threshold", progress=progress)
    return {(revision, name): depth for part in found for revision, name, depth in part}


def decompose(
    plan: Plan, *, runtime: Runtime, progress: Progress, whole: bool = False,
    judge: Callable[[Inventory], None] = lambda _: None,
) -> list[Receipt]:  # fmt: skip
    """Receipts of the units that were decomposed now; those committed before are not among them.

    Rounds: a block of every matrix first, which is enough for `judge` to refuse sources by, then
    more of those sources whose bound exceeds the cut, until none does.
    """
    inventory = take_inventory(plan, runtime=runtime, progress=progress)
    units = list(pending(plan, inventory, whole=whole))
    known = len(plan.sources) * sum(map(len, plan.groups)) - sum(len(u.items) for u in units)
    runtime.tally.add(MATRICES, known, step="decompose", state="reused")
    receipts = _run(plan, units, runtime=runtime, progress=progress)
    if units:
        inventory = take_inventory(plan, runtime=runtime, progress=progress)
    judge(inventory)
    while plan.is_shared and not whole:
        short = shortfalls(plan, inventory, runtime=runtime, progress=progress)
        units = list(_units(plan, inventory, partial(_depth, short)))
        if not units:
            break
        receipts += _run(plan, units, runtime=runtime, progress=progress)
        inventory = take_inventory(plan, runtime=runtime, progress=progress)
    return receipts


def _run(
    plan: Plan, units: Sequence[tasks.DecomposeUnit], *, runtime: Runtime, progress: Progress
) -> list[Receipt]:
    """Receipts of units: those a task may hold first, then the others, block of rows by block."""
    whole = [unit for unit in units if unit.block_rows is None]
    by_rows = [unit for unit in units if unit.block_rows is not None]
    receipts = runtime.map(
        tasks.decompose, whole, stage="decompose", progress=progress,
        num_gpus=GPU_SHARE if plan.recipe.resources.device == "cuda" else 0,
    )  # fmt: skip
    if by_rows:
        receipts += decompose_by_rows(
            by_rows, memory_bytes=plan.recipe.resources.memory, runtime=runtime, progress=progress
        )
    num = sum(receipt.num_matrices for receipt in receipts)
    runtime.tally.add(MATRICES, num, step="decompose", state="computed")
    return receipts


def _depth(depths: Mapping[tuple[str, str], int], source: Source, parameter: Parameter) -> int:
    return depths.get((source.revision, parameter.source_id), 0)
