"""Sample grids, read back by an independent decoder."""

import io

import numpy as np
import torch
from PIL import Image

from svdmerge.training.pictures import grid, png_bytes


def test_a_grid_places_images_row_by_row_with_a_dark_line_between() -> None:
    images = torch.stack([torch.full((3, 2, 2), value) for value in (-1.0, 0.0, 1.0)])
    picture = grid(images, columns=2)
    assert picture.shape == (6, 6, 3)
    assert picture[:2, 3:5].unique().tolist() == [128]  # the second image
    assert picture[3:5, :2].unique().tolist() == [255]  # the third, in the next row
    assert not picture[2].any()
    assert not picture[:, 5].any()
    assert not picture[3:, 3:].any()  # no fourth


def test_pillow_reads_the_same_pixels_in_grey_and_colour() -> None:
    generator = torch.Generator().manual_seed(0)
    for channels in (1, 3):
        pixels = torch.randint(256, (5, 7, channels), generator=generator).to(torch.uint8)
        found = np.asarray(Image.open(io.BytesIO(png_bytes(pixels))))
        assert np.array_equal(found.reshape(5, 7, channels), pixels.numpy())


def test_pixels_beyond_the_range_are_clamped_and_enlarged_ones_repeat() -> None:
    picture = grid(torch.tensor([[[[-9.0, 9.0]]]]), columns=1, scale=2)
    assert picture[:2, :, 0].tolist() == [[0, 0, 255, 255, 0, 0]] * 2
