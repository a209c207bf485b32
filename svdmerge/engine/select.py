"""Select: the most salient components of every matrix, or of all, from stored spectra alone."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import pyarrow as pa

from svdmerge.core.contest import Rivals, merged
from svdmerge.core.histogram import Histogram
from svdmerge.core.params import Action, Parameter
from svdmerge.engine import select_tasks
from svdmerge.engine.inventory import Inventory
from svdmerge.engine.plan import Plan
from svdmerge.engine.runtime import Runtime, Unit
from svdmerge.engine.select_tasks import Budget, SelectUnit
from svdmerge.engine.tasks import Pick
from svdmerge.engine.winners import Contender
from svdmerge.progress import Progress
from svdmerge.storage import schema
from svdmerge.storage.shards import decode_table, encode_table

U = TypeVar("U", bound=Unit)
SELECTION = "selection.arrow"
# Spectra (one row per source and matrix) that one task reads: about 100 MB at rank 4096.
SPECTRA_PER_UNIT = 8192
# What one task may take: the sidecars of its matrices, decoded.
SELECT_BYTES = 512 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """Where the selection ends: components of each matrix (its id), and the salience of the last
    one where matrices compete."""

    kept: Mapping[str, int]
    floor: float = 0.0


def select(plan: Plan, inventory: Inventory, *, runtime: Runtime, progress: Progress) -> pa.Table:
    """The selection, also written to the run's folder."""
    table = choose_components(plan, inventory, runtime=runtime, progress=progress)
    plan.run_folder.put(SELECTION, encode_table(table))
    return table


def choose_components(
    plan: Plan, inventory: Inventory, *, runtime: Runtime, progress: Progress
) -> pa.Table:
    """The ids of the components kept, best first within each matrix.

    Once it is known how many each matrix keeps, matrices are independent, and the reduce is a map
    over ranges of them.
    """
    cut = find_cut(plan, inventory, runtime=runtime, progress=progress)
    units = list(select_units(plan, inventory, cut))
    parts = runtime.map(select_tasks.select, units, stage="select", progress=progress)
    return pa.concat_tables([schema.SELECTION.empty_table(), *parts]).combine_chunks()


def find_cut(plan: Plan, inventory: Inventory, *, runtime: Runtime, progress: Progress) -> Cut:
    """How many components each matrix keeps, by the values that are stored: what its budget says,
    or, in the scope `global`, its share of the sum of all budgets."""
    matrices = [p for p in plan.parameters if p.action is Action.DECOMPOSE]
    if not plan.is_global:
        return Cut(kept={p.source_id: plan.of_each(p) for p in matrices})
    whole = Cut(kept={p.source_id: p.rank for p in matrices})
    units = list(select_units(plan, inventory, whole))
    return common_cut(
        units, total=sum(plan.budget(p) for p in matrices), weigh=select_tasks.weigh,
        contest=select_tasks.contest, runtime=runtime, progress=progress,
    )  # fmt: skip


def common_cut(
    units: Sequence[U], *, total: int, weigh: Callable[[U], Histogram],
    contest: Callable[..., tuple[dict[str, int], Rivals]], runtime: Runtime, progress: Progress,
) -> Cut:  # fmt: skip
    """The cut of a budget over all units' matrices.

    Their histograms are added up and give the bin in which it falls; what lies above is kept, and
    the rivals in that bin alone travel, to be ranked by (salience, sha256, parameter, index).
    """
    parts = runtime.map(weigh, units, stage="histogram", progress=progress)
    cut, num_above = Histogram.merged(parts).cut(total)
    left = total - num_above
    task = partial(contest, cut=cut, k=left)
    found = runtime.map(task, units, stage="contest", progress=progress)
    last = merged((rivals for _, rivals in found), k=left)
    kept = {name: n for above, _ in found for name, n in above.items()}
    for name, n in last.by_parameter().items():
        kept[name] += n
    # A budget that all values do not fill would take any other.
    return Cut(kept=kept, floor=float(last.salience.min()) if 0 < len(last) == left else 0.0)


def load_selection(plan: Plan) -> pa.Table | None:
    """The selection of this run, if it was made."""
    if plan.run_folder.stat(SELECTION) is None:
        return None
    return decode_table(plan.run_folder.read(SELECTION))


def picks(plan: Plan, selection: pa.Table) -> dict[str, tuple[Pick, ...]]:
    """What to read per matrix (its `source_id`): sources by content, indices ascending.

    The order is that of the tensors' sha256, and of weights where sources share a tensor: sums do
    not depend on names or places of sources.
    """
    weights = {s.revision: s.weight for s in plan.sources}
    found: dict[str, dict[tuple[str, float, str], list[int]]] = {}
    columns = [selection.column(c).to_pylist() for c in ("parameter", "sha256", "source", "index")]
    for parameter, sha256, source, index in zip(*columns, strict=True):
        key = (sha256, weights[source], source)
        found.setdefault(parameter, {}).setdefault(key, []).append(index)
    return {
        parameter: tuple(
            Pick(
                revision=source,
                weight=weights[source],
                content=sha256,
                indices=tuple(sorted(indices)),
            )
            for (sha256, _, source), indices in sorted(sources.items())
        )
        for parameter, sources in found.items()
    }


def provenance(plan: Plan, selection: pa.Table) -> pa.Table:
    """The selection with each source's name and weight."""
    models: Mapping[str, tuple[str, float]] = {
        s.revision: (s.reference, s.weight) for s in plan.sources
    }
    sources: list[str] = selection.column("source").to_pylist()
    added = {
        "model": pa.array([models[s][0] for s in sources], pa.string()),
        "weight": pa.array([models[s][1] for s in sources], pa.float64()),
    }
    columns = [
        added[f.name] if f.name in added else selection.column(f.name) for f in schema.PROVENANCE
    ]
    return pa.table(columns, schema=schema.PROVENANCE)


def select_units(plan: Plan, inventory: Inventory, cut: Cut) -> Iterator[SelectUnit]:
    """Ranges of matrices, each with the sidecars of all sources."""
    step = max(1, SPECTRA_PER_UNIT // max(1, len(plan.sources)))
    sources = tuple(
        Contender(revision=s.revision, weight=s.weight, quota=s.quota) for s in plan.sources
    )
    for i, part in enumerate(_chunks(plan.parameters, step)):
        yield SelectUnit(
            name=f"select [{i + 1}]",
            memory_bytes=SELECT_BYTES,
            threads=1,
            store=plan.store,
            sidecars=inventory.sidecars((s.revision for s in plan.sources), part),
            sources=sources,
            budgets=tuple(_budget(plan, p, cut) for p in part),
            stored={
                s.revision: tuple(inventory.depth(s.revision, p) for p in part)
                for s in plan.sources
            },
            takes=plan.method.takes,
            salience=plan.salience,
        )


def _budget(plan: Plan, parameter: Parameter, cut: Cut) -> Budget:
    return Budget(
        parameter=parameter,
        k=cut.kept.get(parameter.source_id, 1),
        most=parameter.rank if plan.is_global else plan.of_each(parameter),
        slots=plan.budget(parameter),
    )


def _chunks(parameters: Sequence[Parameter], size: int) -> Iterable[Sequence[Parameter]]:
    return (parameters[i : i + size] for i in range(0, len(parameters), size))
