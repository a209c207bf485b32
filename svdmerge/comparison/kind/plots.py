"""The benchmark's figures."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from svdmerge.comparison.kind.diversion import CONTROLS, class_means


def draw_matrices(
    measured: Sequence[Mapping[str, Tensor]], names: Sequence[str], path: Path
) -> None:
    """Loss of each class under each class's tailors, in per cent above its own; means of seeds."""
    from matplotlib.figure import Figure

    figure: Any = Figure(figsize=(11, 3.6), layout="constrained")
    for axes, control in zip(figure.subplots(1, len(CONTROLS)), CONTROLS, strict=True):
        matrices = [class_means(m[control], labels=m["labels"]) for m in measured]
        above = torch.stack([100 * (m / m.diagonal()[:, None] - 1) for m in matrices]).mean(dim=0)
        most = max(float(above.abs().max()), 0.1)
        shown = axes.imshow(above.numpy(), cmap="RdBu_r", vmin=-most, vmax=most)
        axes.set_xticks(range(len(names)), names, rotation=60, fontsize=7)
        axes.set_yticks(range(len(names)), names, fontsize=7)
        axes.set_title(control, fontsize=9)
        figure.colorbar(shown, ax=axes, shrink=0.7)
    figure.supxlabel("tailors used", fontsize=8)
    figure.supylabel("images of", fontsize=8)
    figure.savefig(path, dpi=80)


def draw_curves(results: Mapping[str, Sequence[Mapping[str, Tensor]]], path: Path) -> None:
    """Held-out loss on the novel classes against steps: means of seeds, and their range."""
    from matplotlib.figure import Figure

    figure: Any = Figure(figsize=(7.5, 4.2), layout="constrained")
    axes = figure.subplots()
    for name, seeds in results.items():
        steps = seeds[0]["steps"].tolist()
        losses = torch.stack([r["losses"].double().mean(dim=1) for r in seeds])
        line = axes.plot(steps, losses.mean(dim=0).tolist(), "o-", markersize=3, label=name)
        low, high = losses.amin(dim=0).tolist(), losses.amax(dim=0).tolist()
        axes.fill_between(steps, low, high, alpha=0.15, color=line[0].get_color())
    axes.set(xlabel="steps", ylabel="held-out denoising loss, novel classes", yscale="log")
    axes.legend(fontsize=7)
    figure.savefig(path, dpi=80)
