"""Select: the globally most salient components of every matrix, from stored spectra alone."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa

from svdmerge.core.params import Parameter
from svdmerge.engine import tasks
from svdmerge.engine.plan import Plan
from svdmerge.engine.runtime import Runtime
from svdmerge.progress import Progress
from svdmerge.storage import schema
from svdmerge.storage.shards import decode_table, encode_table

SELECTION = "selection.arrow"
# Spectra (one row per source and matrix) that one task reads: about 100 MB at rank 4096.
SPECTRA_PER_UNIT = 8192
# What one task may take: the sidecars of its sources, decoded.
SELECT_BYTES = 512 << 20


def select(plan: Plan, *, attempt: str, runtime: Runtime, progress: Progress) -> pa.Table:
    """The selection, also written to the run's folder."""
    table = choose_components(plan, attempt=attempt, runtime=runtime, progress=progress)
    plan.run_folder.put(SELECTION, encode_table(table))
    return table


def choose_components(
    plan: Plan, *, attempt: str, runtime: Runtime, progress: Progress
) -> pa.Table:
    """The ids of the components kept, best first within each matrix.

    Scope `layer` makes matrices independent, so the reduce is a map over ranges of matrices.
    """
    units = list(select_units(plan, attempt=attempt))
    parts = runtime.map(tasks.select, units, stage="select", progress=progress)
    return pa.concat_tables([schema.SELECTION.empty_table(), *(_table(part) for part in parts)])


def load_selection(plan: Plan) -> pa.Table | None:
    """The selection of this run, if it was made."""
    if plan.run_folder.stat(SELECTION) is None:
        return None
    return decode_table(plan.run_folder.read(SELECTION))


def picks(plan: Plan, selection: pa.Table) -> dict[str, tuple[tasks.Pick, ...]]:
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
            tasks.Pick(
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


def _table(columns: Mapping[str, Sequence[Any]]) -> pa.Table:
    return pa.table(
        [pa.array(columns[f.name], f.type) for f in schema.SELECTION], schema=schema.SELECTION
    )


def select_units(plan: Plan, *, attempt: str) -> Iterator[tasks.SelectUnit]:
    """Ranges of matrices, each with the spectra of all sources."""
    step = max(1, SPECTRA_PER_UNIT // max(1, len(plan.sources)))
    for i, part in enumerate(_chunks(plan.parameters, step)):
        yield tasks.SelectUnit(
            name=f"select [{i + 1}]",
            memory_bytes=SELECT_BYTES,
            threads=1,
            store=plan.store,
            base_key=plan.base_key,
            attempt=attempt,
            sources=tuple((s.revision, s.weight) for s in plan.sources),
            budgets=tuple((p, plan.of_each(p)) for p in part),
            takes=plan.method.takes,
            salience=plan.salience,
        )


def _chunks(parameters: Sequence[Parameter], size: int) -> Iterable[Sequence[Parameter]]:
    return (parameters[i : i + size] for i in range(0, len(parameters), size))
