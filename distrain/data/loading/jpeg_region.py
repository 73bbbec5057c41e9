"""Parts of encoded images on the CPU. Of a JPEG only the rows down to the last one asked for are read, and of these
only the ones asked for are turned into pixels: a third less work for the windows of RandomResizedCrop, by nvImageCodec,
which DALI brings along. Its pixels are those of torchvision, which does all else."""

import threading
import warnings

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import interpolate
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms.v2.functional import to_dtype

from distrain.data.storage.store import DataError

Pixels = NDArray[np.uint8]

with warnings.catch_warnings(action="ignore"):
    # PyTorch warns once per process that such a tensor may not be written to. None is here, and a copy of every image
    # would take a tenth of the time of decoding it.
    torch.frombuffer(b"0", dtype=torch.uint8)


def decode(encoded: bytes) -> torch.Tensor:
    """An encoded image as uint8 [3, h, w], as stored: EXIF orientation is ignored. Raises DataError if it is none."""
    try:
        image = decode_image(torch.frombuffer(encoded, dtype=torch.uint8), mode=ImageReadMode.RGB)
    except (RuntimeError, ValueError) as error:
        raise DataError(f"cannot be decoded: {' '.join(str(error).split())[:100]}") from error
    return to_dtype(image, torch.uint8, scale=True)  # a PNG may have 16 bits


def crop(encoded: bytes, image_height: int, image_width: int, top: int, left: int, height: int, width: int) -> Pixels:
    """A window of an encoded image of the given size, uint8 [height, width, 3], black where it lies outside of the
    image. Raises DataError if it is no image."""
    first_row, last_row = max(top, 0), min(top + height, image_height)
    first_column, last_column = max(left, 0), min(left + width, image_width)
    rows, columns = max(last_row - first_row, 0), max(last_column - first_column, 0)
    part = decode_region(encoded, first_row, first_column, rows, columns)
    if (rows, columns) == (height, width):
        return part
    window = np.zeros((height, width, 3), np.uint8)
    row, column = first_row - top, first_column - left
    window[row : row + rows, column : column + columns] = part
    return window


def resize(image: Pixels, size: int, interpolation: str, flip: bool) -> Pixels:
    """uint8 [h, w, 3] as [size, size, 3], as torchvision resizes it with antialiasing, and mirrored if told to."""
    # Each call of PyTorch lets go of the interpreter, which other threads then have to be waited for: so they are few.
    # It resizes twice as fast where the strides of a batch of one tell the memory format; NumPy's image[None] do not.
    pixels = torch.from_numpy(image)[None].permute(0, 3, 1, 2)
    if image.shape[:2] != (size, size):
        pixels = interpolate(pixels, (size, size), mode=interpolation, antialias=True)
    if flip:
        pixels = pixels.flip(-1)
    return pixels.permute(0, 2, 3, 1).numpy()[0]


def decode_region(encoded: bytes, top: int, left: int, height: int, width: int) -> Pixels:
    """A part that lies inside an encoded image, as uint8 [height, width, 3]. Raises DataError if it is no image."""
    if encoded.startswith(b"\xff\xd8") and height and width:
        part = jpegs.decode(encoded, top, left, height, width)
        if part is not None:
            return part
    return decode(encoded).permute(1, 2, 0).numpy()[top : top + height, left : left + width]


class _Jpegs(threading.local):
    """A decoder of each thread's own."""

    def __init__(self) -> None:
        try:
            from nvidia import nvimgcodec
        except ImportError:  # there is none for this system
            self._codec = None
            return
        self._codec = nvimgcodec
        self._decoder = nvimgcodec.Decoder(
            device_id=nvimgcodec.NVIMGCODEC_DEVICE_CPU_ONLY,
            max_num_cpu_threads=1,  # the calling one
            backends=[nvimgcodec.Backend(nvimgcodec.CPU_ONLY)],
            options="libjpeg_turbo_decoder:fancy_upsampling=1 libjpeg_turbo_decoder:fast_idct=0",  # as torchvision
        )
        self._params = nvimgcodec.DecodeParams(apply_exif_orientation=False, color_spec=nvimgcodec.ColorSpec.SRGB)

    def decode(self, encoded: bytes, top: int, left: int, height: int, width: int) -> Pixels | None:
        """A part of a JPEG as uint8 [height, width, 3], or None where this decoder does not manage it."""
        if self._codec is None:
            return None
        region = self._codec.Region(top, left, top + height, left + width)
        stream = self._codec.CodeStream(encoded).get_sub_code_stream(region=region)
        image = self._decoder.decode(stream, params=self._params)
        return None if image is None else np.asarray(image)


jpegs = _Jpegs()
