"""What the report of a merge shows: plain figures, gathered elsewhere."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True, slots=True, kw_only=True)
class MergedSource:
    """A source, as its row has it."""

    name: str
    revision: str
    weight: float
    licence: str | None
    kept: int
    """Components, of all matrices."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MergedMatrix:
    """What was kept of a decomposed matrix, and what bounds the rest."""

    name: str
    m: int
    n: int
    kept: int
    energy: float
    """Share of the sources' squared Frobenius norms."""
    total: float
    """Their squared Frobenius norms, summed."""
    spectral: float
    """What is left out of it has no larger singular value."""
    largest: float
    """The largest weighted singular value of any source."""
    spectrum: tuple[tuple[int, float], ...]
    """(place from 1, salience) of some of all sources' values."""
    cut: tuple[int, float] | None
    """Place and salience of the last value kept."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Overlap:
    """How alike sources are, by principal angles in some matrices."""

    names: tuple[str, ...]
    mean: np.ndarray
    """Mean squared cosines, (sources, sources); the diagonal counts for nothing."""
    matrices: tuple[str, ...]
    """What was compared."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Inflation:
    """The largest singular value of a merged matrix over the largest of its sources."""

    name: str
    ratio: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Contents:
    """A report, whole. What is empty gets no section."""

    title: str
    summary: str
    base: str
    base_revision: str
    base_licence: str | None
    licence: str
    """Of the merge, and why."""
    version: str
    plan_hash: str
    status: str
    recipe_yaml: str
    warnings: tuple[str, ...]
    missing: tuple[str, ...]
    """Sections that could not be made, and why."""
    actions: Mapping[str, int]
    """Tensors by what happened to them."""
    sources: tuple[MergedSource, ...]
    kept_by: np.ndarray
    """Components kept, (sources, matrices): as `sources` and `kept_in` name them."""
    kept_in: tuple[str, ...]
    matrices: tuple[MergedMatrix, ...] = ()
    whatif: tuple[Mapping[str, Any], ...] = ()
    """Outcomes over a grid of budgets, as `svdmerge whatif --json` prints them."""
    k: int | float | None = None
    """The recipe's."""
    overlap: Overlap | None = None
    inflation: tuple[Inflation, ...] = ()
    stages: tuple[Mapping[str, Any], ...] = ()
    ranking: Mapping[str, Any] | None = None
    adaptation: Mapping[str, Any] | None = None
    tuned: tuple[tuple[str, Mapping[str, Any]], ...] = field(default=())
    """(target, result) of each; of a single target the name is empty."""
    failed: tuple[tuple[str, str], ...] = ()
    """(target, error) of those whose tuning failed."""

    @property
    def energy(self) -> float | None:
        """Share of the squared norms that is kept, matrices together; None if it is not known."""
        total = sum(x.total for x in self.matrices)
        return sum(x.energy * x.total for x in self.matrices) / total if total else None

    @property
    def spectral(self) -> float | None:
        """No matrix's left-out part has a larger singular value."""
        return max((x.spectral for x in self.matrices), default=None)
