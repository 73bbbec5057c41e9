"""Crop boxes and flips: pure functions of (seed, sample id, epoch, repeat index, width, height).

A crop box is in pixels of the stored image and may extend beyond it, where pixels are black. Every loader crops to the
same boxes, resizes to the image size of the step and flips.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from distrain.config import AugmentConfig, DataConfig
from distrain.data.sampling.plan import LaneBatch
from distrain.rng import Stream, uniform

_ATTEMPTS = 10  # as many as torchvision's RandomResizedCrop makes before it falls back to the center


class CropBoxes(NamedTuple):
    """Crop boxes of n images, int32 [n] each in pixels, and whether to flip horizontally, bool [n]."""

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
    """Draw the training crops of a lane's samples. `widths` and `heights` are those of the images, [n]."""
    flip = uniform(seed, Stream.FLIP, *batch) < augment.flip
    if augment.crop == "pad":
        shifts = 2 * augment.crop_pad + 1
        top, left = (np.floor(uniform(seed, Stream.CROP, *batch, axis) * shifts) - augment.crop_pad for axis in (0, 1))
        return _crop_boxes(top, left, heights, widths, flip)
    if augment.crop == "none":
        return center_crop_boxes(data, widths, heights)._replace(flip=flip)
    return _draw_resized(augment, seed, batch, widths, heights)._replace(flip=flip)


def size_at(data: DataConfig, epoch: float, epochs: float) -> int:
    """Return the side of training images after `epoch` epochs of a run of `epochs`, pixels."""
    position = epoch / epochs if data.size_unit == "run" else epoch
    started = [size for start, size in data.size_schedule if start <= position]
    return int(started[-1]) if started else data.image_size


def center_crop_boxes(data: DataConfig, widths: NDArray[np.int32], heights: NDArray[np.int32]) -> CropBoxes:
    """Return the validation crops: what resizing the short side and then center-cropping would keep."""
    side = np.minimum(widths, heights) * (data.image_size / data.val_resize)
    side = np.maximum(1, np.rint(side))
    return _crop_boxes((heights - side) // 2, (widths - side) // 2, side, side, np.zeros(len(widths), bool))


def _draw_resized(
    augment: AugmentConfig, seed: int, batch: LaneBatch, widths: NDArray[np.int32], heights: NDArray[np.int32]
) -> CropBoxes:
    """Draw a fraction of the area at a log-uniform aspect ratio (Szegedy et al. 2015), as torchvision does."""
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
    first = np.argmax(fits, axis=0)  # 0 where none fits, replaced below
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
