"""Tiny Hugging Face-like checkpoints, for tests: two layers, every kind of tensor there is."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

HIDDEN, INNER, VOCAB, POSITIONS, LAYERS, EXPERTS = 24, 40, 64, 16, 2, 3

CONFIG: dict[str, Any] = {
    "architectures": ["TinyModel"],
    "model_type": "tiny",
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "vocab_size": VOCAB,
}
POSITION_IDS = "embeddings.position_ids"
WORD_EMBEDDINGS = "embeddings.word_embeddings.weight"
QUERY = "encoder.layer.0.attention.self.query.weight"
QUERY_BIAS = "encoder.layer.0.attention.self.query.bias"
EXPERT_STACK = "encoder.layer.1.mlp.experts.down_proj"
KERNEL = "patch.projection.weight"
SCALAR = "logit_scale"


def shapes() -> dict[str, tuple[int, ...]]:
    """The floating-point tensors of the tiny model and their shapes."""
    found: dict[str, tuple[int, ...]] = {
        SCALAR: (),
        WORD_EMBEDDINGS: (VOCAB, HIDDEN),
        "embeddings.position_embeddings.weight": (POSITIONS, HIDDEN),
        KERNEL: (8, 3, 4, 4),
        "patch.projection.bias": (8,),
        "pooler.dense.weight": (HIDDEN, HIDDEN),
        "pooler.dense.bias": (HIDDEN,),
    }
    for layer in range(LAYERS):
        at = f"encoder.layer.{layer}"
        for part in ("query", "key", "value"):
            found[f"{at}.attention.self.{part}.weight"] = (HIDDEN, HIDDEN)
            found[f"{at}.attention.self.{part}.bias"] = (HIDDEN,)
        found[f"{at}.attention.output.LayerNorm.weight"] = (HIDDEN,)
        found[f"{at}.attention.output.LayerNorm.bias"] = (HIDDEN,)
        found[f"{at}.intermediate.dense.weight"] = (INNER, HIDDEN)
        found[f"{at}.intermediate.dense.bias"] = (INNER,)
        found[f"{at}.output.dense.weight"] = (HIDDEN, INNER)
    found[EXPERT_STACK] = (EXPERTS, 16, HIDDEN)
    return found


def write_model(
    folder: str | Path,
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any] | None = CONFIG,
    *,
    shards: int = 1,
) -> Path:
    """The folder, holding the tensors as one safetensors file or as shards with an index."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    if config is not None:
        (folder / "config.json").write_text(json.dumps(dict(config), indent=2))
    if shards == 1:
        save_file(whole, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    names = sorted(whole)
    weight_map: dict[str, str] = {}
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: whole[name] for name in names[number::shards]}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    total = sum(t.numel() * t.element_size() for t in whole.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    return folder


def read_model(folder: str | Path) -> dict[str, Tensor]:
    """Every tensor of a model folder, by safetensors' own reader."""
    tensors: dict[str, Tensor] = {}
    for file in sorted(Path(folder).glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def tiny_base(
    folder: str | Path, seed: int = 0, *, shards: int = 1, dtype: torch.dtype = torch.float32
) -> Path:
    """A base model of random weights."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: torch.randn(shape, generator=generator).to(dtype)
        for name, shape in sorted(shapes().items())
    }
    tensors[POSITION_IDS] = torch.arange(POSITIONS)[None]
    return write_model(folder, tensors, shards=shards)


def tiny_source(
    folder: str | Path,
    base: str | Path,
    seed: int,
    *,
    scale: float = 0.1,
    rank: int | None = None,
    untouched: Iterable[str] = (),
    without: Iterable[str] = (),
    changes: Mapping[str, Tensor] | None = None,
    shards: int = 1,
    dtype: torch.dtype | None = None,
) -> Path:
    """A fine-tune of the base model: its weights plus random differences of size about `scale`.

    `rank` makes the differences of 2-D tensors that low. Tensors `untouched` stay the base's,
    those `without` are left out, `changes` replace or add whole tensors as they are. The
    floating-point tensors are stored in the base's dtype unless `dtype` says otherwise.
    """
    generator = torch.Generator().manual_seed(seed)
    untouched, without = set(untouched), set(without)
    tensors: dict[str, Tensor] = {}
    for name, start in sorted(read_model(base).items()):
        if not start.is_floating_point():
            tensors[name] = start
            continue
        difference = scale * _difference(start, rank=rank, generator=generator)
        moved = start if name in untouched else (start.double() + difference).to(start.dtype)
        tensors[name] = moved.to(dtype or start.dtype)
    tensors |= dict(changes or {})
    kept = {name: tensor for name, tensor in tensors.items() if name not in without}
    config = Path(base) / "config.json"
    told = json.loads(config.read_text()) if config.exists() else None
    return write_model(folder, kept, told, shards=shards)


def _difference(start: Tensor, *, rank: int | None, generator: torch.Generator) -> Tensor:
    if rank is None or start.dim() != 2:
        return torch.randn(start.shape, generator=generator, dtype=torch.float64)
    m, n = start.shape
    left = torch.randn(m, rank, generator=generator, dtype=torch.float64)
    right = torch.randn(rank, n, generator=generator, dtype=torch.float64)
    return left @ right / rank**0.5
