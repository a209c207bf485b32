"""Proof of an output's claims: reloaded, compared with manifest, base and factors."""

from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch

from svdmerge.core.delta import all_finite
from svdmerge.core.params import Action
from svdmerge.engine.plan import Plan, make_plan
from svdmerge.errors import OutputError, SvdmergeError
from svdmerge.storage.checkpoint import FLOATING, Checkpoint, TensorRef, open_checkpoint
from svdmerge.storage.filesystem import Folder
from svdmerge.storage.hf_model import (
    OutputTensor,
    load_factors,
    merged_tiles,
    output_tensors,
)
from svdmerge.storage.manifest import Committed
from svdmerge.storage.output import damaged_files, read_manifest
from svdmerge.training.plain import read_recipe

# Relative Frobenius distance that a cast to the dtype may add: half a unit in the last place of
# every entry, doubled because the sum before it is rounded too.
CAST_TOLERANCE = {"F64": 1e-6, "F32": 1e-6, "F16": 1e-3, "BF16": 8e-3}
# Share of entries that another machine's float64 sums may round the other way. float64 has no cast
# to hide the sums' last bits.
OTHER_ROUNDING = {"F64": 1.0, "F32": 0.01, "F16": 0.01, "BF16": 0.01}


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One claim: whether it held, and the figure or the fault."""

    claim: str
    held: bool
    detail: str

    def to_json(self) -> dict[str, object]:
        """The check as plain values."""
        return asdict(self)


def verify(out_uri: str) -> list[Check]:
    """Every claim of an output, checked. A claim that cannot be checked has not held.

    Raises:
        OutputError: the folder has no manifest.
    """
    out = Folder.at(out_uri)
    manifest = read_manifest(out)
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
    checks = [files, _checked("weights reload and are finite", lambda: _finite(out))]
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
            _checked("names, shapes and dtypes are the base's", lambda: _like_base(plan, out)[1]),
            _checked("untouched tensors are the base's bytes", lambda: _untouched(plan, out)),
            _checked("the rest is base + merged factors", lambda: _merged_as_claimed(plan, out)),
        ]
    return checks


def _checked(claim: str, check: Callable[[], str]) -> Check:
    try:
        return Check(claim=claim, held=True, detail=check())
    except SvdmergeError as error:
        return Check(claim=claim, held=False, detail=str(error.args[0]))


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
