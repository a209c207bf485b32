"""The image benchmark's study on ten classes of tiny made-up images."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from svdmerge.comparison.kind.study import Study
from svdmerge.training.pictures import png_bytes


def tiny_study(folder: Path) -> Study:
    """Class c is a bright bar in row or column c mod 5; models are trained for a few steps."""
    rng = np.random.default_rng(0)
    places: list[str] = []
    for name, each in (("train", 8), ("test", 6)):
        labels = np.arange(10 * each) % 10
        pixels = rng.integers(0, 60, size=(len(labels), 8, 8, 1), dtype=np.uint8)
        for image, label in zip(pixels, labels, strict=True):
            bar = image[label % 5] if label < 5 else image[:, label % 5]
            bar += 180
        encoded = [png_bytes(torch.from_numpy(image)) for image in pixels]
        places.append(str(folder / f"{name}.parquet"))
        pq.write_table(pa.table({"image": encoded, "label": labels}), places[-1])
    return Study(
        train=places[0], test=places[1], out=folder / "out", names=tuple("abcdefghij"),
        size=8, channels=1, patch=4, width=24, depth=1, heads=2, num_learngenes=8, num_tailors=7,
        steps=6, batch_size=4, num_draws=1, transfer_steps=6, num_few=3, mirrored=False,
    )  # fmt: skip
