"""Pixel augmentation after crop, resize and flip: a pure function of (seed, sample id, epoch, repeat index). Works on
one image, uint8 [3, h, w], which is fast on a CPU; see batch.py for a GPU."""

import math
from collections.abc import Callable
from functools import reduce

import numpy as np
import torch
from numpy.typing import NDArray
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from distrain.config import AugmentConfig
from distrain.data.augmentation.policies import Change, Plan, find_policy
from distrain.rng import Stream, uniform

DRAWS = 64  # of an image, more than all of it takes
_NEAREST = InterpolationMode.NEAREST

# Principal components of color over ImageNet (Krizhevsky et al. 2012, section 4.1), RGB in [0, 1]: stds and axes.
_LIGHTING_STD = np.array([0.2175, 0.0188, 0.0045])
_LIGHTING_AXES = np.array([[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]])


def augments_pixels(augment: AugmentConfig) -> bool:
    """Whether the configuration enables anything in this module."""
    return augment.auto_augment != "none" or any(augment.color_jitter) or augment.lighting > 0 or augment.erase > 0


def augment_pixels(
    image: torch.Tensor, augment: AugmentConfig, mean: list[float], seed: int, sample: tuple[int, int, int]
) -> torch.Tensor:
    """Augment one image as configured; `sample` is (id, epoch, repeat index)."""
    draws = iter(uniform(seed, Stream.PIXELS, *sample, np.arange(DRAWS)).tolist())
    if policy := find_policy(augment):
        image = apply_plan(image, policy.plan([next(draws) for _ in range(policy.draws)], *image.shape[1:]))
    for strength, adjust in zip(augment.color_jitter, _JITTERS, strict=True):
        if strength:
            image = adjust(image, 1 + strength * (2 * next(draws) - 1))
    if augment.lighting:
        image = shift_lighting(image, augment.lighting, np.array([next(draws) for _ in range(6)]))
    if augment.erase and next(draws) < augment.erase:
        image = erase_box(image, mean, *(next(draws) for _ in range(4)))
    return image


_JITTERS: tuple[Callable[[torch.Tensor, float], torch.Tensor], ...] = (
    F.adjust_brightness,
    F.adjust_contrast,
    F.adjust_saturation,
)


def apply_plan(image: torch.Tensor, plan: Plan) -> torch.Tensor:
    """Apply the changes of a policy to one image."""
    changed = [reduce(apply_change, chain, image) for chain in plan.chains]
    if not plan.weights:
        return changed[0]
    mixed = image * plan.weights[0]
    for one, weight in zip(changed, plan.weights[1:], strict=True):
        mixed = mixed + one * weight
    return mixed.to(torch.uint8)


def apply_change(image: torch.Tensor, change: Change) -> torch.Tensor:
    """Apply one operation to one image."""
    return _OPERATIONS[change.name](image, change.value)


def _affine(image: torch.Tensor, dx: float = 0, dy: float = 0, sx: float = 0.0, sy: float = 0.0) -> torch.Tensor:
    shear = [math.degrees(math.atan(sx)), math.degrees(math.atan(sy))]
    corner = [0.0, 0.0] if sx or sy else None  # shear is about the corner
    return F.affine(image, 0.0, [int(dx), int(dy)], 1.0, shear, interpolation=_NEAREST, center=corner)


_OPERATIONS: dict[str, Callable[[torch.Tensor, float], torch.Tensor]] = {
    "identity": lambda image, value: image,
    "shear_x": lambda image, tangent: _affine(image, sx=tangent),
    "shear_y": lambda image, tangent: _affine(image, sy=tangent),
    "translate_x": lambda image, pixels: _affine(image, dx=pixels),
    "translate_y": lambda image, pixels: _affine(image, dy=pixels),
    "rotate": lambda image, degrees: F.rotate(image, degrees, interpolation=_NEAREST),
    "brightness": F.adjust_brightness,
    "saturation": F.adjust_saturation,
    "contrast": F.adjust_contrast,
    "sharpness": lambda image, factor: F.adjust_sharpness(image[None], factor)[0],  # in a batch: five times as fast
    "posterize": lambda image, bits: F.posterize(image, int(bits)),
    "solarize": F.solarize,
    "autocontrast": lambda image, value: F.autocontrast(image),
    "equalize": lambda image, value: F.equalize(image),
    "invert": lambda image, value: F.invert(image),
}


def shift_lighting(image: torch.Tensor, std: float, draws: np.ndarray) -> torch.Tensor:
    """Add a normal multiple, of standard deviation `std`, of each principal component of color. `draws`: six uniform
    numbers in [0, 1)."""
    shift = torch.tensor(lighting_shift(std, draws), dtype=torch.float32, device=image.device).view(3, 1, 1)
    return (image + shift).round_().clamp_(0, 255).to(torch.uint8)


def lighting_shift(std: float, draws: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return what lighting adds to a color, [3]."""
    normal = np.sqrt(-2 * np.log1p(-draws[:3])) * np.cos(2 * np.pi * draws[3:])  # Box and Muller 1958
    return np.asarray(255 * _LIGHTING_AXES @ (std * normal * _LIGHTING_STD))


def erase_box(
    image: torch.Tensor, mean: list[float], area: float, ratio: float, top: float, left: float
) -> torch.Tensor:
    """Fill a box of 2 to 33 % of the area and height / width of 0.3 to 3.3 with the mean color (random erasing,
    Zhong et al. 2020). The last four arguments are uniform draws in [0, 1)."""
    rows, columns = erased_box(image.shape[-2], image.shape[-1], area, ratio, top, left)
    erased = image.clone()
    erased[:, rows, columns] = mean_color(mean).to(image.device)
    return erased


def erased_box(height: int, width: int, area: float, ratio: float, top: float, left: float) -> tuple[slice, slice]:
    """Return the rows and columns to erase; arguments as of `erase_box`."""
    pixels = (0.02 + 0.31 * area) * height * width
    shape = math.exp(math.log(0.3) + ratio * math.log(3.3 / 0.3))
    h = min(height, max(1, round(math.sqrt(pixels * shape))))
    w = min(width, max(1, round(math.sqrt(pixels / shape))))
    i, j = int(top * (height - h + 1)), int(left * (width - w + 1))
    return slice(i, i + h), slice(j, j + w)


def mean_color(mean: list[float]) -> torch.Tensor:
    """Return the color of erased boxes, uint8 [3, 1, 1]."""
    return torch.tensor(mean).mul(255).round().to(torch.uint8).view(3, 1, 1)
