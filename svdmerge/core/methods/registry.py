"""The merge methods: what each takes of its sources, and which parameters it has.

Imports no torch, for recipes and plans need none; `merging` holds what computes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from svdmerge.core.params import Action


class Takes(StrEnum):
    """Which of the sources' components a method is given."""

    POOLED = "pooled"  # the budget's most salient of all sources together
    DIVIDED = "divided"  # the leading ones of each source, the budget divided by the sources
    EACH = "each"  # the leading ones of each source, up to the budget
    WHOLE = "whole"  # none: the whole differences


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """A merge method, as recipes and plans need it."""

    takes: Takes
    parameters: frozenset[str]
    """Those of the recipe's `parameters` that it uses; any other is refused."""
    summary: str
    """A sentence for the model card; {n}, {k}, {salience} and {density} are filled in."""
    vectors: Action = Action.AVERAGE
    k: float = 0.1
    """Default budget, as published."""
    density: float | None = None
    """Default share of entries kept, as published, of a method that drops some."""

    @property
    def matrices(self) -> Action:
        """What happens to a matrix."""
        return Action.WHOLE if self.takes is Takes.WHOLE else Action.DECOMPOSE

    def of_each(self, budget: int, *, num_sources: int) -> int:
        """The most components that one source can give where the matrix's budget is `budget`."""
        # At least one: with more sources than rank a source would otherwise vanish unseen.
        return max(1, budget // num_sources) if self.takes is Takes.DIVIDED else budget


_WHOLE = frozenset({"scale"})
_BY_RANK = frozenset({"scale", "k", "svd"})
_BY_SALIENCE = _BY_RANK | {"salience", "scope"}

METHODS: Mapping[str, Method] = {
    "axis": Method(
        takes=Takes.POOLED,
        parameters=_BY_SALIENCE,
        summary="AXIS merge (arXiv 2508.19353) of {n} models of one base: their differences' most "
        "salient rank-one components ({k}, by {salience}), re-orthogonalised; vectors are "
        "averaged.",
    ),
    "average": Method(
        takes=Takes.WHOLE,
        parameters=_WHOLE,
        summary="The plain average of {n} models' differences to their base.",
    ),
    "task_arithmetic": Method(
        takes=Takes.WHOLE,
        parameters=_WHOLE,
        vectors=Action.ELEMENTWISE,
        summary="Task arithmetic (arXiv 2212.04089): the sum of {n} models' differences to their "
        "base.",
    ),
    "ties": Method(
        takes=Takes.WHOLE,
        parameters=_WHOLE | {"density"},
        vectors=Action.ELEMENTWISE,
        density=0.2,
        summary="TIES merge (arXiv 2306.01708) of {n} models of one base: of each difference the "
        "largest entries ({density} of them), a sign elected per entry, the agreeing averaged.",
    ),
    "dare": Method(
        takes=Takes.WHOLE,
        parameters=_WHOLE | {"density"},
        vectors=Action.ELEMENTWISE,
        density=0.1,
        summary="DARE merge (arXiv 2311.03099) of {n} models of one base: the sum of their "
        "differences, of which random entries ({density} of them) are kept and rescaled.",
    ),
    "tsv_m": Method(
        takes=Takes.DIVIDED,
        parameters=_BY_RANK,
        k=1.0,
        summary="TSV-M merge (arXiv 2412.00081) of {n} models of one base: their differences' "
        "leading singular vectors ({k}, divided by the models), orthogonalised against each "
        "other; vectors are averaged.",
    ),
    "iso_c": Method(
        takes=Takes.WHOLE,
        parameters=_WHOLE,
        summary="Iso-C merge (arXiv 2502.04959) of {n} models of one base: the sum of their "
        "differences with all singular values at their mean; vectors are averaged.",
    ),
    "svc": Method(
        takes=Takes.POOLED,
        parameters=_BY_SALIENCE,
        summary="AXIS merge (arXiv 2508.19353) of {n} models of one base ({k}, by {salience}), "
        "singular values calibrated against over-counting of shared directions (SVC, arXiv "
        "2602.05536); vectors are averaged.",
    ),
    "knots": Method(
        takes=Takes.EACH,
        parameters=_BY_RANK | {"density"},
        k=1.0,
        density=0.2,
        summary="KnOTS merge (arXiv 2410.19735) of {n} models of one base: TIES ({density} of the "
        "entries) on the right factors of the concatenated differences ({k} of each); vectors are "
        "averaged.",
    ),
    "core_space": Method(
        takes=Takes.EACH,
        parameters=_BY_RANK | {"density"},
        k=1.0,
        density=0.2,
        summary="Core Space merge (arXiv 2509.17786) of {n} models of one base: TIES ({density} of "
        "the entries) on the differences ({k} of each) in bases common to all; vectors are "
        "averaged.",
    ),
}
