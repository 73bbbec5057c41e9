"""Checks that an encoded image can be decoded, and reads its size."""

from io import BytesIO

FORMATS = ("JPEG", "PNG", "WEBP")  # what every loader decodes
MAX_PIXELS = 100_000_000  # a file of a few kilobytes can claim more and exhaust the memory
_SUFFIXES = {b"\xff\xd8": "jpg", b"\x89P": "png", b"RI": "webp"}


class ImageError(Exception):
    """Bytes that are not an image we can train on; the message is the reason."""


def check(data: bytes) -> str:
    """Decode an encoded image and return its usual suffix: jpg, png or webp. Raises ImageError."""
    measure(data)
    return _SUFFIXES[data[:2]]


def measure(data: bytes, decode: bool = True) -> tuple[int, int]:
    """Return the width and height of an encoded image in pixels as stored.

    Raises ImageError if it cannot be decoded. Without `decode` only the header is checked.
    """
    from PIL import Image, UnidentifiedImageError

    if not data:
        raise ImageError("empty file")
    try:
        with Image.open(BytesIO(data), formats=FORMATS) as image:
            size = image.size
            if size[0] * size[1] > MAX_PIXELS:
                raise ImageError(f"{size[0]} x {size[1]} pixels exceed the limit of {MAX_PIXELS:,}")
            if image.format == "WEBP" and image.n_frames > 1:  # type: ignore[attr-defined]
                raise ImageError(f"animated, {image.n_frames} frames")  # type: ignore[attr-defined]
            if decode:
                image.draft("L", (1, 1))  # an eighth of the size: parses all bytes, skips most arithmetic
                image.load()
            return size
    except ImageError:
        raise
    except UnidentifiedImageError as error:
        raise ImageError(f"not a {', '.join(FORMATS)} image") from error
    except Exception as error:  # Pillow's parsers raise anything: SyntaxError, ValueError, struct.error, ...
        raise ImageError(" ".join(str(error).split()) or type(error).__name__) from error
