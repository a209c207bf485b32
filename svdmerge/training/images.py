"""Encoded images to pixels, resized and scaled as the base model's folder says."""

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from svdmerge.errors import SvdmergeError, TrainingError
from svdmerge.storage.checkpoint import Checkpoint
from svdmerge.storage.filesystem import Folder
from svdmerge.training.tokens import local_copy

PROCESSOR = "preprocessor_config.json"
# Where the base names none: what ViT's own processor does.
DEFAULT_SIZE, DEFAULT_MEAN, DEFAULT_STD = 224, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scaling:
    """From stored pixels, 0 to 255, to what the backbone takes: (pixel * scale - mean) / std."""

    scale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, pixels: Tensor) -> Tensor:
        """Pixels (b, c, h, w) in float32. Done per batch: bytes take a quarter of the memory."""
        mean, std = (torch.tensor(v)[:, None, None] for v in (self.mean, self.std))
        return (pixels.float() * self.scale - mean) / std


class ImageReader:
    """Decodes and resizes images; without a `preprocessor_config.json` to the square of the
    config's `image_size` (224 if it has none), bilinear, RGB from -1 to 1."""

    def __init__(self, base: Checkpoint) -> None:
        _pillow()
        self._processor: Any = _load_processor(base)
        size = base.config.get("image_size", DEFAULT_SIZE)
        height, width = size if isinstance(size, list | tuple) else (size, size)
        # A processor takes care of channels itself, from RGB.
        is_grey = base.config.get("num_channels") == 1 and self._processor is None
        self._mode = "L" if is_grey else "RGB"
        self._size = (int(cast(int, height)), int(cast(int, width)))

    @property
    def scaling(self) -> Scaling:
        """How the backbone wants its pixels."""
        p = self._processor
        if p is None:
            num = len(self._mode)
            return Scaling(scale=1 / 255, mean=DEFAULT_MEAN[:num], std=DEFAULT_STD[:num])
        scale = float(p.rescale_factor) if p.do_rescale else 1.0
        if not p.do_normalize:
            return Scaling(scale=scale, mean=(0.0,), std=(1.0,))
        return Scaling(scale=scale, mean=tuple(p.image_mean), std=tuple(p.image_std))

    def read(self, item: object, *, folder: Folder, place: str) -> Tensor:
        """One image's pixels (c, h, w), uint8. `item` is encoded bytes, a path, or both by name.

        Raises:
            TrainingError: the file cannot be read, or Pillow cannot decode it.
        """
        image = decoded(_encoded(item, folder=folder, place=place), mode=self._mode, place=place)
        if self._processor is not None:
            found = self._processor(
                images=image, do_rescale=False, do_normalize=False, return_tensors="np"
            )
            pixels = np.asarray(found["pixel_values"][0])
        else:
            bilinear = _pillow().Resampling.BILINEAR
            resized = image.resize((self._size[1], self._size[0]), bilinear)
            pixels = np.atleast_3d(np.asarray(resized)).transpose(2, 0, 1)
        return torch.from_numpy(np.clip(np.rint(pixels), 0, 255).astype(np.uint8))


def is_image_column(kind: pa.DataType) -> bool:
    """Whether a column can hold images: bytes, paths, or {bytes, path} as `datasets` writes."""
    if pa.types.is_struct(kind):
        return bool({field.name for field in kind} & {"bytes", "path"})
    checks = (
        pa.types.is_binary, pa.types.is_large_binary, pa.types.is_string, pa.types.is_large_string
    )  # fmt: skip
    return any(check(kind) for check in checks)


def read_images(
    items: Sequence[object], *, base: Checkpoint, folder: Folder, places: Sequence[str]
) -> tuple[Tensor, Scaling]:
    """Pixels (b, c, h, w), uint8, and their scaling. Raises: TrainingError, as `read`, or if the
    processor leaves images of several sizes."""
    reader = ImageReader(base)
    pixels = [
        reader.read(item, folder=folder, place=place)
        for item, place in zip(items, places, strict=True)
    ]
    for image, place in zip(pixels, places, strict=True):
        if image.shape != pixels[0].shape:
            raise TrainingError(
                f"{place}: has shape {list(image.shape)} after resizing",
                f"{places[0]} has {list(pixels[0].shape)}; batches need one shape.",
                f"Set a fixed `size` or `crop_size` in the base's {PROCESSOR}.",
            )
    return torch.stack(pixels), reader.scaling


def _encoded(item: object, *, folder: Folder, place: str) -> bytes:
    if isinstance(item, dict):
        both = cast(dict[str, object], item)
        item = both.get("bytes") or both.get("path")
    if isinstance(item, bytes):
        return item
    if not isinstance(item, str) or not item:
        raise TrainingError(f"{place}: holds neither bytes nor a path", "", "Drop that row.")
    absolute = "://" in item or item.startswith("/")
    try:
        return (Folder.at(item) if absolute else folder.child(item)).read("")
    except (OSError, SvdmergeError) as error:
        raise TrainingError(
            f"{place}: its image {item} cannot be read", str(error), "Correct the path."
        ) from error


def decoded(data: bytes, *, mode: str, place: str) -> Any:
    """A Pillow image, upright. Raises: TrainingError, if Pillow cannot decode it."""
    pillow = _pillow()
    from PIL import ImageOps

    try:
        with pillow.open(io.BytesIO(data)) as image:
            # Cameras store how they were held; the picture is meant upright.
            return ImageOps.exif_transpose(image).convert(mode)
    # Pillow's decoders raise whatever a malformed file leads them to.
    except Exception as error:
        raise TrainingError(
            f"{place}: is no image that Pillow can decode",
            f"{type(error).__name__}: {error}".replace(" object at 0x", " at ").split(" at ")[0],
            "Give JPEG, PNG or another format it knows, or drop that row.",
        ) from error


def _load_processor(base: Checkpoint) -> Any:
    """The transformers image processor that the base names, on Pillow and numpy; None if none."""
    if base.folder.stat(PROCESSOR) is None:
        return None
    from transformers import AutoImageProcessor

    try:
        json.loads(base.folder.read(PROCESSOR))
        with local_copy(base) as path:
            return AutoImageProcessor.from_pretrained(
                path, local_files_only=True, trust_remote_code=False, backend="pil"
            )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise TrainingError(
            f"{base.reference}: its {PROCESSOR} cannot be used",
            str(error).splitlines()[0] if str(error) else type(error).__name__,
            "Correct the file, or remove it to resize to the model's image_size.",
        ) from error


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError:
        raise TrainingError(
            "task: image needs Pillow, which is not installed", "", "pip install 'svdmerge[hf]'"
        ) from None
    return Image
