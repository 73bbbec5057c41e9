"""Decodes images with Pillow, checks that they can be decoded, and reads their size."""

from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL import Image

FORMATS = ("JPEG", "PNG", "WEBP")  # what every loader decodes
MAX_PIXELS = 100_000_000  # a file of a few kilobytes can claim more and exhaust the memory
_SUFFIXES = {b"\xff\xd8": "jpg", b"\x89P": "png", b"RI": "webp"}


class ImageError(Exception):
    """Bytes that are not an image we can train on; the message is the reason."""


def suffix_of(data: bytes) -> str:
    """Return the usual suffix of an encoded image that can be decoded: jpg, png or webp."""
    return _SUFFIXES[data[:2]]


def decode_rgb(data: bytes) -> "NDArray[np.uint8]":
    """Decode an image to uint8 [h, w, 3] as stored: no EXIF orientation, alpha dropped. Raises ImageError."""
    import numpy as np
    from PIL import Image

    with _open(data) as image:
        if image.mode.startswith("I"):  # 16 bits of gray, which convert() would clip at 255
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        return np.array(image.convert("RGB"))


def measure(data: bytes, decode: bool = True) -> tuple[int, int, str]:
    """Return the width and height of an encoded image in pixels as stored, and its mode as Pillow names it: L, RGBA ...

    Raises ImageError if it cannot be decoded. Without `decode` only the header is checked.
    """
    with _open(data) as image:
        width, height, mode = *image.size, image.mode
        if decode:
            image.draft("L", (1, 1))  # an eighth of the size: parses all bytes, skips most arithmetic
            image.load()
        return width, height, mode


@contextmanager
def _open(data: bytes) -> Iterator["Image.Image"]:
    """Open an image and check its header. Raises ImageError, also in place of what Pillow raises in the block."""
    from PIL import Image, UnidentifiedImageError

    if not data:
        raise ImageError("empty file")
    try:
        with Image.open(BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise ImageError(f"{width} x {height} pixels exceed the limit of {MAX_PIXELS:,}")
            if image.format == "WEBP" and image.n_frames > 1:  # type: ignore[attr-defined]
                raise ImageError(f"animated, {image.n_frames} frames")  # type: ignore[attr-defined]
            yield image
    except ImageError:
        raise
    except UnidentifiedImageError as error:
        raise ImageError(f"not a {', '.join(FORMATS)} image") from error
    except Exception as error:  # Pillow's parsers raise anything: SyntaxError, ValueError, struct.error, ...
        raise ImageError(" ".join(str(error).split()) or type(error).__name__) from error
