"""Block widths of a RegNet from its parameters (Radosavovic et al., CVPR 2020, section 3.3).

Rounding is half to even throughout.
"""

import math
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

WidthRule = Literal["pycls", "torchvision"]

QUANTUM = 8

MAX_WIDTH = 65536
"""Channels, about ten times the widest published. Far larger values overflow integers or memory with no clear error."""


def line_widths(depth: int, w0: int, wa: float) -> NDArray[np.float64]:
    """Return u_j = w0 + wa j, the width of block j before quantization (equation 2): [depth]."""
    return np.asarray(w0 + wa * np.arange(depth), np.float64)


def quantize_widths(depth: int, w0: int, wa: float, wm: float) -> NDArray[np.int64]:
    """Return w_j = w0 wm^s_j, s_j = round(log_wm(u_j / w0)), in multiples of 8 (equations 3 and 4): [depth]."""
    powers = np.rint(np.log(line_widths(depth, w0, wa) / w0) / np.log(wm))
    return (np.rint(w0 * np.power(wm, powers) / QUANTUM) * QUANTUM).astype(np.int64)


def count_stages(depth: NDArray[Any], w0: NDArray[Any], wa: NDArray[Any], wm: NDArray[Any]) -> NDArray[np.int64]:
    """Return the number of runs of equal quantized widths in each of n RegNets, whose parameters are [n]: [n]."""
    longest = int(depth.max())
    columns: Any = (w0[:, None], wa[:, None], wm[:, None])
    widths = quantize_widths(longest, *columns)
    changes = (widths[:, 1:] != widths[:, :-1]) & (np.arange(1, longest) < depth[:, None])
    return np.asarray(1 + np.count_nonzero(changes, axis=1), np.int64)


def adjust_width(width: int, ratio: float, group: int, rule: WidthRule) -> tuple[int, int]:
    """Return the width nearest to `width` and the group width, such that groups divide the 3x3 convolution.

    ratio: width / width of the 3x3 convolution. The 3x3's width must be a multiple of the group width and, in
    inverted bottlenecks, of 1 / ratio, so that the outer width is an integer.
    """
    inner = int(max(1, width / ratio))
    group = min(group, inner)
    if rule == "torchvision":
        inner = _make_divisible(inner, group)
    else:
        multiple = math.lcm(group, int(1 / ratio)) if ratio < 1 else group
        inner = max(multiple, round(inner / multiple) * multiple)
    return int(inner * ratio), group


def _make_divisible(value: int, multiple: int) -> int:
    """Return the nearest multiple, half up, or the next one if that is below 90% of `value` (as torchvision)."""
    rounded = max(multiple, int(value + multiple / 2) // multiple * multiple)
    return rounded + multiple if rounded < 0.9 * value else rounded
