"""Made-up sources for benchmarks and scaling tests, from real ones."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from svdmerge.core.svd import seed_of
from svdmerge.storage.checkpoint import FLOATING, SINGLE, Checkpoint


def perturbed_copy(source: Checkpoint, folder: Path, *, seed: int, noise: float) -> Path:
    """A float16 copy whose matrices carry noise of `noise` times their standard deviation."""
    tensors: dict[str, torch.Tensor] = {}
    for name, ref in source.tensors.items():
        tensor = ref.read()
        if ref.dtype in FLOATING and tensor.ndim == 2:
            generator = torch.Generator().manual_seed(seed_of(name, m=seed, n=0, block=0))
            values = tensor.to(torch.float32)
            added = torch.randn(values.shape, generator=generator) * (noise * values.std())
            tensor = values + added
        tensors[name] = tensor.to(torch.float16) if ref.dtype in FLOATING else tensor
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(dict(source.config)))
    return folder
