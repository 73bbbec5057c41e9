"""Pixel augmentation of a whole batch, for a GPU: the same as that of pixels.py, to the bit on a CPU.

What differs between images is drawn on the host and sent to the device in one copy, so that nothing waits for the
device, and an operation is launched once for all images that it changes.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from distrain.config import AugmentConfig
from distrain.data.augmentation import operations
from distrain.data.augmentation.pixels import DRAWS, erased_box, lighting_shift, mean_color
from distrain.data.augmentation.policies import Change, Plan, find_policy
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
    height, width = images.shape[2:]
    columns = iter(uniform(seed, Stream.PIXELS, *samples.T[:, :, None], np.arange(DRAWS)).T)
    steps: list[Step] = []
    if policy := find_policy(augment):
        plans = [policy.plan(draws, height, width) for draws in _take(columns, policy.draws).tolist()]
        if any(plan.weights for plan in plans):
            images = _mix_chains(images, plans)
        else:
            steps += plan_changes([plan.chains[0] for plan in plans], height, width)
    return apply_steps(images, [*steps, *_plan(height, width, augment, mean, columns, len(samples))])


def _take(columns: Iterator[NDArray[np.float64]], count: int) -> NDArray[np.float64]:
    """The next `count` columns, [n, count]."""
    return np.stack([*islice(columns, count)], axis=1)


def _mix_chains(images: torch.Tensor, plans: Sequence[Plan]) -> torch.Tensor:
    """Mix images with what each chain of their plans makes of them."""
    height, width = images.shape[2:]
    weights = Step(operations.identity, range(len(plans)), np.array([plan.weights for plan in plans]))
    _, original, *others = (value.view(-1, 1, 1, 1) for value in next(_send([weights], images.device)))
    mixed = images * original
    for number, weight in enumerate(others):
        steps = plan_changes([plan.chains[number] for plan in plans], height, width)
        mixed = mixed + apply_steps(images, list(steps)) * weight
    return mixed.to(torch.uint8)


def plan_changes(chains: Sequence[Sequence[Change]], height: int, width: int) -> Iterator[Step]:
    """Yield steps that apply to each image its chain of changes: one for all images of which the same operation is the
    next."""
    for depth in range(max(map(len, chains), default=0)):
        rows: dict[operations.Operation, list[int]] = defaultdict(list)
        values: dict[operations.Operation, list[tuple[float, ...]]] = defaultdict(list)
        for row, chain in enumerate(chains):
            if depth < len(chain) and chain[depth].name != "identity":
                operation, arguments = _OPERATIONS[chain[depth].name]
                rows[operation].append(row)
                values[operation].append(arguments(chain[depth].value, height, width))
        for operation, changed in rows.items():
            yield Step(operation, changed, np.array(values[operation]))


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
    height: int,
    width: int,
    augment: AugmentConfig,
    mean: list[float],
    columns: Iterator[NDArray[np.float64]],
    count: int,
) -> Iterator[Step]:
    """Yield what is configured beside a policy for `count` images, by uniform draws in [0, 1), `columns` of [count]."""
    for strength, operation in zip(augment.color_jitter, _JITTERS, strict=True):
        if strength:
            factor = 1 + strength * (2 * _take(columns, 1) - 1)
            yield Step(operation, np.arange(count), np.hstack([factor, 1 - factor]))
    if augment.lighting:
        # One product per image: in a product of matrices, rounding would depend on the size of the batch.
        shifts = [lighting_shift(augment.lighting, values) for values in _take(columns, 6)]
        yield Step(operations.shift_colors, np.arange(count), np.array(shifts))
    if augment.erase:
        (rows,) = np.nonzero(_take(columns, 1)[:, 0] < augment.erase)
        boxes = [erased_box(height, width, *values) for values in _take(columns, 4)[rows].tolist()]
        color = mean_color(mean).flatten().tolist()
        yield Step(partial(operations.fill_boxes, boxes), rows, np.array([color] * len(rows)))


def _rotation(degrees: float) -> tuple[float, ...]:
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return cos, -sin, 0, sin, cos, 0


_Arguments = Callable[[float, int, int], tuple[float, ...]]
_OPERATIONS: dict[str, tuple[operations.Operation, _Arguments]] = {
    # Shear is about the corner.
    "shear_x": (operations.transform, lambda tangent, h, w: (1, tangent, tangent * h / 2, 0, 1, 0)),
    "shear_y": (operations.transform, lambda tangent, h, w: (1, 0, 0, tangent, 1, tangent * w / 2)),
    "translate_x": (operations.transform, lambda pixels, h, w: (1, 0, -pixels, 0, 1, 0)),
    "translate_y": (operations.transform, lambda pixels, h, w: (1, 0, 0, 0, 1, -pixels)),
    "rotate": (operations.transform, lambda degrees, h, w: _rotation(degrees)),
    "brightness": (operations.adjust_brightness, lambda factor, h, w: (factor, 1 - factor)),
    "saturation": (operations.adjust_saturation, lambda factor, h, w: (factor, 1 - factor)),
    "contrast": (operations.adjust_contrast, lambda factor, h, w: (factor, 1 - factor)),
    "sharpness": (operations.adjust_sharpness, lambda factor, h, w: (factor, 1 - factor)),
    "posterize": (operations.posterize, lambda bits, h, w: (256 - (1 << (8 - int(bits))),)),
    "solarize": (operations.solarize, lambda threshold, h, w: (threshold,)),
    "autocontrast": (operations.autocontrast, lambda value, h, w: ()),
    "equalize": (operations.equalize, lambda value, h, w: ()),
    "invert": (operations.invert, lambda value, h, w: ()),
}
_JITTERS = (operations.adjust_brightness, operations.adjust_contrast, operations.adjust_saturation)
