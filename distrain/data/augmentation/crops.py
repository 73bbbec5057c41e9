"""Which part of each image the network sees: a pure function of (seed, sample id, epoch, copy, width, height).

A window is given in pixels of the stored image and may reach outside of it, where it is black. The loaders
cut it out, resize it to the size of the epoch and mirror it; all of them are given the same windows.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from distrain.config import AugmentConfig, DataConfig
from distrain.data.sampling.plan import LaneBatch
from distrain.rng import Stream, uniform

_ATTEMPTS = 10  # torchvision's RandomResizedCrop tries as often before it falls back to the centre


class CropBoxes(NamedTuple):
    """Parts of n images, int32 [n] each in pixels, and whether to mirror them, bool [n]."""

    top: NDArray[np.int32]
    left: NDArray[np.int32]
    height: NDArray[np.int32]
    width: NDArray[np.int32]
    flip: NDArray[np.bool_]


def draw_crop_boxes(
    augment: AugmentConfig,
    data: DataConfig,
    seed: int,
    batch: LaneBatch,
    widths: NDArray[np.int32],
    heights: NDArray[np.int32],
) -> CropBoxes:
    """The training windows of a lane's samples, whose images are so wide and high."""
    flip = uniform(seed, Stream.FLIP, *batch) < augment.flip
    if augment.crop == "pad":
        shifts = 2 * augment.crop_pad + 1
        top, left = (np.floor(uniform(seed, Stream.CROP, *batch, axis) * shifts) - augment.crop_pad for axis in (0, 1))
        return _crop_boxes(top, left, heights, widths, flip)
    if augment.crop == "none":
        return center_crop_boxes(data, widths, heights)._replace(flip=flip)
    return _draw_resized(augment, seed, batch, widths, heights)._replace(flip=flip)


def size_at(data: DataConfig, epoch: float) -> int:
    """The side of training images when so many epochs are done, pixels."""
    begun = [size for start, size in data.size_schedule if start <= epoch]
    return int(begun[-1]) if begun else data.image_size


def center_crop_boxes(data: DataConfig, widths: NDArray[np.int32], heights: NDArray[np.int32]) -> CropBoxes:
    """The validation windows: what a resize of the short side and a centre crop would leave."""
    side = np.minimum(widths, heights) * (data.image_size / data.val_resize)
    side = np.maximum(1, np.rint(side))
    return _crop_boxes((heights - side) // 2, (widths - side) // 2, side, side, np.zeros(len(widths), bool))


def _draw_resized(
    augment: AugmentConfig, seed: int, batch: LaneBatch, widths: NDArray[np.int32], heights: NDArray[np.int32]
) -> CropBoxes:
    """A share of the area at a log-uniform aspect ratio (Szegedy et al. 2015, as torchvision draws it)."""
    attempt = np.arange(_ATTEMPTS)[:, None]

    def draw(number: int) -> NDArray[np.float64]:
        return uniform(seed, Stream.CROP, *batch, attempt, number)

    smallest, largest = augment.crop_scale
    widths, heights = np.maximum(widths, 1), np.maximum(heights, 1)  # 0 for an unreadable image
    area = widths * heights.astype(np.float64) * (smallest + draw(0) * (largest - smallest))
    narrowest, widest = np.log(augment.crop_ratio)
    ratio = np.exp(narrowest + draw(1) * (widest - narrowest))
    w = np.rint(np.sqrt(area * ratio))
    h = np.rint(np.sqrt(area / ratio))
    fits = (w > 0) & (w <= widths) & (h > 0) & (h <= heights)

    column = np.arange(len(batch.ids))
    first = np.argmax(fits, axis=0)  # 0 where none fits, mended below
    w, h = w[first, column], h[first, column]
    top = np.floor(draw(2)[first, column] * (heights - h + 1))
    left = np.floor(draw(3)[first, column] * (widths - w + 1))

    whole_ratio = np.clip(widths / heights, augment.crop_ratio[0], augment.crop_ratio[1])
    fallback_w = np.minimum(widths, np.rint(heights * whole_ratio))
    fallback_h = np.minimum(heights, np.rint(widths / whole_ratio))
    found = fits.any(axis=0)
    w, h = np.where(found, w, fallback_w), np.where(found, h, fallback_h)
    top = np.where(found, top, (heights - h) // 2)
    left = np.where(found, left, (widths - w) // 2)
    return _crop_boxes(top, left, h, w, np.zeros(len(batch.ids), bool))


def _crop_boxes(
    top: ArrayLike, left: ArrayLike, height: ArrayLike, width: ArrayLike, flip: NDArray[np.bool_]
) -> CropBoxes:
    top, left, height, width = (np.asarray(values).astype(np.int32) for values in (top, left, height, width))
    return CropBoxes(top, left, height, width, flip)
