"""What a selection kept of each matrix, and where it cut: from stored values alone."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from svdmerge.core.methods.registry import Takes
from svdmerge.core.params import Action, Parameter
from svdmerge.engine.inventory import take_inventory
from svdmerge.engine.plan import Plan
from svdmerge.engine.runtime import InProcess
from svdmerge.engine.select import find_cut, select_units
from svdmerge.engine.select_tasks import matrices
from svdmerge.engine.whatif import OfMatrix, of_matrix
from svdmerge.engine.winners import Listed, all_values, salience_of
from svdmerge.progress import SILENT

# Values of a spectrum that are told, evenly spaced on a logarithm: what a plot can show.
POINTS = 24


@dataclass(frozen=True, slots=True, kw_only=True)
class MatrixAccount:
    """One matrix: what was kept of it, and its values of all sources together."""

    parameter: Parameter
    found: OfMatrix
    largest: float
    """The largest singular value of any source, times its weight."""
    spectrum: tuple[tuple[int, float], ...]
    """(place from 1, salience) of some of all sources' values, the last kept among them."""
    cut: tuple[int, float] | None
    """Place and salience of the last value kept; None where sources do not compete."""


def account(plan: Plan) -> Iterator[MatrixAccount]:
    """An account of every decomposed matrix.

    Raises:
        StoreError: a source is not decomposed, or a sidecar is damaged.
    """
    inventory = take_inventory(plan, runtime=InProcess(), progress=SILENT)
    cut = find_cut(plan, inventory, runtime=InProcess(), progress=SILENT)
    for unit in select_units(plan, inventory, cut):
        for b, listed in matrices(unit):
            if b.parameter.action is Action.DECOMPOSE and listed:
                found = of_matrix(plan, b, listed, floor=cut.floor)
                yield _account(plan, b.parameter, found, listed)


def _account(
    plan: Plan, parameter: Parameter, found: OfMatrix, listed: Sequence[Listed]
) -> MatrixAccount:
    values = [all_values(x.spectra) for x in listed]
    parts = [salience_of(x, s, salience=plan.salience) for x, s in zip(listed, values, strict=True)]
    # Zeros are no components, and have no place on a logarithm.
    pooled = np.sort(np.concatenate(parts))[::-1]
    pooled = pooled[pooled > 0]
    num_kept = sum(found.kept.values())
    competes = plan.method.takes is Takes.POOLED and 0 < num_kept <= len(pooled)
    largest = [x.weight * float(s[0]) for x, s in zip(listed, values, strict=True) if len(s)]
    told = {*places(len(pooled)), num_kept} if competes else places(len(pooled))
    return MatrixAccount(
        parameter=parameter,
        found=found,
        largest=max(largest, default=0.0),
        spectrum=tuple((i, float(pooled[i - 1])) for i in sorted(told)),
        cut=(num_kept, float(pooled[num_kept - 1])) if competes else None,
    )


def places(count: int) -> set[int]:
    """At most `POINTS` of the numbers 1 to `count`, both among them, evenly on a logarithm."""
    if count <= POINTS:
        return set(range(1, count + 1))
    step = math.log(count) / (POINTS - 1)
    return {round(math.exp(i * step)) for i in range(POINTS)}
