"""Proof of an output's claims: reloaded, compared with manifest, base and factors."""

from collections.abc import Iterator

import torch

from svdmerge.claims import Check, Unchecked, checked
from svdmerge.core.delta import all_finite
from svdmerge.core.params import Action
from svdmerge.engine.plan import Plan, make_plan
from svdmerge.errors import OutputError, SvdmergeError
from svdmerge.reload import run_transformers
from svdmerge.report.figures import labels
from svdmerge.storage.checkpoint import FLOATING, TILE, Checkpoint, TensorRef, open_checkpoint
from svdmerge.storage.filesystem import Folder
from svdmerge.storage.hf_model import (
    OutputTensor,
    load_factors,
    merged_tiles,
    output_tensors,
)
from svdmerge.storage.manifest import Committed
from svdmerge.storage.output import damaged_files, read_manifest
from svdmerge.training.peft_report import REPORT
from svdmerge.training.plain import read_recipe
from svdmerge.verify_adapter import verify_adapter

# Relative Frobenius distance that a cast to the dtype may add: half a unit in the last place of
# every entry, doubled because the sum before it is rounded too.
CAST_TOLERANCE = {"F64": 1e-6, "F32": 1e-6, "F16": 1e-3, "BF16": 8e-3}
# Share of entries that another machine's float64 sums may round the other way. float64 has no cast
# to hide the sums' last bits.
OTHER_ROUNDING = {"F64": 1.0, "F32": 0.01, "F16": 0.01, "BF16": 0.01}


def verify(out_uri: str) -> list[Check]:
    """Every claim of an output, or of an exported adapter, checked.

    What rests on a claim that does not hold is not checked: it has not held either.

    Raises:
        OutputError: the folder has no manifest.
    """
    out = Folder.at(out_uri)
    manifest = read_manifest(out)
    if manifest is None and out.stat(REPORT) is not None:
        return verify_adapter(out)
    if manifest is None:
        raise OutputError(
            f"{out.uri}: is no output of svdmerge", "It has no manifest.", "Check the path."
        )
    faults = damaged_files(out, manifest)
    files = Check(
        claim=f"{len(manifest.files)} files have their sha256",
        held=not faults,
        detail="; ".join(faults),
    )
    checks = [
        files,
        checked("weights reload and are finite", lambda: _finite(out)),
        checked("transformers loads it, with finite outputs", lambda: _runs(out)),
    ]
    try:
        plan = make_plan(read_recipe(out))
    except SvdmergeError as error:
        told = str(error.args[0])
        return [*checks, Check(claim="base and sources are as they were", held=False, detail=told)]
    same = plan.hash == manifest.plan_hash
    detail = "" if same else "a model, a version or the machine's kind changed since the merge"
    checks.append(Check(claim="base and sources are as they were", held=same, detail=detail))
    if same:
        checks += [
            checked("names, shapes and dtypes are the base's", lambda: _like_base(plan, out)[1]),
            checked("untouched tensors are the base's bytes", lambda: _untouched(plan, out)),
            checked("the rest is base + merged factors", lambda: _merged_as_claimed(plan, out)),
        ]
    if all(c.held is not False for c in checks):
        told = "how far it is from base and sources, relative to the base's norm"
        checks.append(checked(told, lambda: _distances(plan, out)))
    return checks


def _runs(out: Folder) -> str:
    if out.stat("config.json") is None:
        raise Unchecked("it has no config.json")
    name, found = run_transformers(out.uri)
    return f"{name}, {len(found)} outputs"


def _distances(plan: Plan, out: Folder) -> str:
    """Frobenius norms of the differences of all floating-point tensors together."""
    merged, squares = open_checkpoint(out.uri), [0.0] * (len(plan.sources) + 2)
    for name, base in plan.base.tensors.items():
        if base.dtype in FLOATING:
            for rows in _row_tiles(base):
                start = _rows_of(base, rows)
                other = _rows_of(merged.tensors[name], rows)
                found = [start, other - start]
                found += [
                    other - _source_rows(s.checkpoint, base, rows, start=start)
                    for s in plan.sources
                ]
                squares = [q + float((d**2).sum()) for q, d in zip(squares, found, strict=True)]
    size, *rest = (q**0.5 for q in squares)
    names = ["base", *labels([s.reference for s in plan.sources])]
    norm = max(size, torch.finfo(torch.float32).tiny)
    return ", ".join(f"{name} {d / norm:.2e}" for name, d in zip(names, rest, strict=True))


