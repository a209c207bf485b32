"""Many intents told from short texts: the data, superclasses and small transformer of a benchmark.

Labels are drawn into old ones, to train on, and novel ones. A superclass is a cluster of labels:
k-means of their training texts' mean features under the base model, so nothing of a label's own
test texts takes part. In training and at inference the superclass is known, to every entrant alike.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from sklearn.cluster import KMeans
from torch import Tensor, nn

from svdmerge.recipe import TuneConfig
from svdmerge.storage.checkpoint import SINGLE, Checkpoint, open_checkpoint
from svdmerge.storage.filesystem import Folder
from svdmerge.storage.side_files import copy_side_files
from svdmerge.training.backbone import build_backbone, load_weights
from svdmerge.training.data import load_training
from svdmerge.training.features import extract

TABLE = "embeddings.word_embeddings.weight"
BUILDER = "svdmerge.comparison.text_case:build"
# Texts of each label that its mean features are taken of: enough for a mean, soon computed.
TEXTS_PER_LABEL = 20


class _Attention(nn.Module):
    def __init__(self, width: int, *, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k = nn.Linear(width, width), nn.Linear(width, width)
        self.v, self.o = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:  # (b, t, d), (b, t)
        parts = (project(x) for project in (self.q, self.k, self.v))
        q, k, v = (part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in parts)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None].bool())
        return self.o(mixed.transpose(1, 2).flatten(2))


class _Mlp(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class _Block(nn.Module):
    def __init__(self, width: int, *, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn, self.mlp = _Attention(width, heads=heads), _Mlp(width)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x), mask)
        return x + self.mlp(self.norm2(x))


class TextTransformer(nn.Module):
    """Token columns to features (b, d); word embeddings are another model's, frozen."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        width = config["hidden_size"]
        shape = (config["vocab_size"], config["embedding_size"])
        self.register_buffer("table", torch.zeros(shape))
        self.project = nn.Linear(config["embedding_size"], width)
        self.positions = nn.Parameter(0.02 * torch.randn(config["max_length"], width))
        self.blocks = nn.ModuleList(
            _Block(width, heads=config["heads"]) for _ in range(config["num_hidden_layers"])
        )
        self.norm = nn.LayerNorm(width)

    def forward(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Mean features (b, d) of the tokens that are no padding."""
        mask = inputs["attention_mask"]
        words = F.embedding(inputs["input_ids"], self.get_buffer("table"))
        x = self.project(words) + self.positions[: mask.shape[1]]
        for block in self.blocks:
            x = block(x, mask)
        weights = mask[..., None].to(x.dtype)
        return (self.norm(x) * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1.0)


def build(config: Mapping[str, Any]) -> nn.Module:
    """The transformer of a `config.json` that `write_case` wrote."""
    return TextTransformer(config)


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Old or novel labels, numbered anew from 0, and their superclasses."""

    train: str
    test: str
    groups: dict[str, list[int]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """The benchmark's data, as files."""

    base: str
    old: Part
    novel: Part


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """How large the case is."""

    num_old: int = 50
    old_groups: int = 8
    novel_groups: int = 4
    width: int = 128
    layers: int = 2
    heads: int = 4
    max_length: int = 24


def write_case(work: Path, *, base: str, train: str, test: str, sizes: Sizes) -> Case:
    """The case's files below `work`; an earlier call's are kept.

    `base` gives the tokenizer, the word embeddings, and the features that labels are grouped by.
    """
    work.mkdir(parents=True, exist_ok=True)
    record = work / "case.json"
    if not record.exists():
        made = _made(work, base=open_checkpoint(base), train=train, test=test, sizes=sizes)
        record.write_text(json.dumps(made, indent=1) + "\n")
    raw = json.loads(record.read_text())
    return Case(base=raw["base"], old=Part(**raw["old"]), novel=Part(**raw["novel"]))


def _made(work: Path, *, base: Checkpoint, train: str, test: str, sizes: Sizes) -> dict[str, Any]:
    means = label_means(base, train=train)
    order = np.random.default_rng(0).permutation(len(means)).tolist()
    parts = {
        "old": (order[: sizes.num_old], sizes.old_groups),
        "novel": (order[sizes.num_old :], sizes.novel_groups),
    }
    found: dict[str, Any] = {"base": str(_write_base(work / "base", base=base, sizes=sizes))}
    for name, (labels, num_groups) in parts.items():
        tables = {"train": train, "test": test}
        found[name] = {
            part: _write_labels(work / f"{name}-{part}.parquet", path, labels)
            for part, path in tables.items()
        } | {"groups": grouped(means[labels], num_groups=num_groups)}
    return found


def label_means(base: Checkpoint, *, train: str) -> Tensor:
    """Mean features (y, d) of some training texts of every label, each of length 1."""
    config = TuneConfig(train=train, test=train, per_class=TEXTS_PER_LABEL, max_length=32)
    backbone = build_backbone(config, base=base)
    load_weights(backbone, checkpoint=base, base=base)
    examples = load_training(config, base=base)
    features = extract(backbone, examples, device=torch.device("cpu"))
    labels = range(int(examples.labels.max()) + 1)
    means = torch.stack([features[examples.labels == y].mean(dim=0) for y in labels])
    return F.normalize(means, dim=1)


def grouped(means: Tensor, *, num_groups: int) -> dict[str, list[int]]:
    """Labels by superclass; clusters of one label are joined to the nearest, for they would tell
    it."""
    clusters: Any = KMeans(num_groups, random_state=0, n_init=cast(Any, 10))
    clusters.fit(means.numpy())
    of, centres = np.array(clusters.labels_), np.asarray(clusters.cluster_centers_)
    for cluster in range(num_groups):
        if (of == cluster).sum() == 1:
            distances = np.linalg.norm(centres - centres[cluster], axis=1)
            of[of == cluster] = next(c for c in distances.argsort()[1:] if (of == c).sum() > 0)
    return {f"g{c}": np.flatnonzero(of == c).tolist() for c in range(num_groups) if (of == c).any()}


def _write_labels(out: Path, path: str, labels: Sequence[int]) -> str:
    """A table's rows of these labels, numbered by their places in the list."""
    table = pq.read_table(path)
    number = {label: i for i, label in enumerate(labels)}
    rows = [row for row in table.to_pylist() if row["label"] in number]
    columns = {
        "text": pa.array([row["text"] for row in rows]),
        "label": pa.array([number[row["label"]] for row in rows], pa.int64()),
    }
    pq.write_table(pa.table(columns), out)
    return str(out)


def _write_base(folder: Path, *, base: Checkpoint, sizes: Sizes) -> Path:
    """An untrained transformer over the base's word embeddings, with its tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    name = next(n for n in base.tensors if n.endswith(TABLE))
    table = base.tensors[name].read().float()
    config = {
        "model_type": "bert",  # its tokenizer's; `build` reads the rest
        "vocab_size": table.shape[0],
        "embedding_size": table.shape[1],
        "hidden_size": sizes.width,
        "num_hidden_layers": sizes.layers,
        "heads": sizes.heads,
        "max_length": sizes.max_length,
    }
    copy_side_files(base, Folder.at(folder))
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        state = build(config).state_dict() | {"table": table}
    save_file(state, folder / SINGLE, metadata={"format": "pt"})
    return folder
