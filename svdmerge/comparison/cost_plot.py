"""The decomposition benchmark's figure: how many times less than full SVDs it takes."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from svdmerge.comparison.decomposition import Cost


def lines(costs: Mapping[int, Cost]) -> dict[str, list[tuple[int, float]]]:
    """By what is measured, (rank, full SVDs' time over its own)."""
    seconds = {
        "svdmerge": lambda c: c.ours,
        "svd_lowrank to rank k, uncertain": lambda c: c.sketched,
        "floor: flops needed, or reading once": lambda c: c.floor,
    }
    return {
        name: [(rank, cost.full / of(cost)) for rank, cost in sorted(costs.items())]
        for name, of in seconds.items()
    }


def draw_costs(costs: Mapping[int, Cost], path: Path) -> None:
    """Write the figure, of costs by rank."""
    from matplotlib.figure import Figure

    figure: Any = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.subplots()
    for name, points in lines(costs).items():
        axes.plot(*zip(*points, strict=True), "o-", markersize=4, label=name)
    axes.set(
        xscale="log", yscale="log", xlabel="rank (square matrices)",
        ylabel="full SVDs' time over its own", title="decomposing for a selection",
    )  # fmt: skip
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=150)
