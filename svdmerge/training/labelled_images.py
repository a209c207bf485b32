"""Images of one size with their labels, as bytes, from a table of encoded images."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from svdmerge.errors import TrainingError
from svdmerge.training.formats import read_table
from svdmerge.training.images import decoded

MODES = {1: "L", 3: "RGB"}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LabelledImages:
    """n images; bytes take a quarter of the memory of what networks see."""

    pixels: Tensor
    """uint8 (n, channels, height, width)."""
    labels: Tensor
    """int64 (n,)."""

    def __len__(self) -> int:
        return len(self.labels)

    def of_classes(self, classes: Sequence[int]) -> "LabelledImages":
        """Those of some classes; each label becomes its place in `classes`.

        Raises:
            TrainingError: a class has no image.
        """
        missing = [c for c in classes if not bool((self.labels == c).any())]
        if missing:
            raise TrainingError(
                f"classes: {missing} have no image",
                f"The labels there are: {self.labels.unique().tolist()}.",
                "Correct `classes`.",
            )
        matches = self.labels[:, None] == torch.tensor(list(classes))
        rows = matches.any(dim=1)
        return LabelledImages(pixels=self.pixels[rows], labels=matches[rows].int().argmax(dim=1))

    def scaled(self, rows: Sequence[int] | slice = slice(None)) -> Tensor:
        """Some images as float32 from -1 to 1."""
        chosen = self.pixels[rows if isinstance(rows, slice) else list(rows)]
        return chosen.float() / 127.5 - 1.0


def read_labelled_images(path: str, *, channels: int, size: int) -> LabelledImages:
    """The images of a table with columns `image` (encoded) and `label` (integers).

    Raises:
        TrainingError: the table cannot be read, or an image is broken or of another size.
    """
    table = read_table(path, columns=("image", "label"))
    pixels = np.stack(
        [
            _pixels(item, channels=channels, size=size, place=f"{path}, row {row}")
            for row, item in enumerate(table.column("image").to_pylist())
        ]
    )
    labels = table.column("label").to_numpy().astype(np.int64)
    return LabelledImages(pixels=torch.from_numpy(pixels), labels=torch.from_numpy(labels))


def _pixels(data: bytes, *, channels: int, size: int, place: str) -> np.ndarray:
    """uint8 (channels, size, size)."""
    image = np.asarray(decoded(data, mode=MODES[channels], place=place))
    if image.shape[:2] != (size, size):
        raise TrainingError(
            f"{place}: is an image of {image.shape[1]} x {image.shape[0]} pixels",
            f"The model is of images of {size} x {size}.",
            "Resize the images, or change `image_size`.",
        )
    return np.atleast_3d(image).transpose(2, 0, 1)