def _row_tiles(ref: TensorRef) -> Iterator[range]:
    """Runs of a tensor's rows, of TILE entries or one row."""
    num = ref.shape[0] if ref.shape else 1
    height = max(1, TILE * num // max(1, ref.numel))
    return (range(i, min(i + height, num)) for i in range(0, num if ref.numel else 0, height))


def _rows_of(ref: TensorRef, rows: range) -> torch.Tensor:
    """Entries of some rows, flat, in float64."""
    width = ref.numel // ref.shape[0] if ref.shape else 1
    start, count = rows.start * width, len(rows) * width
    return ref.decode(ref.read_bytes(start=start, count=count), start=start).to(torch.float64)


def _source_rows(
    source: Checkpoint, base: TensorRef, rows: range, *, start: torch.Tensor
) -> torch.Tensor:
    """Rows of a source's tensor; what it lacks, or has in another shape, is the base's."""
    own = source.tensors.get(base.name)
    found = start if own is None or own.shape != base.shape else _rows_of(own, rows)
    if base.name not in source.low_rank:
        return found
    low_rank = source.low_rank[base.name]
    if low_rank.stack is not None and low_rank.stack.expert is None:  # its rows are matrices
        width = base.numel // base.shape[0]
        values, _ = low_rank.read_dense(start=rows.start * width, count=len(rows) * width)
        return found + values
    up, down, _ = low_rank.read()
    if len(up) == 1:  # a vector
        return found + (up @ down).reshape(-1)[rows.start : rows.stop]
    return found + (up[rows.start : rows.stop] @ down).reshape(-1)


def _finite(out: Folder) -> str:
    merged = open_checkpoint(out.uri)
    for name, ref in merged.tensors.items():
        if ref.dtype in FLOATING and not all_finite(ref.read()):
            raise OutputError(f"{name} holds NaN or Inf")
    return f"{len(merged.tensors)} tensors"


def _like_base(plan: Plan, out: Folder) -> tuple[Checkpoint, str]:
    merged = open_checkpoint(out.uri)
    expected = {
        t.base.name: (t.base.shape, t.dtype)
        for t in output_tensors(
            plan.base, parameters=plan.parameters, out_dtype=plan.recipe.out_dtype
        )
    }
    got = {name: (ref.shape, ref.dtype) for name, ref in merged.tensors.items()}
    if unlike := [n for n in {*expected, *got} if expected.get(n) != got.get(n)]:
        name = min(unlike)
        raise OutputError(f"{name} is {got.get(name)}, expected {expected.get(name)}")
    return merged, f"{len(got)} tensors"


def _untouched(plan: Plan, out: Folder) -> str:
    merged, _ = _like_base(plan, out)
    names = [n for n, a in plan.actions.items() if a in (Action.BASE, Action.EQUAL)]
    same = [n for n in names if merged.tensors[n].dtype == plan.base.tensors[n].dtype]
    for name in same:
        if merged.tensors[name].read_bytes() != plan.base.tensors[name].read_bytes():
            raise OutputError(f"{name} differs from the base's")
    return f"{len(same)} tensors"


def _merged_as_claimed(plan: Plan, out: Folder) -> str:
    merged, _ = _like_base(plan, out)
    factors = load_factors(plan.run_folder.child("factors"))
    worst = 0.0
    tensors = output_tensors(plan.base, parameters=plan.parameters, out_dtype=plan.recipe.out_dtype)
    for tensor in tensors:
        if not tensor.matrices:
            continue
        off, same = _compared(merged.tensors[tensor.base.name], tensor, factors=factors)
        # Not >, which a NaN would pass.
        if not off <= CAST_TOLERANCE[tensor.dtype]:
            raise OutputError(f"{tensor.base.name} is off by {off:.1e}")
        # A cast can be as coarse as the whole difference: most entries must be the very same.
        if not same >= 1 - OTHER_ROUNDING[tensor.dtype]:
            raise OutputError(f"{tensor.base.name}: only {same:.1%} of its values are as expected")
        worst = max(worst, off)
    return f"largest relative difference {worst:.1e}"


def _compared(ref: TensorRef, tensor: OutputTensor, *, factors: Committed) -> tuple[float, float]:
    """How far a tensor is off, relative to its norm, and the share of its entries that are the very
    same as expected."""
    distance = size = same = 0.0
    for start, expected in merged_tiles(tensor, factors=factors):
        written = ref.decode(ref.read_bytes(start=start, count=len(expected)))
        distance += float(((written - expected) ** 2).sum())
        size += float((expected**2).sum())
        same += float((expected.to(written.dtype) == written).sum())
    tiny = torch.finfo(torch.float32).tiny
    return distance**0.5 / max(size**0.5, tiny), same / ref.numel if ref.numel else 1.0
