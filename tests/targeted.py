"""A tiny target for which one source helps: recipes, examples, and a copy that adds nothing."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from merging import Bench
from tiny import write_model
from torch import Tensor
from training.tiny_backbone import INPUTS, TinyNet

from svdmerge.report.run_report import RunReport

CLASSES = 3


def start() -> dict[str, Tensor]:
    """A base whose first layer hardly lets the classes' directions through."""
    torch.manual_seed(0)
    state = {n: t.clone() for n, t in TinyNet({}).state_dict().items()}
    away = torch.eye(INPUTS) - 0.97 * span() @ span().T
    state["encoder.0.weight"] = state["encoder.0.weight"] @ away
    return state


def span() -> Tensor:
    """Directions in which classes differ (inputs, 2)."""
    generator = torch.Generator().manual_seed(9)
    return torch.linalg.qr(torch.randn(INPUTS, CLASSES - 1, generator=generator))[0]


def helping(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A source that looks where the classes differ."""
    generator = torch.Generator().manual_seed(1)
    width = state["encoder.0.weight"].shape[0]
    seen = 1.5 * torch.randn(width, CLASSES - 1, generator=generator) @ span().T
    return {**state, "encoder.0.weight": state["encoder.0.weight"] + seen}


def useless(state: Mapping[str, Tensor], *, seed: int, step: float = 0.8) -> dict[str, Tensor]:
    """A source of noise that hides the classes' directions altogether."""
    generator = torch.Generator().manual_seed(seed)
    moved = {n: t + step * torch.randn(t.shape, generator=generator) for n, t in state.items()}
    blind = torch.eye(INPUTS) - span() @ span().T
    moved["encoder.0.weight"] = moved["encoder.0.weight"] @ blind
    return moved


def write_examples(path: Path, *, per_class: int, seed: int) -> Path:
    rng = np.random.default_rng(seed)
    labels = np.arange(per_class * CLASSES) % CLASSES
    turns = 2 * np.pi * labels / CLASSES
    centres = 2.0 * np.stack([np.cos(turns), np.sin(turns)], axis=1) @ span().numpy().T
    x = centres + 0.7 * rng.normal(size=(len(labels), INPUTS))
    table = pa.table({"x": list(x.astype(np.float32)), "label": pa.array(labels, pa.int32())})
    pq.write_table(table, path)
    return path


def further(state: Mapping[str, Tensor], source: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The source trained a little further the same way."""
    return {n: t + 1.05 * (source[n] - t) for n, t in state.items()}


def target_bench(root: Path, *, help_too: bool = True, copy: bool = False) -> Bench:
    """Base, two useless sources, one that helps, and on demand a near copy of it.

    Without help the base itself sees the classes, which every source then hides.
    """
    state = start() if help_too else helping(start())
    models = {f"noise-{seed}": useless(state, seed=seed) for seed in (2, 3)}
    if help_too:
        models["helper"] = helping(state)
    if copy:
        models["copy"] = further(state, models["helper"])
    root.mkdir(exist_ok=True)
    base = write_model(root / "base", state, {})
    sources = tuple(write_model(root / name, m, {}) for name, m in sorted(models.items()))
    write_examples(root / "train.parquet", per_class=20, seed=1)
    write_examples(root / "test.parquet", per_class=20, seed=2)
    return Bench(root=root, base=base, sources=sources, admit=True)


def warnings(report: RunReport) -> list[str]:
    """Those of a run besides that its sources, made up as they are, were admitted."""
    return [told for told in report.warnings if "is admitted, though" not in told]


def tune_section(root: Path, **changes: Any) -> dict[str, Any]:
    return {
        "task": "tensor",
        "model": "training.tiny_backbone:build",
        "train": str(root / "train.parquet"),
        "test": str(root / "test.parquet"),
        "input": "x",
        "num_values": 2,
        "epochs": 1,
        "batch_size": 16,
        "checkpoint_every_s": 0,
    } | changes


def targeted(bench: Bench, **tune: Any) -> dict[str, Any]:
    """The recipe whose sources and strength the examples choose."""
    return {
        "parameters": {"k": "100%", "salience": "target", "scale": "auto"},
        "tune": tune_section(bench.root, **tune),
    }
