"""Decodes crops of encoded images on the CPU: JPEGs with nvImageCodec, all else with Pillow."""

import numpy as np
import torch
from torch.nn.functional import interpolate

from distrain.data.image import ImageError, decode_rgb
from distrain.data.jpeg import Pixels, jpeg_decoder
from distrain.data.storage.store import DataError


def decode(encoded: bytes) -> torch.Tensor:
    """Decode an image to uint8 [3, h, w] as stored, ignoring EXIF orientation. Raises DataError."""
    try:
        return torch.from_numpy(decode_rgb(encoded)).permute(2, 0, 1)
    except ImageError as error:
        raise DataError(f"cannot be decoded: {str(error)[:100]}") from error


def crop(encoded: bytes, image_height: int, image_width: int, top: int, left: int, height: int, width: int) -> Pixels:
    """Decode a crop box of an image of the given size to uint8 [height, width, 3], black outside the image.

    Raises DataError if it cannot be decoded.
    """
    first_row, last_row = max(top, 0), min(top + height, image_height)
    first_column, last_column = max(left, 0), min(left + width, image_width)
    rows, columns = max(last_row - first_row, 0), max(last_column - first_column, 0)
    region = decode_region(encoded, first_row, first_column, rows, columns)
    if (rows, columns) == (height, width):
        return region
    padded = np.zeros((height, width, 3), np.uint8)
    row, column = first_row - top, first_column - left
    padded[row : row + rows, column : column + columns] = region
    return padded


def resize(image: Pixels, size: int, interpolation: str, flip: bool) -> Pixels:
    """Resize uint8 [h, w, 3] to [size, size, 3], antialiased as in torchvision, and flip horizontally if `flip`."""
    # Each call into PyTorch releases the GIL and may then wait for other threads to get it back: make few calls.
    # It resizes twice as fast if the strides of a batch of one show the memory format; those of NumPy's image[None] do
    # not.
    pixels = torch.from_numpy(image)[None].permute(0, 3, 1, 2)
    if image.shape[:2] != (size, size):
        pixels = interpolate(pixels, (size, size), mode=interpolation, antialias=True)
    if flip:
        pixels = pixels.flip(-1)
    return pixels.permute(0, 2, 3, 1).numpy()[0]


def decode_region(encoded: bytes, top: int, left: int, height: int, width: int) -> Pixels:
    """Decode a region inside an image to uint8 [height, width, 3]. Raises DataError if it cannot be decoded."""
    if encoded.startswith(b"\xff\xd8") and height and width:
        region = jpeg_decoder.decode(encoded, top, left, height, width)
        if region is not None:
            return region
    return decode(encoded).permute(1, 2, 0).numpy()[top : top + height, left : left + width]
