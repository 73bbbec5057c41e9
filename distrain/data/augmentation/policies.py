"""Policies of automatic augmentation: which operations change an image, and how strongly, by uniform draws in [0, 1).

Values are those of torchvision's TrivialAugmentWide, RandAugment, AutoAugment and AugMix, with its default settings.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import NamedTuple

import torch

from distrain.config import AugmentConfig

OPERATIONS = (
    "identity", "shear_x", "shear_y", "translate_x", "translate_y", "rotate", "brightness", "saturation", "contrast",
    "sharpness", "posterize", "solarize", "autocontrast", "equalize",
)  # fmt: skip
"""Those of TrivialAugment and RandAugment, in the order in which a draw selects them. AutoAugment also has `invert`."""

_WIDE_BINS, _RAND_BINS, _AUTO_BINS = 31, 31, 10  # magnitudes
_CHAINS, _MAX_DEPTH, _SEVERITY = 3, 3, 3  # of AugMix


class Change(NamedTuple):
    """An operation and its argument: the tangent of a shear, pixels, degrees, a factor, bits or a threshold."""

    name: str
    value: float = 0.0


class Plan(NamedTuple):
    """Changes of an image. With `weights`, the result is the sum of the image and of what each chain makes of it, in
    these proportions; without, it is what the only chain makes of it."""

    chains: Sequence[Sequence[Change]]
    weights: Sequence[float] = ()


class Policy(NamedTuple):
    draws: int
    """The number of uniform draws it takes."""
    plan: Callable[[Sequence[float], int, int], Plan]
    """Of those draws, and height and width of the image."""


@dataclass(frozen=True)
class _Ranges:
    """How much each operation changes at the largest magnitude."""

    shear: float
    shift: Callable[[int], float]
    """Pixels, of a side."""
    degrees: float
    factor: float
    bits: tuple[int, int]
    """Of posterize: at the smallest magnitude, and how many fewer at the largest."""


_WIDE = _Ranges(0.99, lambda side: 32.0, 135.0, 0.99, (8, 6))
_RAND = _Ranges(0.3, lambda side: 150 / 331 * side, 30.0, 0.9, (8, 4))
_MIXED = _Ranges(0.3, lambda side: side / 3, 30.0, 0.9, (4, 4))


def find_policy(augment: AugmentConfig) -> Policy | None:
    """The configured policy, if any."""
    match augment.auto_augment:
        case "ta_wide":
            return Policy(3, _trivial_augment)
        case "randaugment":
            return _rand_augment(augment.operations, augment.magnitude)
        case "autoaugment":
            return _auto_augment(_IMAGENET)
        case "autoaugment_cifar10":
            return _auto_augment(_CIFAR10)
        case "augmix":
            return Policy(_CHAINS * (2 + 3 * _MAX_DEPTH), _augmix)
    return None


def _trivial_augment(draws: Sequence[float], height: int, width: int) -> Plan:
    """One operation of any magnitude (Mueller and Hutter 2021, table 7, "wide")."""
    which, level, sign = draws
    name = OPERATIONS[int(which * len(OPERATIONS))]
    return Plan([[_change(name, _WIDE, int(level * _WIDE_BINS), _WIDE_BINS, sign, height, width)]])


def _rand_augment(operations: int, magnitude: int) -> Policy:
    """Several operations of one magnitude (Cubuk et al. 2020)."""

    def plan(draws: Sequence[float], height: int, width: int) -> Plan:
        names = [OPERATIONS[int(which * len(OPERATIONS))] for which in draws[::2]]
        pairs = zip(names, draws[1::2], strict=True)
        return Plan([[_change(name, _RAND, magnitude, _RAND_BINS, sign, height, width) for name, sign in pairs]])

    return Policy(2 * operations, plan)


def _auto_augment(table: str) -> Policy:
    """One of 25 learned pairs of operations, each with its probability and magnitude (Cubuk et al. 2019)."""
    pairs = [[row.split() for row in line.split(",")] for line in table.strip().splitlines()]

    def plan(draws: Sequence[float], height: int, width: int) -> Plan:
        which, *rest = draws
        chosen = zip(pairs[int(which * len(pairs))], rest[::2], rest[1::2], strict=True)
        return Plan(
            [
                [
                    _change(name, _RAND, int(level[0]) if level else 0, _AUTO_BINS, sign, height, width)
                    for (name, probability, *level), chance, sign in chosen
                    if chance < float(probability)
                ]
            ]
        )

    return Policy(5, plan)


def _augmix(draws: Sequence[float], height: int, width: int) -> Plan:
    """Three chains of up to three weak operations each, mixed with one another and with the image (Hendrycks et al.
    2020)."""
    values = iter(draws)
    gaps = sorted([0.0, *(next(values) for _ in range(_CHAINS - 1)), 1.0])  # between sorted uniforms: Dirichlet(1, ...)
    original = next(values)
    shares = [(high - low) * (1 - original) for low, high in pairwise(gaps)]
    chains = []
    for _ in range(_CHAINS):
        depth = 1 + int(next(values) * _MAX_DEPTH)
        triples = [(next(values), next(values), next(values)) for _ in range(_MAX_DEPTH)]
        chains.append([_weak_change(*triple, height, width) for triple in triples[:depth]])
    return Plan(chains, [original, *shares])


def _weak_change(which: float, level: float, sign: float, height: int, width: int) -> Change:
    names = OPERATIONS[1:]
    name = names[int(which * len(names))]
    return _change(name, _MIXED, int(level * _SEVERITY), _AUTO_BINS, sign, height, width)


def _change(name: str, ranges: _Ranges, level: int, levels: int, sign: float, height: int, width: int) -> Change:
    magnitude, signed = level / (levels - 1), 1.0 if sign < 0.5 else -1.0
    match name:
        case "shear_x" | "shear_y":
            return Change(name, ranges.shear * magnitude * signed)
        case "translate_x" | "translate_y":
            side = width if name == "translate_x" else height
            return Change(name, signed * _shifts(ranges.shift(side), levels)[level])
        case "rotate":
            return Change(name, ranges.degrees * magnitude * signed)
        case "brightness" | "saturation" | "contrast" | "sharpness":
            return Change(name, 1 + ranges.factor * magnitude * signed)
        case "posterize":
            most, fewer = ranges.bits
            return Change(name, most - round(fewer * magnitude))
        case "solarize":
            return Change(name, 255 * (1 - magnitude))
    return Change(name)


@cache
def _shifts(largest: float, levels: int) -> list[int]:
    """Whole pixels of every level: as torchvision, by truncation of float32."""
    shifts: list[int] = torch.linspace(0.0, largest, levels).int().tolist()
    return shifts


# Operation, probability, level, from the tables of Cubuk et al. 2019: 9 and 7, without what cannot vary.
_IMAGENET = """
posterize .4 8, rotate .6 9
solarize .6 5, autocontrast .6
equalize .8, equalize .6
posterize .6 7, posterize .6 6
equalize .4, solarize .2 4
equalize .4, rotate .8 8
solarize .6 3, equalize .6
posterize .8 5, equalize 1
rotate .2 3, solarize .6 8
equalize .6, posterize .4 6
rotate .8 8, saturation .4 0
rotate .4 9, equalize .6
equalize 0, equalize .8
invert .6, equalize 1
saturation .6 4, contrast 1 8
rotate .8 8, saturation 1 2
saturation .8 8, solarize .8 7
sharpness .4 7, invert .6
shear_x .6 5, equalize 1
saturation .4 0, equalize .6
equalize .4, solarize .2 4
solarize .6 5, autocontrast .6
invert .6, equalize 1
saturation .6 4, contrast 1 8
equalize .8, equalize .6
"""
_CIFAR10 = """
invert .1, contrast .2 6
rotate .7 2, translate_x .3 9
sharpness .8 1, sharpness .9 3
shear_y .5 8, translate_y .7 9
autocontrast .5, equalize .9
shear_y .2 7, posterize .3 7
saturation .4 3, brightness .6 7
sharpness .3 9, brightness .7 9
equalize .6, equalize .5
contrast .6 7, sharpness .6 5
saturation .7 7, translate_x .5 8
equalize .3, autocontrast .4
translate_y .4 3, sharpness .2 6
brightness .9 6, saturation .2 8
solarize .5 2, invert 0
equalize .2, autocontrast .6
equalize .2, equalize .6
saturation .9 9, equalize .6
autocontrast .8, solarize .2 8
brightness .1 3, saturation .7 0
solarize .4 5, autocontrast .9
translate_y .9 9, translate_y .7 9
autocontrast .9, solarize .8 3
equalize .8, invert .1
translate_y .7 9, autocontrast .9
"""
