"""The handwritten digits of scikit-learn as tables of encoded images."""

from io import BytesIO

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from svdmerge.demo_models import SIDE, digit_images
from svdmerge.storage.filesystem import Folder
from svdmerge.training.pictures import png_bytes


def write_digits(out: Folder, *, num_train: int) -> tuple[str, str]:
    """Places of the training and the test table: the images in the order they ship in."""
    images, digits = digit_images()
    pixels = (255 * images).round().to(torch.uint8).view(-1, SIDE, SIDE, 1)
    places: list[str] = []
    for name, rows in (("train", slice(num_train)), ("test", slice(num_train, None))):
        table = pa.table({
            "image": [png_bytes(image) for image in pixels[rows]],
            "label": pa.array(digits[rows].numpy(), type=pa.int64()),
        })  # fmt: skip
        buffer = BytesIO()
        pq.write_table(table, buffer)
        out.put(f"{name}.parquet", buffer.getvalue())
        places.append(out.child(f"{name}.parquet").uri)
    return places[0], places[1]
