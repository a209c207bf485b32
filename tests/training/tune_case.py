"""A tiny target with base, sources, merged model and merged factors, as a run leaves them."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file, save_file
from tiny_backbone import INPUTS, TinyNet
from torch import Tensor

from svdmerge.core import svd
from svdmerge.core.components import RankOneComponents
from svdmerge.recipe import TuneConfig
from svdmerge.storage.checkpoint import Checkpoint, open_checkpoint
from svdmerge.storage.filesystem import Folder
from svdmerge.storage.hf_model import load_factors
from svdmerge.storage.manifest import Committed, Covered, put_unit
from svdmerge.storage.shards import Rows
from svdmerge.training.result import TuneResult
from svdmerge.training.tune import tune

MATRICES = ("encoder.0.weight", "encoder.2.weight", "pooler.weight")
NUM_CLASSES, RANK = 3, 4


def quiet(name: str, done: int, total: int) -> None:
    del name, done, total


def write_examples(path: Path, *, per_class: int, seed: int, easy: float = 1.0) -> Path:
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(NUM_CLASSES, INPUTS))
    labels = np.arange(per_class * NUM_CLASSES) % NUM_CLASSES
    x = easy * centres[labels] + rng.normal(size=(len(labels), INPUTS))
    table = pa.table({"x": list(x.astype(np.float32)), "label": pa.array(labels, pa.int32())})
    pq.write_table(table, path)
    return path


def save_model(folder: Path, state: Mapping[str, Tensor], config: Mapping[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    whole = {name: tensor.contiguous() for name, tensor in state.items()}
    save_file(whole, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(dict(config)))
    return folder


def put_factors(folder: Folder, factors: Mapping[str, RankOneComponents]) -> Committed:
    put_unit(
        folder,
        data_prefix="all",
        commit_path="all.json",
        rows=[Rows(parameter=p, kind="merged", first=0, components=c) for p, c in factors.items()],
        spectra=[],
        covered=[
            Covered(parameter=p, first=0, depth=len(c), source_sha256="", base_sha256="")
            for p, c in factors.items()
        ],
        solver="test",
        numerics="",
    )
    return load_factors(folder)


@dataclass(frozen=True, kw_only=True)
class Case:
    """All that `tune` takes."""

    root: Path
    base: Checkpoint
    merged: Checkpoint
    sources: list[Checkpoint]
    factors: Committed

    def config(self, **changes: Any) -> TuneConfig:
        fields: dict[str, Any] = {
            "task": "tensor",
            "model": "tiny_backbone:build",
            "train": str(self.root / "train.parquet"),
            "test": str(self.root / "test.parquet"),
            "input": "x",
            "per_class": 12,
            "num_values": 3,
            "epochs": 4,
            "batch_size": 8,
            "learning_rate": 0.05,
            "checkpoint_every_s": 0,
        }
        return TuneConfig(**(fields | changes))

    @property
    def models(self) -> list[dict[str, Any]]:
        """The sources as a recipe lists them: moved farther than a fine-tune moves."""
        return [{"model": s.reference, "admit": True} for s in self.sources]

    @property
    def parameters(self) -> dict[str, int]:
        return {p: self.factors.depth(p) for p in MATRICES}

    def tune(
        self,
        config: TuneConfig | None = None,
        *,
        out: str = "tuned",
        run: str = "run",
        use_ray: bool = False,
        parameters: Mapping[str, int] | None = None,
        on_progress: Callable[[str, int, int], None] = quiet,
    ) -> TuneResult:
        return tune(
            config or self.config(),
            base=self.base,
            merged=self.merged,
            sources=self.sources,
            factors=self.factors,
            parameters=parameters or self.parameters,
            run_folder=Folder.at(self.root / run),
            out=Folder.at(self.root / out),
            threads=1,
            use_ray=use_ray,
            on_progress=on_progress,
        )


def make_case(
    root: Path, *, config: Mapping[str, Any] | None = None, dtype: torch.dtype = torch.float32
) -> Case:
    """Two sources near a random base; the merge is the rank-4 mean of their differences."""
    config = config or {}
    torch.manual_seed(0)
    start = {n: t.to(dtype) for n, t in TinyNet({}).state_dict().items()}
    save_model(root / "base", start, config)
    for number in range(2):
        moved = {n: t + 0.2 * torch.randn_like(t) for n, t in start.items()}
        save_model(root / f"source-{number}", moved, config)
    states = [load_file(root / f"source-{i}" / "model.safetensors") for i in range(2)]
    merged, factors = dict(start), dict[str, RankOneComponents]()
    for name in MATRICES:
        mean = sum(s[name].double() - start[name].double() for s in states) / 2
        factors[name] = svd.exact(mean).slice(0, RANK)
        merged[name] = (start[name].double() + factors[name].dense()).to(dtype)
    save_model(root / "merged", merged, config)
    write_examples(root / "train.parquet", per_class=40, seed=1)
    write_examples(root / "test.parquet", per_class=30, seed=2)
    return Case(
        root=root,
        base=open_checkpoint(str(root / "base")),
        merged=open_checkpoint(str(root / "merged")),
        sources=[open_checkpoint(str(root / f"source-{i}")) for i in range(2)],
        factors=put_factors(Folder.at(root / "factors"), factors),
    )
