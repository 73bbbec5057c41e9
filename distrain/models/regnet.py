"""RegNet and the AnyNet it is drawn from: stages of residual bottleneck blocks (Radosavovic et al., CVPR 2020)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import nn

from distrain.errors import UserError
from distrain.models.complexity import Tally
from distrain.models.layers import Block, conv, pool_globally

WidthRule = Literal["pycls", "torchvision"]


@dataclass(frozen=True)
class StageConfig:
    """A run of equal blocks; the first of them may reduce the resolution."""

    depth: int
    """d_i: blocks."""
    width: int
    """w_i: maps that leave each block."""
    bottleneck_ratio: float = 1.0
    """b_i: width / width of the 3x3 convolution; below 1 the bottleneck is inverted."""
    group_width: int = 1
    """g_i: maps in each group of the 3x3 convolution; 1 is depthwise."""
    se_ratio: float = 0.0
    """Width of the squeeze-and-excitation layer / width that enters the block; 0: none (RegNetX)."""
    stride: int = 2
    """Of the first block."""

    def __post_init__(self) -> None:
        if min(self.depth, self.width, self.group_width, self.stride) < 1:
            raise UserError(f"depth, width, group_width and stride must be at least 1, not {self}")
        if self.bottleneck_ratio <= 0 or self.se_ratio < 0:
            raise UserError(f"bottleneck_ratio must be positive and se_ratio not negative in {self}")
        if self.inner_width % self.group_width:
            raise UserError(
                f"group_width={self.group_width} does not divide {self.inner_width}, the width "
                f"{self.width} over the bottleneck ratio {self.bottleneck_ratio:g}"
            )

    @property
    def inner_width(self) -> int:
        """Maps of the 3x3 convolution."""
        return round(self.width / self.bottleneck_ratio)


@dataclass(frozen=True)
class AnyNetConfig:
    """A stem, stages and a head."""

    stages: tuple[StageConfig, ...]
    stem: Literal["imagenet", "cifar"] = "imagenet"
    """A 3x3 convolution, of stride 2 or, for small images, 1."""
    stem_width: int = 32
    """Maps that leave the stem."""
    zero_gamma: bool = False
    """Start the last normalisation of every block at zero, so that blocks begin as identities (Goyal et al. 2017)."""
    drop_path: float = 0.0
    """Stochastic depth (Huang et al. 2016): probability of skipping the last block, falling linearly to the first."""
    head_dropout: float = 0.0
    """Dropout before the classifier."""

    def __post_init__(self) -> None:
        if not self.stages:
            raise UserError("stages: an AnyNet needs at least one")
        if self.stem not in ("imagenet", "cifar"):
            raise UserError(f"stem={self.stem} is not known: imagenet or cifar")
        for name in ("drop_path", "head_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must lie in 0..1, 1 excluded")


@dataclass(frozen=True)
class RegNetConfig:
    """The few numbers from which the stages follow (section 4)."""

    depth: int
    """d: blocks."""
    w0: int
    """Width at the start of the line u_j = w0 + wa j; a multiple of 8."""
    wa: float
    """Slope of the line."""
    wm: float
    """Ratio of the widths of neighbouring stages, before rounding."""
    group_width: int
    """g, in every stage that is wide enough."""
    bottleneck_ratio: float = 1.0
    """b, in every stage."""
    se_ratio: float = 0.0
    """0.25 in RegNetY, 0 in RegNetX."""
    strides: tuple[int, ...] = ()
    """Of each stage; empty: 2 everywhere."""
    width_rule: WidthRule = "pycls"
    """How widths are made divisible by groups; five networks differ between the two."""
    stem: Literal["imagenet", "cifar"] = "imagenet"
    """A 3x3 convolution, of stride 2 or, for small images, 1."""
    stem_width: int = 32
    """Maps that leave the stem."""
    zero_gamma: bool = False
    """Start the last normalisation of every block at zero."""
    drop_path: float = 0.0
    """Stochastic depth: probability of skipping the last block, falling linearly to the first."""
    head_dropout: float = 0.0
    """Dropout before the classifier."""

    def __post_init__(self) -> None:
        if self.depth < 1 or self.w0 < 8 or self.w0 % 8 or self.wa < 0 or self.wm <= 1:
            raise UserError(
                f"a RegNet needs depth >= 1, w0 a positive multiple of 8, wa >= 0 and wm > 1; "
                f"not depth={self.depth}, w0={self.w0}, wa={self.wa:g}, wm={self.wm:g}"
            )
        if self.width_rule not in ("pycls", "torchvision"):
            raise UserError(f"width_rule={self.width_rule} is not known: pycls or torchvision")

    def stages(self) -> tuple[StageConfig, ...]:
        """Runs of equal quantised widths, each made divisible by its groups."""
        runs = [(width, len(list(run))) for width, run in groupby(quantize_widths(self).tolist())]
        strides = self.strides or (2,) * len(runs)
        if len(strides) != len(runs):
            raise UserError(f"strides={strides} are {len(strides)} numbers, but these settings give {len(runs)} stages")
        stages = []
        for (width, depth), stride in zip(runs, strides, strict=True):
            width, group = adjust_width(width, self.bottleneck_ratio, self.group_width, self.width_rule)
            stages.append(StageConfig(depth, width, self.bottleneck_ratio, group, self.se_ratio, stride))
        return tuple(stages)

    def anynet(self) -> AnyNetConfig:
        """The AnyNet that these numbers describe."""
        return AnyNetConfig(
            self.stages(), self.stem, self.stem_width, self.zero_gamma, self.drop_path, self.head_dropout
        )


def line_widths(config: RegNetConfig) -> NDArray[np.float64]:
    """u_j = w0 + wa j, the width of block j before quantisation (equation 2). [depth]"""
    return config.w0 + config.wa * np.arange(config.depth)


def quantize_widths(config: RegNetConfig) -> NDArray[np.int64]:
    """w_j = w0 wm^s_j with s_j = round(log_wm(u_j / w0)), rounded to multiples of 8 (equations 3 and 4). [depth]

    Rounding is half to even throughout.
    """
    powers = np.rint(np.log(line_widths(config) / config.w0) / np.log(config.wm))
    return (np.rint(config.w0 * np.power(config.wm, powers) / 8) * 8).astype(np.int64)


def adjust_width(width: int, ratio: float, group: int, rule: WidthRule) -> tuple[int, int]:
    """The nearest width, and the group width, for which the groups divide the 3x3 convolution.

    pycls rounds to the nearest multiple; torchvision does too, but up where that loses more than a tenth.
    """
    inner = int(max(1, width / ratio))
    group = min(group, inner)
    multiple = math.lcm(group, round(1 / ratio)) if rule == "pycls" and ratio < 1 else group
    if rule == "pycls":
        inner = max(multiple, round(inner / multiple) * multiple)
    else:
        rounded = max(multiple, int(inner + multiple / 2) // multiple * multiple)
        inner = rounded + multiple if rounded < 0.9 * inner else rounded
    return int(inner * ratio), group


class SqueezeExcitation(nn.Module):
    """Scales each map by what a small network makes of all maps' means (Hu et al. 2018)."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(width, inner, 1)
        self.expand = nn.Conv2d(inner, width, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        means = x.mean(dim=(2, 3), keepdim=True)
        return x * torch.sigmoid(self.expand(F.relu(self.reduce(means), inplace=True)))

    def count(self, tally: Tally) -> None:
        tally.conv(self.expand, tally.conv(self.reduce, 1))


class Projection(nn.Module):
    """1x1 convolution and normalisation, where the shape changes beside a block."""

    def __init__(self, width_in: int, width_out: int, stride: int) -> None:
        super().__init__()
        self.conv = conv(width_in, width_out, 1, stride)
        self.norm = nn.BatchNorm2d(width_out)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.conv(x))

    def count(self, tally: Tally, size: int) -> int:
        return tally.norm(self.norm, tally.conv(self.conv, size))


