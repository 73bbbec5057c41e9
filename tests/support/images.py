"""Encoded images to build shards from."""

import io

import numpy as np
from PIL import Image


def encoded(seed, format="JPEG", size=(12, 9)):
    out = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(out, format)
    return out.getvalue()
