"""Decompose: every source's differences into stored components, less what is stored already."""

from collections import defaultdict
from collections.abc import Iterator

from svdmerge.core.params import Parameter
from svdmerge.engine import tasks
from svdmerge.engine.plan import Plan, Source, unit_bytes
from svdmerge.engine.runtime import Runtime
from svdmerge.progress import Progress
from svdmerge.storage import layout
from svdmerge.storage.manifest import Committed


def load_source(plan: Plan, source: Source) -> Committed:
    """What the store holds of a source."""
    return Committed.load(
        plan.store,
        commits=layout.commits_path(plan.base_key, source.revision),
        data=layout.components_path(plan.base_key, source.revision),
    )


def pending(plan: Plan) -> Iterator[tasks.DecomposeUnit]:
    """The units whose components are not committed yet."""
    for source in plan.sources:
        committed = load_source(plan, source)
        for number, group in enumerate(plan.groups):
            # A matrix stored to a lesser depth goes on from there; the rest of its group is done.
            by_first: dict[int, list[Parameter]] = defaultdict(list)
            for parameter in group:
                first = committed.depth(parameter.source_id)
                if first < plan.depth(parameter):
                    by_first[first].append(parameter)
            for first, parameters in sorted(by_first.items()):
                yield _unit(plan, source, parameters, first=first, number=number)


def _unit(
    plan: Plan, source: Source, parameters: list[Parameter], *, first: int, number: int
) -> tasks.DecomposeUnit:
    return tasks.DecomposeUnit(
        name=f"decompose {source.reference} [{number + 1}/{len(plan.groups)}]",
        memory_bytes=unit_bytes(plan, parameters),
        threads=plan.recipe.resources.threads,
        store=plan.store,
        base_key=plan.base_key,
        revision=source.revision,
        reference=source.reference,
        first=first,
        items=tuple(
            tasks.Item(
                parameter=p,
                source=source.checkpoint.tensors[p.tensor],
                base=plan.base.tensors[p.tensor],
                depth=plan.depth(p),
            )
            for p in parameters
        ),
        solver=plan.recipe.parameters.svd,
    )


def decompose(plan: Plan, *, runtime: Runtime, progress: Progress) -> list[tasks.Receipt]:
    """Receipts of the units that were decomposed now; those committed before are not among them."""
    units = list(pending(plan))
    return runtime.map(tasks.decompose, units, stage="decompose", progress=progress)
