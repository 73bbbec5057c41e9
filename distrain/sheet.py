"""Contact sheets: images in a grid, each with a caption."""

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from distrain.errors import UserError
from distrain.files import write_atomically

_CAPTION = 16  # pixels below each image
_MIN_TILE = 96  # pixels, so that captions fit


def write_sheet(path: Path, images: Sequence[NDArray[np.uint8]], captions: Sequence[str]) -> None:
    """Write square images, uint8 [h, h, 3] of one size, as a PNG with a caption below each; small ones are enlarged.

    Raises UserError if the file cannot be written.
    """
    from PIL import Image, ImageDraw, ImageFont

    side = images[0].shape[0]
    tile = side * max(1, -(-_MIN_TILE // side))
    columns = min(len(images), max(1, int(np.ceil(np.sqrt(len(images) * 1.5)))))
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * (tile + 4) + 4, rows * (tile + 4 + _CAPTION) + 4), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    for number, (image, caption) in enumerate(zip(images, captions, strict=True)):
        left, top = 4 + number % columns * (tile + 4), 4 + number // columns * (tile + 4 + _CAPTION)
        sheet.paste(Image.fromarray(image).resize((tile, tile), Image.Resampling.NEAREST), (left, top))
        while draw.textlength(caption, font) > tile:
            caption = caption.rstrip("…")[:-1] + "…"
        draw.text((left, top + tile), caption, "black", font)
    try:
        png = BytesIO()
        sheet.save(png, "PNG")
        write_atomically(path, png.getvalue(), durable=False)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from error
