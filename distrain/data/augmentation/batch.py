"""Pixel augmentation of a whole batch, for a GPU: the same as that of pixels.py, to the bit on a CPU.

What differs between images is drawn on the host and sent to the device in one copy, so that nothing waits for the
device, and an operation is launched once for all images that it changes.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from distrain.config import AugmentConfig
from distrain.data.augmentation import operations
from distrain.data.augmentation.pixels import BINS, erased_box, lighting_shift, mean_color, shift_pixels
from distrain.rng import Stream, uniform


class Step(NamedTuple):
    """An operation on the images `rows` of a batch, [m] in ascending order, with its arguments, [m, k]."""

    operation: operations.Operation
    rows: Sequence[int] | NDArray[np.int64]
    values: NDArray[np.float64]


def augment_batch(
    images: torch.Tensor, augment: AugmentConfig, mean: list[float], seed: int, samples: NDArray[np.int64]
) -> torch.Tensor:
    """Augment images, uint8 [n, 3, h, w], as configured. `samples`: [n, 3], each image's (id, epoch, repeat index)."""
    draws = uniform(seed, Stream.PIXELS, *samples.T[:, :, None], np.arange(24))
    return apply_steps(images, list(_plan(images.shape[2], images.shape[3], augment, mean, draws)))


def apply_steps(images: torch.Tensor, steps: Sequence[Step]) -> torch.Tensor:
    """Apply operations one after the other. Leaves `images` unchanged."""
    steps = [step for step in steps if len(step.rows)]
    for step, (rows, *values) in zip(steps, _send(steps, images.device), strict=True):
        values = [value.view(-1, 1, 1, 1) for value in values]
        if len(rows) == len(images):
            images = step.operation(images, *values)
        else:
            rows = rows.long()
            images = images.index_copy(0, rows, step.operation(images[rows], *values))
    return images


def _send(steps: Sequence[Step], device: torch.device) -> Iterator[torch.Tensor]:
    """Yield float32 [1 + k, m] for each step on the device: its rows, and its arguments."""
    tables = [np.array([step.rows, *step.values.T], np.float32) for step in steps]
    packed = torch.from_numpy(np.concatenate([np.empty(0, np.float32), *(table.ravel() for table in tables)]))
    if device.type == "cuda":
        packed = packed.pin_memory().to(device, non_blocking=True)
    for table, sent in zip(tables, packed.split([table.size for table in tables]), strict=True):
        yield sent.view(table.shape)


def _plan(
    height: int, width: int, augment: AugmentConfig, mean: list[float], draws: NDArray[np.float64]
) -> Iterator[Step]:
    """Yield what is configured, by each image's uniform draws in [0, 1), [n, 24]."""
    columns = iter(draws.T)

    def take(count: int) -> NDArray[np.float64]:
        return np.stack([*islice(columns, count)], axis=1)

    if augment.auto_augment == "ta_wide":
        yield from plan_trivial_augment(height, width, take(3))
    for strength, operation in zip(augment.color_jitter, _JITTERS, strict=True):
        if strength:
            factor = 1 + strength * (2 * take(1) - 1)
            yield Step(operation, np.arange(len(draws)), np.hstack([factor, 1 - factor]))
    if augment.lighting:
        # One product per image: in a product of matrices, rounding would depend on the size of the batch.
        shifts = [lighting_shift(augment.lighting, values) for values in take(6)]
        yield Step(operations.shift_colors, np.arange(len(draws)), np.array(shifts))
    if augment.erase:
        (rows,) = np.nonzero(take(1)[:, 0] < augment.erase)
        boxes = [erased_box(height, width, *values) for values in take(4)[rows].tolist()]
        color = mean_color(mean).flatten().tolist()
        yield Step(partial(operations.fill_boxes, boxes), rows, np.array([color] * len(rows)))


def plan_trivial_augment(height: int, width: int, draws: NDArray[np.float64]) -> Iterator[Step]:
    """Yield one operation per image (Mueller and Hutter 2021, table 7, "wide"). `draws`: [n, 3] uniform draws in
    [0, 1), which select the operation, its magnitude and its sign."""
    chosen, bins = (draws[:, :2] * [len(_TRIVIAL), BINS]).astype(int).T
    signs = np.where(draws[:, 2] < 0.5, 1.0, -1.0)
    values = [
        _TRIVIAL[number][1](bin / (BINS - 1), sign, height, width)
        for number, bin, sign in zip(chosen.tolist(), bins.tolist(), signs.tolist(), strict=True)
    ]
    for operation in dict.fromkeys(operation for operation, _ in _TRIVIAL[1:]):  # the first changes nothing
        rows = [row for row, number in enumerate(chosen) if _TRIVIAL[number][0] is operation]
        yield Step(operation, rows, np.array([values[row] for row in rows]))


def _factor(factor: float) -> tuple[float, float]:
    return factor, 1 - factor


def _rotation(degrees: float) -> tuple[float, ...]:
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return cos, -sin, 0, sin, cos, 0


def _kept_bits(bits: int) -> int:
    return 256 - (1 << (8 - bits))


_Arguments = Callable[[float, float, int, int], tuple[float, ...]]
_TRIVIAL: tuple[tuple[operations.Operation, _Arguments], ...] = (
    (operations.identity, lambda m, s, h, w: ()),
    # Shear is about the corner.
    (operations.transform, lambda m, s, h, w: (1, 0.99 * m * s, 0.99 * m * s * h / 2, 0, 1, 0)),
    (operations.transform, lambda m, s, h, w: (1, 0, 0, 0.99 * m * s, 1, 0.99 * m * s * w / 2)),
    (operations.transform, lambda m, s, h, w: (1, 0, -shift_pixels(m, s), 0, 1, 0)),
    (operations.transform, lambda m, s, h, w: (1, 0, 0, 0, 1, -shift_pixels(m, s))),
    (operations.transform, lambda m, s, h, w: _rotation(135 * m * s)),
    (operations.adjust_brightness, lambda m, s, h, w: _factor(1 + 0.99 * m * s)),
    (operations.adjust_saturation, lambda m, s, h, w: _factor(1 + 0.99 * m * s)),
    (operations.adjust_contrast, lambda m, s, h, w: _factor(1 + 0.99 * m * s)),
    (operations.adjust_sharpness, lambda m, s, h, w: _factor(1 + 0.99 * m * s)),
    (operations.posterize, lambda m, s, h, w: (_kept_bits(8 - round(6 * m)),)),
    (operations.solarize, lambda m, s, h, w: (255 * (1 - m),)),
    (operations.autocontrast, lambda m, s, h, w: ()),
    (operations.equalize, lambda m, s, h, w: ()),
)
_JITTERS = (operations.adjust_brightness, operations.adjust_contrast, operations.adjust_saturation)
