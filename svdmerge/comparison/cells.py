"""Results by target, shots, draw and entrant: kept as files, summed up with paired intervals."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from svdmerge.core.evidence import NUM_RESAMPLES


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One entrant on one draw of one target."""

    target: str
    per_class: int
    """0: all training rows."""
    draw: int
    entrant: str
    accuracy: float
    num_test: int
    trained: int
    num_sources: int
    detail: str
    steps: int
    seconds: float

    @property
    def key(self) -> tuple[str, int, int]:
        """What cells are paired by."""
        return self.target, self.per_class, self.draw

    @property
    def target_alone(self) -> str:
        """The target without what its sources were altered by, `@4` or `+pruned`."""
        return re.split("[@+]", self.target)[0]


def plain(cells: Iterable[Cell]) -> list[Cell]:
    """Those of targets with all their sources as they are."""
    return [c for c in cells if c.target == c.target_alone]


class Cells:
    """The cells in a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def path(self, *, target: str, per_class: int, draw: int, entrant: str) -> Path:
        """A cell's file."""
        name = f"{target}-{per_class}-{draw}-{entrant}".replace(" ", "_").replace("/", "_")
        return self._folder / f"{name}.json"

    def put(self, cell: Cell) -> None:
        """Keep a cell."""
        path = self.path(
            target=cell.target, per_class=cell.per_class, draw=cell.draw, entrant=cell.entrant
        )
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(asdict(cell)))
        partial.rename(path)

    def all(self) -> list[Cell]:
        """Every cell."""
        return [Cell(**json.loads(p.read_text())) for p in sorted(self._folder.glob("*.json"))]


@dataclass(frozen=True, slots=True, kw_only=True)
class Paired:
    """The mean of an entrant's accuracy minus another's, in points, and its 95 % interval."""

    mean: float
    low: float
    high: float
    num_draws: int


def paired(cells: Iterable[Cell], *, entrant: str, other: str, seed: int = 0) -> Paired | None:
    """The difference over the draws that both have; targets and shots count alike.

    Draws are resampled within each target and number of shots, so the interval is of these targets
    and not of targets at large. None if no draw has both.
    """
    by_key: dict[tuple[str, int, int], dict[str, float]] = {}
    for cell in cells:
        by_key.setdefault(cell.key, {})[cell.entrant] = 100 * cell.accuracy
    groups: dict[tuple[str, int], list[float]] = {}
    for (target, per_class, _), found in by_key.items():
        if entrant in found and other in found:
            groups.setdefault((target, per_class), []).append(found[entrant] - found[other])
    if not groups:
        return None
    rng = np.random.default_rng(seed)
    means = np.zeros(NUM_RESAMPLES)
    for values in groups.values():
        x = np.asarray(values)
        means += x[rng.integers(len(x), size=(NUM_RESAMPLES, len(x)))].mean(axis=1) / len(groups)
    low, high = np.quantile(means, [0.025, 0.975])
    mean = float(np.mean([np.mean(v) for v in groups.values()]))
    num_draws = sum(len(v) for v in groups.values())
    return Paired(mean=mean, low=float(low), high=float(high), num_draws=num_draws)


def means(cells: Sequence[Cell]) -> Mapping[tuple[str, int], Mapping[str, float]]:
    """Mean accuracy in per cent by (target, shots) and entrant."""
    found: dict[tuple[str, int], dict[str, list[float]]] = {}
    for c in cells:
        group = found.setdefault((c.target, c.per_class), {})
        group.setdefault(c.entrant, []).append(100 * c.accuracy)
    return {
        group: {e: float(np.mean(v)) for e, v in entrants.items()}
        for group, entrants in found.items()
    }


def best_single(cells: Sequence[Cell]) -> str | None:
    """The single source of highest mean accuracy on one target, known only after testing."""
    found: dict[str, list[float]] = {}
    for c in cells:
        if c.entrant.startswith("source "):
            found.setdefault(c.entrant, []).append(c.accuracy)
    return max(sorted(found), key=lambda e: float(np.mean(found[e]))) if found else None


def altered_pairs(cells: Sequence[Cell]) -> dict[tuple[str, str], Paired]:
    """An entrant on altered targets minus itself on them as they are, by alteration and entrant."""
    altered = [c for c in cells if c.target != c.target_alone]
    kinds = dict.fromkeys((c.target[len(c.target_alone) :], c.entrant) for c in altered)
    found: dict[tuple[str, str], Paired] = {}
    for kind, entrant in kinds:
        changed = [
            replace(c, target=c.target_alone, entrant=f"{entrant} {kind}")
            for c in altered
            if c.entrant == entrant and c.target == c.target_alone + kind
        ]
        both = [*plain(cells), *changed]
        if difference := paired(both, entrant=f"{entrant} {kind}", other=entrant):
            found[kind, entrant] = difference
    return found


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's correlation of two lists without ties."""
    ranks = [np.argsort(np.argsort(x)).astype(float) for x in (a, b)]
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])
