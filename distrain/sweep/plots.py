"""Figures of a sweep, each of one panel: error distributions, error against a property, Pareto fronts, widths."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from distrain.models.regnet_widths import line_widths, quantize_widths
from distrain.sweep.statistics import BestRange, Distribution, Floats, pareto_front
from distrain.sweep.structure import LinearFit
from distrain.sweep.table import show_number

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")  # Okabe and Ito, for all eyes
_DASHES = ("-", "--", "-.", ":")
_MARKERS = "os^Dv"
_LONG_LABEL = 30  # characters, from which two labels are wider than a figure
_PER_ROW = 5  # networks
_FEW_VALUES = 8  # each has its tick
_LOGARITHMIC = 8  # times the smallest value, from which the axis is logarithmic
_LABELS = {
    "flops": "multiply-adds per image",
    "params": "parameters",
    "activations": "activations per image",
    "seconds": "time per step",
    "blocks": "total depth (blocks)",
    "depth": "depth (blocks)",
    "width": "width (channels)",
    "w0": "initial width $w_0$ (channels)",
    "wa": "slope $w_a$ (channels per block)",
    "wm": "width multiplier $w_m$",
    "group_width": "group width $g$ (channels)",
    "bottleneck_ratio": "bottleneck ratio $b$",
    "se_ratio": "squeeze-and-excitation ratio",
    "growth_rate": "growth rate $k$ (channels)",
    "fit_error": r"fit error of linear widths $e_\mathrm{fit}$",
}


@dataclass(frozen=True)
class Picture:
    """A figure as files, and in words for those who do not see it."""

    png: bytes
    svg: bytes
    text: str


def render(figure: Figure, text: str) -> Picture:
    """Encode a figure that `text` describes; equal figures give equal bytes."""
    png, svg = BytesIO(), BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "distrain"}):
        figure.savefig(png, format="png", dpi=160)
        figure.savefig(svg, format="svg", metadata={"Date": None})
    return Picture(png.getvalue(), svg.getvalue(), text)


def draw_distributions(spaces: Mapping[str, Distribution]) -> Figure:
    """The distribution function of the errors of each space, with its band. Spaces without any error are left out."""
    figure, axes = _new((4.6, 3.5))
    shown = [(number, name, found) for number, (name, found) in enumerate(spaces.items()) if found.count]
    right = max(found.errors[-1] for _, _, found in shown)
    left = min(found.errors[0] for _, _, found in shown)
    margin = 0.04 * (right - left) or 0.01
    for number, name, found in shown:
        # Constant beyond the outermost errors, so that the curves meet both edges.
        errors = 100 * np.concatenate([[left - margin], found.errors, [right + margin]])
        steps = (np.concatenate([[0], line, line[-1:]]) for line in (found.fraction, found.low, found.high))
        fraction, low, high = steps
        color = COLORS[number % len(COLORS)]
        axes.fill_between(errors, low, high, step="post", color=color, alpha=0.15, linewidth=0)
        label = f"{plain(name)} (n={found.count})"
        axes.step(errors, fraction, where="post", color=color, linestyle=_dash(number), label=label)
    axes.set(xlabel="top-1 error (%)", ylabel="cumulative probability", ylim=(0, 1.02))
    axes.set_xlim(100 * (left - margin), 100 * (right + margin))
    _legend(figure)
    return figure


def draw_property(name: str, values: Floats, errors: Floats, found: BestRange) -> Figure:
    """Error [n] against a property [n], with the median and 95% range of its values in the best networks.

    The range is gray if it cannot be distinguished from that of all networks.
    """
    figure, axes = _new()
    known = np.isfinite(values)
    scale, label = scale_and_label(name, values[known])
    axes.plot(scale * values[known], 100 * errors[known], "o", color=COLORS[0], alpha=0.6, markersize=4, mew=0)
    axes.lines[0].set_label(f"networks (n={np.count_nonzero(known)})")
    best, (band, line) = found.best, (COLORS[5], COLORS[1]) if found.differs else ("silver", "dimgray")
    axes.axvspan(scale * best.low, scale * best.high, color=band, alpha=0.3, lw=2, label="best: 95% range")
    axes.axvline(scale * best.value, color=line, linestyle="--", label=f"median {show_number(scale * best.value)}")
    _set_x(axes, scale * values[known], label)
    axes.set_ylabel("top-1 error (%)")
    _legend(figure, columns=3)
    return figure


def draw_front(name: str, spaces: Mapping[str, tuple[Floats, Floats]]) -> Figure:
    """Error against a cost, and of each space the networks that are best at their cost.

    spaces: costs [n], NaN where not known, and errors [n].
    """
    figure, axes = _new()
    everything = np.concatenate([cost[np.isfinite(cost)] for cost, _ in spaces.values()])
    scale, label = scale_and_label(name, everything)
    for number, (space, (cost, errors)) in enumerate(spaces.items()):
        color, marker = COLORS[number % len(COLORS)], _MARKERS[number % len(_MARKERS)]
        axes.plot(scale * cost, 100 * errors, marker, color=color, alpha=0.35, markersize=4, mew=0)
        front = pareto_front(cost, errors)
        if count := np.count_nonzero(np.isfinite(cost)):
            style = {"color": color, "marker": marker, "markersize": 4, "linestyle": _dash(number)}
            x, y = scale * cost[front], 100 * errors[front]
            axes.plot(x, y, drawstyle="steps-post", label=f"{plain(space)} (n={count})", **style)
    _set_x(axes, scale * everything, label)
    axes.set_ylabel("top-1 error (%)")
    _legend(figure)
    return figure


def draw_block_widths(title: str, widths: NDArray[np.int64], fit: LinearFit) -> Figure:
    """Widths over blocks [depth] and the linear rule that is nearest."""
    figure, axes = _new()
    blocks = np.arange(len(widths))
    line = line_widths(len(widths), fit.w0, fit.wa)
    axes.plot(blocks, line, "--", color="gray", label=f"{fit.w0} + {fit.wa:.3g} j")
    label = f"quantized, $w_m$={fit.wm:.3g}"
    axes.step(blocks, quantize_widths(len(widths), fit.w0, fit.wa, fit.wm), where="mid", color=COLORS[1], label=label)
    axes.plot(blocks, widths, "o", color=COLORS[0], markersize=4, label="network")
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter(lambda width, _: f"{width:g}")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel="block j", ylabel="width (channels)")
    axes.set_title(f"{plain(title)}, $e_{{\\mathrm{{fit}}}}$={fit.error:.3f}", fontsize=9)
    axes.margins(0.08)
    _legend(figure, columns=3)
    return figure


def scale_and_label(name: str, values: Floats) -> tuple[float, str]:
    """What to multiply a property by, and the name of its axis with the unit."""
    base, _, stage = name.partition(".")
    label = _LABELS.get(base, plain(base.replace("_", " ")))
    largest = float(np.max(values, initial=0))
    if name == "seconds":
        return (1000.0, f"{label} (ms)") if largest < 1 else (1.0, f"{label} (s)")
    if name in ("flops", "params", "activations"):
        power = min(3, max(0, math.floor(math.log10(max(1.0, largest)) / 3)))
        unit = ("", " (thousands)", " (millions)", " (billions)")[power]
        return 1000.0**-power, label + unit
    return 1.0, f"{label}, stage {plain(stage)}" if stage else label


def draw_networks(networks: Mapping[str, NDArray[np.int64]]) -> Figure:
    """Networks side by side: by title, the channels after each block or dense layer [depth]."""
    rows = math.ceil(len(networks) / _PER_ROW)
    figure = Figure(figsize=(2 * _PER_ROW, 1.5 * rows + 0.4), layout="constrained")
    panels = figure.subplots(rows, _PER_ROW, sharex=True, sharey=True, squeeze=False)
    for axes, (title, widths) in zip(panels.flat, networks.items(), strict=False):
        axes.bar(np.arange(len(widths)), widths, width=0.8, color=COLORS[0])
        axes.set_title(plain(title), fontsize=8)
        axes.set_yscale("log", base=2)
        axes.yaxis.set_major_formatter(lambda width, _: f"{width:g}")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in panels.flat[len(networks) :]:
        axes.set_axis_off()
    figure.supxlabel("block, or layer of a dense block", fontsize=9)
    figure.supylabel("channels", fontsize=9)
    return figure


def plain(text: str) -> str:
    """Text that matplotlib draws as it is, also in legends: no formulas, nothing hidden."""
    return (" " if text.startswith("_") else "") + text.replace("$", r"\$")


def _new(size: tuple[float, float] = (4.2, 3.2)) -> tuple[Figure, Axes]:
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.add_subplot()
    axes.grid(alpha=0.3)
    return figure, axes


def _legend(figure: Figure, columns: int = 2) -> None:
    """Below the axes, where it hides no point."""
    longest = max(len(label) for label in figure.axes[0].get_legend_handles_labels()[1])
    columns = columns if longest <= _LONG_LABEL else 1
    figure.legend(loc="outside lower center", ncols=columns, fontsize=8, frameon=False, columnspacing=1.2)


def _dash(number: int) -> Any:
    return _DASHES[number % len(_DASHES)]


def _set_x(axes: Axes, values: Floats, label: str) -> None:
    axes.set_xlabel(label)
    distinct = np.unique(values)
    low, high = float(distinct[0]), float(distinct[-1])
    if low > 0 and high / low >= _LOGARITHMIC:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
        shown = "235" if high / low < 30 else "25" if high / low < 300 else ""
        axes.xaxis.set_minor_formatter(lambda x, _: f"{x:g}" if f"{x:e}"[0] in shown else "")
    elif np.all(distinct == np.rint(distinct)):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if len(distinct) <= _FEW_VALUES and (distinct[1:] - distinct[:-1] > 0.08 * distinct[1:]).all():
        axes.set_xticks(distinct, [show_number(value) for value in distinct])
        axes.set_xticks([], minor=True)
