"""What another selection would keep and leave out, from stored spectra alone: no vector is read."""

import difflib
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from svdmerge.core.methods.registry import Takes
from svdmerge.core.params import Action, Parameter
from svdmerge.engine.inventory import Inventory, take_inventory
from svdmerge.engine.plan import Plan, Source, in_blocks, stored_bytes
from svdmerge.engine.runtime import InProcess
from svdmerge.engine.select import find_cut, select_units
from svdmerge.engine.select_tasks import Budget, listed_in, read_spectra
from svdmerge.engine.winners import (
    Listed,
    all_values,
    cut_of,
    is_open,
    select_components,
    unlisted_bound,
)
from svdmerge.errors import RecipeError, StoreError
from svdmerge.progress import SILENT


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a selection keeps."""

    k: int | float
    kept: dict[str, int]
    """Components kept of each source."""
    energy: float
    """Share of the sources' squared Frobenius norms that is kept, matrices and sources together."""
    frobenius: float
    """What is left out has this Frobenius norm at most: of each matrix the weighted sum of its
    sources' remainders, over all matrices. Like the spectral norm to rounding of stored values."""
    spectral: float
    """No matrix's left-out part has a larger singular value."""
    factor_bytes: int
    """Size of the merged factors (float32)."""
    store_bytes: int
    """Size of the components that must be stored for it, of all sources (float32)."""
    num_open: int
    """Matrices of sources of which a value that is not stored might have been chosen."""

    @property
    def certain(self) -> bool:
        """False if a value that is not stored might have been chosen: deepen first."""
        return self.num_open == 0

    def to_json(self) -> dict[str, object]:
        """The outcome as plain values."""
        fields: dict[str, object] = asdict(self)
        return fields | {"certain": self.certain}


@dataclass(frozen=True, slots=True, kw_only=True)
class OfMatrix:
    """What is kept and left out of one matrix."""

    kept: dict[str, int]
    energy: float
    total: float
    frobenius: float
    spectral: float
    factor_bytes: int
    store_bytes: int
    num_open: int


def asked(
    plan: Plan,
    *,
    salience: str | None = None,
    scope: str | None = None,
    only: Sequence[str] = (),
    without: Sequence[str] = (),
) -> Plan:
    """The plan with another salience or scope, and `only` these of its sources or all `without`
    those, named as in the recipe or by the last part of that.

    Raises:
        RecipeError: the method ranks nothing, a source is unknown, or none is left.
    """
    changes = {"salience": salience, "scope": scope}
    changes = {name: value for name, value in changes.items() if value is not None}
    if unused := sorted(changes.keys() - plan.method.parameters):
        raise RecipeError(
            f"--{unused[0]}: {plan.recipe.merge_method} does not use it",
            "",
            "Leave it out, or ask what-if of a method that ranks components, such as axis.",
        )
    left = {_named(plan, name) for name in only} or {s.revision for s in plan.sources}
    left -= {_named(plan, name) for name in without}
    if not left:
        raise RecipeError("--without: no source is left", "", "Leave one in.")
    return replace(
        _with_parameters(plan, changes),
        sources=tuple(s for s in plan.sources if s.revision in left),
    )


def whatif(plan: Plan, *, budgets: Sequence[int | float]) -> list[Outcome]:
    """An outcome per budget.

    Raises:
        RecipeError: the method has no budget.
        StoreError: a source is not decomposed yet.
    """
    if plan.method.takes is Takes.WHOLE:
        raise RecipeError(
            f"{plan.recipe.merge_method}: merges whole differences",
            "There is no budget k whose choice could be looked at.",
            "Ask what-if of a method that takes components, such as axis.",
        )
    inventory = take_inventory(plan, runtime=InProcess(), progress=SILENT)
    for source in plan.sources:
        # An empty matrix has no components, and is never stored.
        if not all(inventory.is_known(source.revision, p) for p in plan.parameters if p.rank):
            raise StoreError(
                f"{source.reference}: is not decomposed in {plan.store.uri}",
                "What-if answers from stored spectra.",
                "Run `svdmerge decompose` first.",
            )
    return _outcomes([_with_parameters(plan, {"k": k}) for k in budgets], inventory)


def _with_parameters(plan: Plan, changes: dict[str, Any]) -> Plan:
    parameters = plan.recipe.parameters.model_copy(update=changes)
    return replace(plan, recipe=plan.recipe.model_copy(update={"parameters": parameters}))


def _named(plan: Plan, name: str) -> str:
    """The revision of the source that is called so."""
    found = [s for s in plan.sources if name in (s.reference, _short(s))]
    if len(found) != 1:
        known = [_short(s) for s in plan.sources]
        near = difflib.get_close_matches(name, known, n=1)
        raise RecipeError(
            f"{name}: {'several sources are' if found else 'no source is'} called so",
            f"The nearest is {near[0]}." if near else f"Known: {', '.join(known)}.",
            "Name sources as the recipe does, or by the last part of that.",
        )
    return found[0].revision


