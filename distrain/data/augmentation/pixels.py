"""Pixel augmentation after crop, resize and flip: a pure function of (seed, sample id, epoch, repeat index). Works on
one image, uint8 [3, h, w], which is fast on a CPU; see batch.py for a GPU."""

import math
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from distrain.config import AugmentConfig
from distrain.rng import Stream, uniform

BINS = 31  # magnitudes of TrivialAugment
SHIFTS = torch.linspace(0.0, 32.0, BINS).int().tolist()  # torchvision truncates: the middle one is 15, not 16
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
    draws = iter(uniform(seed, Stream.PIXELS, *sample, np.arange(24)).tolist())
    if augment.auto_augment == "ta_wide":
        image = trivial_augment_wide(image, next(draws), next(draws), next(draws))
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


def trivial_augment_wide(image: torch.Tensor, which: float, magnitude: float, sign: float) -> torch.Tensor:
    """Apply one operation (Mueller and Hutter 2021, table 7, "wide"). Uniform draws in [0, 1) select the operation, its
    magnitude and its sign."""
    operation = _TRIVIAL[int(which * len(_TRIVIAL))]
    return operation(image, int(magnitude * BINS) / (BINS - 1), 1.0 if sign < 0.5 else -1.0)


def _affine(image: torch.Tensor, dx: int = 0, dy: int = 0, sx: float = 0.0, sy: float = 0.0) -> torch.Tensor:
    shear = [math.degrees(math.atan(sx)), math.degrees(math.atan(sy))]
    corner = [0.0, 0.0] if sx or sy else None  # shear is about the corner
    return F.affine(image, 0.0, [dx, dy], 1.0, shear, interpolation=_NEAREST, center=corner)


def shift_pixels(magnitude: float, sign: float) -> int:
    """Return by how many pixels TrivialAugment translates."""
    return int(sign) * SHIFTS[round(magnitude * (BINS - 1))]


_TRIVIAL: tuple[Callable[[torch.Tensor, float, float], torch.Tensor], ...] = (
    lambda image, m, s: image,
    lambda image, m, s: _affine(image, sx=0.99 * m * s),
    lambda image, m, s: _affine(image, sy=0.99 * m * s),
    lambda image, m, s: _affine(image, dx=shift_pixels(m, s)),
    lambda image, m, s: _affine(image, dy=shift_pixels(m, s)),
    lambda image, m, s: F.rotate(image, 135 * m * s, interpolation=_NEAREST),
    lambda image, m, s: F.adjust_brightness(image, 1 + 0.99 * m * s),
    lambda image, m, s: F.adjust_saturation(image, 1 + 0.99 * m * s),
    lambda image, m, s: F.adjust_contrast(image, 1 + 0.99 * m * s),
    lambda image, m, s: F.adjust_sharpness(image[None], 1 + 0.99 * m * s)[0],  # in a batch: five times as fast
    lambda image, m, s: F.posterize(image, 8 - round(6 * m)),
    lambda image, m, s: F.solarize(image, 255 * (1 - m)),
    lambda image, m, s: F.autocontrast(image),
    lambda image, m, s: F.equalize(image),
)


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
