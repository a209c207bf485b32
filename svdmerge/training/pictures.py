"""Sample grids as PNG files, written without an image library."""

import struct
import zlib

import torch
import torch.nn.functional as F
from torch import Tensor


def grid(images: Tensor, *, columns: int, scale: int = 1) -> Tensor:
    """One picture (height, width, channels), uint8, of images (n, channels, h, w) from -1 to 1.

    Row by row, a dark pixel between; every pixel becomes `scale` x `scale`.
    """
    pixels = ((images.clamp(-1.0, 1.0) + 1.0) * 127.5).round().to(torch.uint8)
    pixels = F.pad(pixels, (0, 1, 0, 1))
    missing = -len(pixels) % columns
    pixels = torch.cat([pixels, pixels.new_zeros(missing, *pixels.shape[1:])])
    rows = pixels.unflatten(0, (-1, columns))  # (rows, columns, channels, h, w)
    picture = rows.permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)
    return picture.repeat_interleave(scale, dim=0).repeat_interleave(scale, dim=1)


def png_bytes(picture: Tensor) -> bytes:
    """A PNG file of a picture (height, width, 1 or 3 channels), uint8.

    Reference: ISO/IEC 15948, sections 5 and 11; every line unfiltered.
    """
    height, width, channels = picture.shape
    lines = F.pad(picture.flatten(1), (1, 0)).contiguous().numpy().tobytes()
    colour = 0 if channels == 1 else 2
    header = struct.pack(">IIBBBBB", width, height, 8, colour, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(lines, 9)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(kind, data) for kind, data in chunks)


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
