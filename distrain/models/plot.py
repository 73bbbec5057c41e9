"""Plot the block widths of a RegNet and their parametrization, as in the paper (figures 8 and 9)."""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from distrain.errors import UserError
from distrain.models.regnet import RegNetConfig
from distrain.models.regnet_widths import line_widths, quantize_widths


def plot_widths(name: str, config: RegNetConfig, path: Path) -> None:
    """Write the plot to an image file. Raises UserError if it cannot be written."""
    figure = draw_widths(name, config)
    try:
        figure.savefig(path, dpi=150, format=path.suffix[1:] or "png")
    except (OSError, ValueError) as error:  # ValueError: a suffix that matplotlib does not support
        raise UserError(f"{path}: cannot be written: {error}") from error


def draw_widths(name: str, config: RegNetConfig) -> Figure:
    """Plot over the blocks: the line u_j, the quantized widths and the stage widths."""
    stages = config.stages()
    blocks = np.arange(config.depth)
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    line = line_widths(config.depth, config.w0, config.wa)
    axes.plot(blocks, line, "--", color="tab:gray", label=f"linear: {config.w0} + {config.wa:g} j")
    quantized = quantize_widths(config.depth, config.w0, config.wa, config.wm)
    axes.plot(blocks, quantized, "o", color="tab:blue", label=f"quantized: powers of {config.wm:g}, multiples of 8")
    ends = np.cumsum([stage.depth for stage in stages])
    widths = [stage.width for stage in stages]
    starts = [end - stage.depth for end, stage in zip(ends, stages, strict=True)]
    label = "stages: divisible by the group width"
    axes.hlines(widths, np.asarray(starts) - 0.4, ends - 0.6, color="tab:red", linewidth=2, label=label)
    for stage, start, end in zip(stages, starts, ends, strict=True):
        near_right_edge = end > 0.7 * config.depth
        axes.annotate(
            f"{stage.depth} x {stage.width}, g={stage.group_width}",
            xy=(start - 0.6 if near_right_edge else end - 0.4, stage.width),
            horizontalalignment="right" if near_right_edge else "left",
            verticalalignment="center",
            fontsize=8,
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1},
        )
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter(lambda width, _: f"{width:g}")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.margins(0.08)
    axes.grid(alpha=0.3)
    axes.set(title=name, xlabel="block j", ylabel="width (channels)")
    axes.legend(loc="lower right", fontsize=8)
    return figure