def _short(source: Source) -> str:
    return source.reference.rstrip("/").rsplit("/", 1)[-1]


def _outcomes(plans: Sequence[Plan], inventory: Inventory) -> list[Outcome]:
    """Of one plan with several budgets: values are read once for all of them."""
    cuts = [find_cut(p, inventory, runtime=InProcess(), progress=SILENT) for p in plans]
    found: list[list[OfMatrix]] = [[] for _ in plans]
    split = [select_units(p, inventory, cut) for p, cut in zip(plans, cuts, strict=True)]
    for units in zip(*split, strict=True):
        spectra = read_spectra(units[0])
        for plan, cut, unit, parts in zip(plans, cuts, units, found, strict=True):
            parts += [
                of_matrix(plan, b, listed, floor=cut.floor)
                for b, listed in listed_in(unit, spectra)
                if b.parameter.action is Action.DECOMPOSE
            ]
    return [_outcome(plan, parts) for plan, parts in zip(plans, found, strict=True)]


def _outcome(plan: Plan, found: Sequence[OfMatrix]) -> Outcome:
    names = {s.revision: s.reference for s in plan.sources}
    kept: Counter[str] = Counter(dict.fromkeys(names.values(), 0))
    for part in found:
        kept.update({names[revision]: n for revision, n in part.kept.items()})
    total = sum(x.total for x in found)
    return Outcome(
        k=plan.recipe.parameters.k,
        kept=dict(kept),
        energy=sum(x.energy for x in found) / total if total else 0.0,
        frobenius=math.hypot(*(x.frobenius for x in found)),
        spectral=max((x.spectral for x in found), default=0.0),
        factor_bytes=sum(x.factor_bytes for x in found),
        store_bytes=sum(x.store_bytes for x in found),
        num_open=sum(x.num_open for x in found),
    )


def of_matrix(plan: Plan, b: Budget, listed: Sequence[Listed], *, floor: float) -> OfMatrix:
    """What is kept and left out of a matrix; `floor` is the common cut, where matrices compete."""
    p, takes, salience = b.parameter, plan.method.takes, plan.salience
    rows = select_components(listed, takes=takes, salience=salience, k=b.k)
    kept = rows.kept(len(listed))
    rests = [_left_out(x, n) for x, n in zip(listed, kept, strict=True)]
    # What one source gives first depends on no other, if sources do not compete.
    cut = cut_of(rows, cap=b.most, floor=floor) if takes is Takes.POOLED else 0.0
    return OfMatrix(
        kept={x.source: n for x, n in zip(listed, kept, strict=True)},
        energy=float((rows.s.astype(np.float64) ** 2).sum()),
        total=sum(x.spectra[0].fro ** 2 for x in listed),
        # Remainders of different sources may point the same way: the triangle inequality.
        frobenius=sum(frobenius for frobenius, _ in rests),
        spectral=sum(spectral for _, spectral in rests),
        factor_bytes=stored_bytes(p, depth=min(len(rows), p.rank)),
        store_bytes=sum(
            stored_bytes(p, depth=_depth(plan, p, x, n)) for x, n in zip(listed, kept, strict=True)
        ),
        num_open=sum(is_open(x, cap=b.most, cut=cut, salience=salience) for x in listed),
    )


def _left_out(listed: Listed, kept: int) -> tuple[float, float]:
    """Frobenius norm and largest singular value of a source's weighted remainder, at most."""
    values = all_values(listed.spectra).astype(np.float64)
    fro, bound = listed.spectra[0].fro, unlisted_bound(listed.spectra)
    # All values being listed, their squares add up; else those kept are taken off the whole's,
    # less than what float32 rounded off them.
    squared = float((values[kept:] ** 2).sum())
    if bound > 0:
        taken = float((values[:kept] ** 2).sum())
        squared = max(squared, fro**2 - taken * (1 - np.finfo(np.float32).eps))
    # The bound also where a value follows that is listed: a solver might have missed one between.
    largest = max([bound, *values[kept : kept + 1].tolist()])
    return listed.weight * math.sqrt(squared), listed.weight * largest


def _depth(plan: Plan, parameter: Parameter, listed: Listed, kept: int) -> int:
    """Components that are stored of a source if so many are kept: what a solver finds that cannot
    stop early is stored as deep as the budget, else whole blocks, one at least."""
    if unlisted_bound(listed.spectra) == 0:
        return plan.depth_for(parameter, kept)
    return in_blocks(max(kept, 1), parameter)
