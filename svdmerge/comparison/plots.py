"""The benchmark's figure, from cells alone: accuracy against what is trained and what is merged."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from svdmerge.comparison.cells import Cell, means, plain

# Sources other than those of the number-of-sources plot would make it a plot of them.
BY_SOURCES = ("ridge probe", "best single source", "AXIS untuned", "average", "svdmerge")

MARKERS = "os^Dv"


def by_trained(cells: Sequence[Cell]) -> dict[str, tuple[int, float]]:
    """By entrant the values it trains and its mean accuracy in per cent, on targets as they are.

    Single sources are left out: one pick of them stands for all. An entrant that not all (target,
    shots) have is too, for its mean would be of other targets.
    """
    whole = [c for c in plain(cells) if not c.entrant.startswith("source ")]
    table = means(whole)
    return {
        e: (
            max(c.trained for c in whole if c.entrant == e),
            float(np.mean([row[e] for row in table.values()])),
        )
        for e in dict.fromkeys(c.entrant for c in whole)
        if all(e in row for row in table.values())
    }


def by_sources(cells: Sequence[Cell]) -> dict[str, list[tuple[int, float]]]:
    """By entrant (sources there are, mean accuracy in per cent), over targets run with fewer.

    The number there are is that which an entrant that takes all of them used.
    """
    chosen = [c for c in cells if "+" not in c.target]
    fewer = {c.target_alone for c in chosen if "@" in c.target}
    points: dict[str, dict[int, list[float]]] = {}
    for (target, per_class), row in means(chosen).items():
        part = [c for c in chosen if (c.target, c.per_class) == (target, per_class)]
        number = max(c.num_sources for c in part)
        if part[0].target_alone in fewer:
            for entrant in (e for e in BY_SOURCES if e in row):
                points.setdefault(entrant, {}).setdefault(number, []).append(row[entrant])
    return {
        entrant: [(n, float(np.mean(v))) for n, v in sorted(found.items())]
        for entrant, found in points.items()
    }


def draw(cells: Sequence[Cell], path: Path) -> None:
    """Write the figure."""
    from matplotlib.figure import Figure

    figure: Any = Figure(figsize=(14, 5.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    _draw_trained(left, by_trained(cells))
    _draw_sources(right, by_sources(cells))
    figure.savefig(path, dpi=150)


def _draw_trained(axes: Any, points: Mapping[str, tuple[int, float]]) -> None:
    ranked = sorted(points.items(), key=lambda item: -item[1][1])
    for number, (entrant, (trained, accuracy)) in enumerate(ranked):
        # No zero on a logarithm: what trains nothing stands at one. Colours come ten, then again.
        mark = MARKERS[number // 10 % len(MARKERS)]
        axes.plot(max(1, trained), accuracy, mark, markersize=5, label=entrant)
    axes.set(
        xscale="log", xlabel="trained values without head (1: none)",
        ylabel="mean test accuracy, %", title="accuracy against trained values",
    )  # fmt: skip
    if points:
        axes.legend(fontsize=6, loc="center left", bbox_to_anchor=(1.0, 0.5))


def _draw_sources(axes: Any, lines: Mapping[str, Sequence[tuple[int, float]]]) -> None:
    for entrant, points in lines.items():
        axes.plot(*zip(*points, strict=True), "o-", markersize=4, label=entrant)
    axes.set(
        xlabel="sources there are", ylabel="mean test accuracy, %",
        title="accuracy against number of sources",
    )  # fmt: skip
    if lines:
        axes.legend(fontsize=7)