class Bottleneck(Block):
    """1x1, grouped 3x3, [SE], 1x1, each convolution normalised; ReLU after the sum (figure 3)."""

    def __init__(self, width_in: int, stride: int, stage: StageConfig, drop_path: float) -> None:
        super().__init__()
        inner = stage.inner_width
        self.conv1 = conv(width_in, inner, 1)
        self.norm1 = nn.BatchNorm2d(inner)
        self.conv2 = conv(inner, inner, 3, stride, groups=inner // stage.group_width)
        self.norm2 = nn.BatchNorm2d(inner)
        self.se = SqueezeExcitation(inner, round(stage.se_ratio * width_in)) if stage.se_ratio else None
        self.conv3 = conv(inner, stage.width, 1)
        self.norm3 = nn.BatchNorm2d(stage.width)
        changes = width_in != stage.width or stride > 1
        self.shortcut = Projection(width_in, stage.width, stride) if changes else None
        self.drop_path = drop_path

    def compute(self, *inputs: torch.Tensor) -> torch.Tensor:
        (x,) = inputs
        y = F.relu(self.norm1(self.conv1(x)), inplace=True)
        y = F.relu(self.norm2(self.conv2(y)), inplace=True)
        if self.se is not None:
            y = self.se(y)
        y = self.norm3(self.conv3(y))
        if self.drop_path and self.training:
            y = drop_images(y, self.drop_path)
        return F.relu((x if self.shortcut is None else self.shortcut(x)) + y, inplace=True)

    def count(self, tally: Tally, size: int) -> int:
        if self.shortcut is not None:
            self.shortcut.count(tally, size)
        size = tally.norm(self.norm1, tally.conv(self.conv1, size))
        size = tally.norm(self.norm2, tally.conv(self.conv2, size))
        if self.se is not None:
            self.se.count(tally)
        return tally.norm(self.norm3, tally.conv(self.conv3, size))


class Stem(nn.Module):
    """3x3 convolution, normalisation, ReLU."""

    def __init__(self, width: int, stride: int) -> None:
        super().__init__()
        self.conv = conv(3, width, 3, stride)
        self.norm = nn.BatchNorm2d(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.norm(self.conv(x)), inplace=True)

    def count(self, tally: Tally, size: int) -> int:
        return tally.norm(self.norm, tally.conv(self.conv, size))


class AnyNet(nn.Module):
    """Images [n, 3, h, w] to logits [n, num_classes]."""

    def __init__(self, config: AnyNetConfig, num_classes: int = 1000) -> None:
        super().__init__()
        self.config = config
        self.stem = Stem(config.stem_width, stride=2 if config.stem == "imagenet" else 1)
        rates = iter(drop_path_rates(config.drop_path, sum(stage.depth for stage in config.stages)))
        self.stages = nn.ModuleList()
        width = config.stem_width
        for stage in config.stages:
            blocks = []
            for number in range(stage.depth):
                blocks.append(Bottleneck(width, stage.stride if number == 0 else 1, stage, next(rates)))
                width = stage.width
            self.stages.append(nn.Sequential(*blocks))
        self.dropout = nn.Dropout(config.head_dropout)
        self.head = nn.Linear(width, num_classes)
        self._initialize()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x)
        return self.head(self.dropout(pool_globally(x)))

    def count(self, tally: Tally, size: int) -> int:
        size = self.stem.count(tally, size)
        for stage in self.stages:
            assert isinstance(stage, nn.Sequential)
            for block in stage:
                size = block.count(tally, size)  # type: ignore[operator]
        tally.linear(self.head)
        return 1

    def _initialize(self) -> None:
        """Convolutions from N(0, 2 / fan_out), the classifier from N(0, 0.01^2), as the authors' code has it."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels
                nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.01)
                nn.init.zeros_(module.bias)
            elif isinstance(module, Bottleneck) and self.config.zero_gamma:
                nn.init.zeros_(module.norm3.weight)


def drop_images(x: torch.Tensor, probability: float) -> torch.Tensor:
    """Zero whole images of a batch [n, ...] at random, scaling the others to keep the mean."""
    kept = torch.rand(x.shape[0], *[1] * (x.ndim - 1), device=x.device) >= probability
    return x * (kept.to(x.dtype) / (1 - probability))


def drop_path_rates(last: float, blocks: int) -> Sequence[float]:
    """Skipping probabilities that rise linearly from 0 to `last` over the blocks."""
    return [last * number / max(1, blocks - 1) for number in range(blocks)]
