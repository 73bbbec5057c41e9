"""What is compared between networks: what was drawn, costs, depth, and how well a line describes the widths."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distrain.models import network_config
from distrain.models.densenet import DenseNetConfig
from distrain.models.regnet import AnyNetConfig, RegNetConfig
from distrain.models.regnet_widths import QUANTUM, quantize_widths
from distrain.sweep.population import Member

COSTS = ("flops", "params", "activations")
_STARTS = 12  # points of the coarse grid that are refined
_ROUNDS = 6


@dataclass(frozen=True)
class LinearFit:
    """The quantized linear rule that is nearest to the widths of a network (section 3.3)."""

    w0: int
    wa: float
    wm: float
    error: float
    """e_fit: mean |ln(predicted / observed width)| over the blocks."""


def block_widths(member: Member) -> NDArray[np.int64] | None:
    """Output channels of each block [depth], None for DenseNets, whose layers all add the same number of channels."""
    config = _config(member)
    if isinstance(config, DenseNetConfig):
        return None
    stages = config.stages() if isinstance(config, RegNetConfig) else config.stages
    return np.repeat([stage.width for stage in stages], [stage.depth for stage in stages])


def channels(member: Member) -> NDArray[np.int64]:
    """Channels after each block, or after each layer of a DenseNet's dense blocks: [depth]."""
    if (widths := block_widths(member)) is not None:
        return widths
    config = _config(member)
    found, width = [], config.stem_width
    for number, depth in enumerate(config.depths):
        width = max(1, int(config.compression * width)) if number else width
        found += [width + config.growth_rate * (layer + 1) for layer in range(depth)]
        width = found[-1]
    return np.array(found)


def property_columns(members: Sequence[Member]) -> dict[str, NDArray[np.float64]]:
    """By name, a value for each member [n], NaN where it has none or it is not known.

    These are what was drawn, unless it is a choice, then the number of `blocks` (`depth` of a RegNet), for AnyNets the
    `fit_error` of the linear rule, costs and `seconds`.
    """
    rows = [_properties(member) for member in members]
    names = dict.fromkeys(name for row in rows for name in row)
    last = {name: None for name in (*COSTS, "seconds") if name in names}
    ordered = [*(name for name in names if name not in last), *last]
    return {name: np.array([row.get(name, math.nan) for row in rows], np.float64) for name in ordered}


def is_choice(value: Any) -> bool:
    """Whether what was drawn is text, true or false: no number that could be compared."""
    return isinstance(value, bool) or not isinstance(value, (int, float))


def _properties(member: Member) -> dict[str, float]:
    found = {name: float(value) for name, value in member.parameters.items() if not is_choice(value)}
    config = _config(member)
    if isinstance(config, RegNetConfig):
        found.setdefault("depth", config.depth)
    else:
        depths = config.depths if isinstance(config, DenseNetConfig) else [stage.depth for stage in config.stages]
        found["blocks"] = sum(depths)
    if isinstance(config, AnyNetConfig):
        widths = block_widths(member)
        assert widths is not None
        found["fit_error"] = fit_linear_rule(widths).error
    found |= {name: getattr(member, name) for name in COSTS}
    return found if member.seconds is None else {**found, "seconds": member.seconds}


def _config(member: Member) -> Any:
    return network_config(member.network, **member.options)


def fit_linear_rule(widths: NDArray[np.int64]) -> LinearFit:
    """Fit w0, wa and 1.5 <= wm <= 3 to block widths [depth] by a grid that is refined around its best points.

    A RegNet has an error of zero, up to the rounding of its widths to multiples of the group width.
    """
    first = float(widths[0])
    starts = np.unique(np.rint(first * np.array([0.5, 0.6, 0.7, 0.8, 0.9, 1, 1.1, 1.25, 1.5, 2]) / QUANTUM)) * QUANTUM
    multipliers = np.linspace(1.5, 3, 61)
    slopes = np.concatenate([[0], np.geomspace(0.02, 4, 40)])  # wa / w0
    points = _grid(starts[starts > 0], slopes, multipliers)
    errors = _fit_errors(points, widths)
    step_w0, step_slope, step_wm = QUANTUM, 0.1, 0.025
    for _ in range(_ROUNDS):
        best = points[np.argsort(errors, kind="stable")[:_STARTS]]
        w0 = step_w0 * np.arange(-1, 2)
        offsets = _grid(w0, step_slope * np.linspace(-1, 1, 11), step_wm * np.linspace(-1, 1, 11))
        moved = (best[:, None] + offsets * [1, 0, 1]).reshape(-1, 3)
        moved[:, 1] *= 1 + np.tile(offsets[:, 1], len(best))
        points = np.concatenate([best, moved[(moved[:, 0] >= QUANTUM) & (moved[:, 2] >= 1.5) & (moved[:, 2] <= 3)]])
        errors = _fit_errors(points, widths)
        step_w0, step_slope, step_wm = QUANTUM, step_slope / 2.5, step_wm / 2.5
    chosen = int(np.argmin(errors))
    w0, slope, wm = points[chosen].tolist()
    return LinearFit(round(w0), w0 * slope, wm, float(errors[chosen]))


def _grid(*axes: NDArray[Any]) -> NDArray[np.float64]:
    return np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, len(axes))


def _fit_errors(points: NDArray[np.float64], widths: NDArray[np.int64]) -> NDArray[np.float64]:
    """e_fit of each (w0, wa / w0, wm): [n]."""
    columns: Any = points.T[:, :, None]
    w0, slope, wm = columns
    predicted = quantize_widths(len(widths), w0, w0 * slope, wm)
    return np.abs(np.log(predicted / widths)).mean(axis=1)
