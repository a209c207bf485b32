"""A tiny classification on tensors: two superclasses of two labels, and a configuration of it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import save_file

from svdmerge.demo_models import build

CONFIG = {"hidden_size": 16, "num_hidden_layers": 1}
GROUPS = {"even": [0, 2], "odd": [1, 3]}


def write_base(folder: Path, *, seed: int = 0, name: str = "base", step: float = 0.0) -> Path:
    """An untrained transformer of 8 x 8 images, moved off it by some noise."""
    torch.manual_seed(0)
    state = build(CONFIG).state_dict()
    torch.manual_seed(seed)
    state = {k: v + step * torch.randn_like(v) for k, v in state.items()}
    (folder / name).mkdir(parents=True)
    save_file(state, folder / name / "model.safetensors", metadata={"format": "pt"})
    (folder / name / "config.json").write_text(json.dumps(CONFIG))
    return folder / name


def write_examples(path: Path, *, labels: int = 4, num: int = 40, seed: int = 0) -> Path:
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(9).normal(size=(labels, 64))
    y = np.arange(num) % labels
    x = centres[y] + 0.3 * rng.normal(size=(num, 64))
    pq.write_table(pa.table({"x": list(x.astype(np.float32)), "y": pa.array(y)}), path)
    return path


def section(folder: Path, *, groups: dict[str, Any] | None = None, **other: Any) -> dict[str, Any]:
    """A `train` or `transfer` section."""
    return {
        "task": "tensor",
        "base_model": str(folder / "base"),
        "backbone": "svdmerge.demo_models:build",
        "train": str(folder / "train.parquet"),
        "test": str(folder / "test.parquet"),
        "input": "x",
        "label": "y",
        "groups": GROUPS if groups is None else groups,
        "learngenes": 8,
        "tailors": 8,
        "steps": 25,
        "batch_size": 16,
        "learning_rate": 0.01,
    } | other


def task(folder: Path, **train: Any) -> dict[str, Any]:
    """A whole configuration, its base and examples written."""
    write_base(folder)
    for i, part in enumerate(("train", "test")):
        write_examples(folder / f"{part}.parquet", seed=i)
        write_examples(folder / f"new-{part}.parquet", labels=3, seed=i + 2)
    return {
        "model": str(folder / "model"),
        "store": str(folder / "store"),
        "train": section(folder, **train),
        "recombine": {"classes": ["0", "2"], "out": str(folder / "recombined")},
        "transfer": section(
            folder,
            groups={"all": [0, 1, 2]},
            train=str(folder / "new-train.parquet"),
            test=str(folder / "new-test.parquet"),
            out=str(folder / "transferred"),
        ),
    }
