"""Assemble: kept components to merged factors, and these with the base to the output's files."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa

from svdmerge.core.methods.merging import Merging
from svdmerge.core.params import Action, Parameter
from svdmerge.engine import tasks
from svdmerge.engine.plan import Plan, merge_bytes, numerics_class, write_bytes
from svdmerge.engine.runtime import Runtime
from svdmerge.engine.select import picks
from svdmerge.engine.tally import MATRICES
from svdmerge.progress import Progress
from svdmerge.storage.filesystem import Folder
from svdmerge.storage.hf_model import (
    OutputTensor,
    WrittenFile,
    file_size,
    load_factors,
    output_tensors,
    split,
)
from svdmerge.storage.manifest import Committed

FACTORS = "factors"


def merge_factors(
    plan: Plan, selection: pa.Table, *, attempt: str, runtime: Runtime, progress: Progress,
    earlier: Folder | None = None,
) -> list[tasks.Receipt]:  # fmt: skip
    """Receipts of the factors merged now; those of an earlier attempt are not among them.

    Where a selection is that of an `earlier` run, in its folder, its factors are taken over.
    """
    other = load_factors(earlier.child(FACTORS)) if earlier else None
    committed = load_factors(plan.run_folder.child(FACTORS))
    chosen = picks(plan, selection)
    units = [
        _factor_unit(plan, todo, chosen, attempt=attempt, number=number, earlier=other)
        for number, group in enumerate(plan.groups)
        if (todo := [p for p in group if p.action is not Action.EQUAL and p.id not in committed])
    ]
    reused = sum(p.action is not Action.EQUAL and p.id in committed for p in plan.parameters)
    runtime.tally.add(MATRICES, reused, step="merge", state="reused")
    receipts = runtime.map(tasks.factor, units, stage="merge", progress=progress)
    computed = sum(receipt.num_matrices for receipt in receipts)
    runtime.tally.add(MATRICES, computed, step="merge", state="computed")
    return receipts


def write_model(
    plan: Plan, out: Folder, *, runtime: Runtime, progress: Progress
) -> list[WrittenFile]:
    """The weights files as written into `out` and checked, one task each; the index is not."""
    units = list(_write_units(plan, output_files(plan), out))
    return runtime.map(tasks.write, units, stage="write", progress=progress)


def output_files(plan: Plan) -> dict[str, list[OutputTensor]]:
    """The output's tensors by weights file."""
    tensors = output_tensors(plan.base, parameters=plan.parameters, out_dtype=plan.recipe.out_dtype)
    size = plan.recipe.max_shard_size
    return split(tensors, max_bytes=None if size == "base" else size)


def has_layout(plan: Plan, files: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether an output's manifest lists the weights files that this plan would write."""
    found = {name: claim["size"] for name, claim in files.items() if name.endswith(".safetensors")}
    return found == {name: file_size(tensors) for name, tensors in output_files(plan).items()}


def _factor_unit(
    plan: Plan,
    parameters: Sequence[Parameter],
    chosen: Mapping[str, tuple[tasks.Pick, ...]],
    *,
    attempt: str,
    number: int,
    earlier: Committed | None,
) -> tasks.FactorUnit:
    return tasks.FactorUnit(
        name=f"merge [{number + 1}/{len(plan.groups)}]",
        memory_bytes=merge_bytes(plan, parameters),
        threads=plan.recipe.resources.threads,
        store=plan.store,
        base_key=plan.base_key,
        numerics=numerics_class(plan.recipe.resources.device, plan.recipe.resources.threads),
        earlier=earlier.only(p.id for p in parameters) if earlier else None,
        attempt=attempt,
        factors=plan.run_folder.child(FACTORS),
        picks=tuple((p, chosen.get(p.source_id, ())) for p in parameters),
        merging=Merging(
            method=plan.recipe.merge_method,
            num_sources=plan.averaged_over,
            scale=plan.scale,
            density=plan.recipe.parameters.density or 1.0,
        ),
    )


def _write_units(
    plan: Plan, files: Mapping[str, Sequence[OutputTensor]], out: Folder
) -> Iterator[tasks.WriteUnit]:
    needs = write_bytes(plan)
    for file, tensors in files.items():
        yield tasks.WriteUnit(
            name=f"write {file}",
            memory_bytes=max((needs[t.base.name] for t in tensors), default=0),
            threads=plan.recipe.resources.threads,
            folder=out,
            file=file,
            tensors=tuple(tensors),
            factors=plan.run_folder.child(FACTORS),
        )
