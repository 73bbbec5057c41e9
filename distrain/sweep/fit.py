"""RegNets for a budget: the nearest to a shape whose cost is the wanted one, found without training.

What the best networks of a sweep share, or the published ones, carries over to another budget as ratios (Radosavovic
et al. 2020, section 4): depth, wm, the slope wa / w0 and the group width / w0. They fix the depths of the stages and
the ratios of their widths, so that w0 alone scales the cost.
"""

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product
from statistics import median
from typing import Any

import numpy as np

from distrain.errors import UserError
from distrain.models import PUBLISHED, RegNetConfig, network_config
from distrain.models.regnet_widths import QUANTUM
from distrain.sweep.population import Member
from distrain.sweep.ranges import Range, Value
from distrain.sweep.sampling import Sampler
from distrain.sweep.space import Space
from distrain.sweep.statistics import finished

# Steps from the wanted shape that are tried.
_BLOCKS = range(-8, 9)
_RATIOS = [step / 10 for step in range(-5, 6)]
_SLOPES = [2 ** (step / 8) for step in range(-12, 13)]
_WIDEST = 4096


@dataclass(frozen=True)
class Shape:
    """What RegNets of different budgets share."""

    depth: float
    wm: float
    slope: float
    """wa / w0."""
    groups: float
    """Group width / w0."""
    bottleneck_ratio: float = 1.0

    @classmethod
    def of(cls, config: RegNetConfig) -> "Shape":
        w0 = config.w0
        return cls(config.depth, config.wm, config.wa / w0, config.group_width / w0, config.bottleneck_ratio)

    def distance(self, other: "Shape") -> float:
        """The root of the squared logarithms of the ratios of depth, wm and slope.

        That of the slope counts half: it changes with the budget, while depth and wm hardly do.
        """
        pairs = (self.depth, other.depth, 1), (self.wm, other.wm, 1), (self.slope, other.slope, 0.5)
        return math.hypot(*(weight * math.log(first / second) for first, second, weight in pairs))


def published_shape(flops: float) -> Shape:
    """The trend of the twelve published RegNetX: power laws of the multiply-adds, with no bottleneck."""
    known = [one for name, one in PUBLISHED.items() if name.startswith("regnetx_")]
    shapes = [Shape.of(RegNetConfig(**one.config)) for one in known]
    costs = np.log([one.cost.flops for one in known])
    at = np.clip(math.log(flops), costs.min(), costs.max())  # a trend says nothing of what lies beyond it
    columns = {name: np.log([getattr(shape, name) for shape in shapes]) for name in asdict(shapes[0])}
    return Shape(**{name: math.exp(np.polyval(np.polyfit(costs, column, 1), at)) for name, column in columns.items()})


def best_shape(members: Sequence[Member]) -> Shape:
    """The medians of the best quarter of the RegNets that are done. Raises UserError if there is none."""
    ranked = [member for member in finished(members) if member.network == "regnet"]
    if not ranked:
        raise UserError("no RegNet is done in this sweep: give the folder of a sweep of RegNets, once some are done")
    best = ranked[: math.ceil(len(ranked) / 4)]
    shapes = [asdict(Shape.of(regnet_config(member))) for member in best]
    medians = {name: median(shape[name] for shape in shapes) for name in shapes[0]}
    return Shape(**{**medians, "slope": max(0.01, medians["slope"])})  # of a slope of zero there are no multiples


def fit(
    space: Space, like: Shape, flops: float, count: int, num_classes: int = 1000, resolution: int = 224
) -> list[Member]:
    """At most `count` networks of the space for about `flops` multiply-adds, nearest to the shape `like` first.

    They fulfill the conditions of the space, such as how near to `flops` they are. Their index is their rank.
    Raises UserError if there is none, naming the condition that the best fail at.
    """
    ranges = {parameter.name: parameter.range for parameter in space.parameters}
    if space.network != "regnet" or "w0" not in ranges:
        raise UserError(
            f"{space.name}: fit scales w0 of RegNets, which this space does not draw: give one such as "
            "configs/sweep/regnetx_refined.yaml"
        )
    unconditional = Sampler(replace(space, conditions=()), num_classes, resolution)
    sampler = Sampler(space, num_classes, resolution)
    widths = sorted({float(ranges["w0"].nearest(width)) for width in range(QUANTUM, _WIDEST, QUANTUM)})
    found: dict[Any, Member] = {}
    rejected = set()

    def cost(shape: Shape, w0: float) -> float:
        member = unconditional.build(0, _draw(ranges, shape, w0))
        return member.flops if isinstance(member, Member) else math.inf

    for shape in _shapes(ranges, like):
        nearest = bisect_left(widths, flops, key=partial(cost, shape))
        for w0 in widths[max(0, nearest - 1) : nearest + 1]:
            outcome = sampler.build(len(found), _draw(ranges, shape, w0))
            if isinstance(outcome, Member):
                found.setdefault(regnet_config(outcome).stages(), outcome)
            else:
                rejected.add(outcome)
            if len(found) == count:
                return list(found.values())
    if not found:
        reasons = [one.text for one in sampler.conditions if one.text in rejected] or [*rejected]
        raise UserError(
            f"{space.name}: no network for {flops / 1e6:g}MF: those that fulfill the most conditions fail at: "
            f"{reasons[-1]}; choose another --flops, a larger --tolerance or wider ranges"
        )
    return list(found.values())


def _shapes(ranges: Mapping[str, Range], like: Shape) -> list[Shape]:
    """Shapes around `like` that the ranges allow, the nearest first."""
    steps = {"depth": [like.depth + step for step in _BLOCKS], "wm": [like.wm + step for step in _RATIOS]}
    allowed = [
        sorted({float(ranges[name].nearest(value)) for value in values}) if name in ranges else [getattr(like, name)]
        for name, values in steps.items()
    ]
    slopes = [like.slope * factor for factor in _SLOPES]
    shapes = [replace(like, depth=depth, wm=wm, slope=slope) for depth, wm, slope in product(*allowed, slopes)]
    return sorted(shapes, key=like.distance)


def _draw(ranges: Mapping[str, Range], shape: Shape, w0: float) -> dict[str, Value]:
    """What a RegNet of this shape draws; of options that have no part in it the middle of their range."""
    wanted = {
        "depth": shape.depth,
        "w0": w0,
        "wa": shape.slope * w0,
        "wm": shape.wm,
        "group_width": shape.groups * w0,
        "bottleneck_ratio": shape.bottleneck_ratio,
    }
    return {name: one.nearest(wanted[name]) if name in wanted else one.draw(0.5) for name, one in ranges.items()}


def regnet_config(member: Member) -> RegNetConfig:
    """The configuration of a member of a space of RegNets."""
    config = network_config(member.network, **member.options)
    assert isinstance(config, RegNetConfig)
    return config
