"""What another budget would keep, from stored spectra alone: no vector is read."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from svdmerge.core.methods.registry import Takes
from svdmerge.core.params import Action, budget
from svdmerge.engine.decompose import load_source
from svdmerge.engine.plan import Plan
from svdmerge.engine.winners import (
    Listed,
    Selected,
    SpectraByMatrix,
    largest_unlisted,
    listed_spectra,
    select_components,
)
from svdmerge.errors import RecipeError, StoreError


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a budget keeps."""

    k: int | float
    kept: dict[str, int]
    """Components kept of each source."""
    energy: float
    """Share of the sources' squared Frobenius norms that is kept, matrices and sources together."""
    factor_bytes: int
    """Size of the merged factors (float32)."""
    certain: bool
    """False if a value that is not stored might have been chosen: deepen first."""

    def to_json(self) -> dict[str, object]:
        """The outcome as plain values."""
        return asdict(self)


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
    sources = [(s, load_source(plan, s)) for s in plan.sources]
    for source, committed in sources:
        # An empty matrix has no components, and is never stored.
        if not all(p.source_id in committed for p in plan.parameters if plan.depth(p)):
            raise StoreError(
                f"{source.reference}: is not decomposed in {plan.store.uri}",
                "What-if answers from stored spectra.",
                "Run `svdmerge decompose` first.",
            )
    spectra = {s.revision: c.spectra() for s, c in sources}
    return [_outcome(plan, k, spectra) for k in budgets]


def _outcome(plan: Plan, k: int | float, spectra: dict[str, SpectraByMatrix]) -> Outcome:
    kept: Counter[str] = Counter({s.reference: 0 for s in plan.sources})
    names = {s.revision: s.reference for s in plan.sources}
    salience, takes = plan.salience, plan.method.takes
    energy = total = 0.0
    size, certain = 0, True
    for parameter in plan.parameters:
        if parameter.action is not Action.DECOMPOSE:
            continue
        listed = listed_spectra(
            parameter.id, {s.revision: (s.weight, spectra[s.revision]) for s in plan.sources}
        )
        wanted = budget(k, rank=parameter.rank)
        wanted = plan.method.of_each(wanted, num_sources=len(plan.sources))
        rows = select_components(listed, takes=takes, salience=salience, k=wanted)
        kept.update(names[row.source] for row in rows)
        energy += sum(row.s**2 for row in rows)
        total += sum(x.spectra[0].fro ** 2 for x in listed)
        size += 4 * min(len(rows), parameter.rank) * (parameter.m + parameter.n + 1)
        certain &= all(
            largest_unlisted(x, salience=salience) <= _cut(x, rows, takes=takes, k=wanted)
            for x in listed
        )
    return Outcome(
        k=k, kept=dict(kept), energy=energy / total if total else 0.0, factor_bytes=size,
        certain=certain,
    )  # fmt: skip


def _cut(listed: Listed, rows: Sequence[Selected], *, takes: Takes, k: int) -> float:
    """What a value of the source must not exceed in order to be surely left out."""
    rivals = [r for r in rows if takes is Takes.POOLED or r.source == listed.source]
    # A budget that the stored values do not fill would take any other; values of one source
    # descend, so where that alone counts, nothing that is not listed can come before.
    if len(rivals) < k:
        return 0.0
    return rivals[-1].salience if takes is Takes.POOLED else math.inf
