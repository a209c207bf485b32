"""A table of tiny images whose class shows: class c is brightest in quarter c."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from svdmerge.core.dit import DiTConfig
from svdmerge.core.kind.gate import disjoint
from svdmerge.core.kind.replace import Spec
from svdmerge.training.kind.diffusion import Diffusion
from svdmerge.training.pictures import png_bytes

SIZE = 8
NETWORK = DiTConfig(image_size=SIZE, channels=1, patch=2, width=16, depth=1, heads=2, num_classes=3)


def write_images(path: Path, *, per_class: int = 8, seed: int = 0) -> str:
    """The table's path: four classes, labelled 0 to 3, in turn."""
    rng = np.random.default_rng(seed)
    labels = np.arange(4 * per_class) % 4
    pixels = rng.integers(0, 60, size=(len(labels), SIZE, SIZE, 1), dtype=np.uint8)
    for image, label in zip(pixels, labels, strict=True):
        row, column = 4 * (label // 2), 4 * (label % 2)
        image[row : row + 4, column : column + 4] += 180
    encoded = [png_bytes(torch.from_numpy(image)) for image in pixels]
    pq.write_table(pa.table({"image": encoded, "label": labels}), path)
    return str(path)


def tiny_diffusion(train: str, **changes: object) -> Diffusion:
    """Three of the four classes, gated."""
    spec = Spec(gate=disjoint(["a", "b", "c"]), num_learngenes=4, num_tailors=6)
    fields: dict[str, object] = {
        "network": NETWORK, "train": train, "classes": (0, 1, 3), "spec": spec,
    }  # fmt: skip
    return Diffusion(**(fields | changes))  # pyright: ignore[reportArgumentType]
