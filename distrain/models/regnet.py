"""RegNet and the AnyNet it is drawn from: stages of residual bottleneck blocks.

Radosavovic et al., "Designing Network Design Spaces", CVPR 2020. The rules by which widths follow from a few
numbers are in `regnet_widths`.
"""

import math
from dataclasses import dataclass, fields
from itertools import groupby
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from distrain.errors import UserError
from distrain.models.complexity import Tally
from distrain.models.layers import conv, global_avg_pool
from distrain.models.options import check_choice, check_probability
from distrain.models.recomputation import Block
from distrain.models.regnet_widths import WIDEST, WidthRule, adjust_width, quantize_widths

StemKind = Literal["imagenet", "resnet", "cifar"]


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
        for name in ("depth", "width", "group_width", "stride"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} of a stage must be at least 1")
        if self.bottleneck_ratio <= 0 or self.se_ratio < 0:
            raise UserError(
                f"a stage needs bottleneck_ratio above 0 and se_ratio of at least 0, "
                f"not {self.bottleneck_ratio:g} and {self.se_ratio:g}"
            )
        if self.width > WIDEST * min(1, self.bottleneck_ratio):
            raise UserError(
                f"width={self.width} of a stage with bottleneck_ratio={self.bottleneck_ratio:g} is too much: "
                f"no convolution may be wider than {WIDEST}"
            )
        if self.inner_width % self.group_width:
            raise UserError(
                f"group_width={self.group_width} does not divide {self.inner_width}, the width of the 3x3 "
                f"convolution (width={self.width} over bottleneck_ratio={self.bottleneck_ratio:g})"
            )

    @property
    def inner_width(self) -> int:
        """Maps of the 3x3 convolution."""
        return max(1, round(self.width / self.bottleneck_ratio))


@dataclass(frozen=True, kw_only=True)
class FrameConfig:
    """What surrounds the stages, and how blocks start and are skipped."""

    stem: StemKind = "imagenet"
    """imagenet: 3x3 of stride 2. resnet: 7x7 of stride 2 and max pooling. cifar: 3x3 of stride 1."""
    stem_width: int = 32
    """Maps that leave the stem."""
    head_width: int = 0
    """Maps of a 1x1 convolution, normalised, between the last stage and the pooling; 0: none."""
    head_dropout: float = 0.0
    """Probability of zeroing an element before the classifier."""
    zero_gamma: bool = False
    """Start the last normalisation of every block at zero: blocks begin as identities (Goyal et al. 2017)."""
    drop_path: float = 0.0
    """Stochastic depth (Huang et al. 2016): probability of skipping the last block, linear from 0."""

    def __post_init__(self) -> None:
        check_choice("stem", self.stem, StemKind)
        if self.stem_width < 1 or self.head_width < 0:
            raise UserError(
                f"stem_width={self.stem_width} must be at least 1 and head_width={self.head_width} at least 0"
            )
        check_probability("head_dropout", self.head_dropout)
        check_probability("drop_path", self.drop_path)


@dataclass(frozen=True, kw_only=True)
class AnyNetConfig(FrameConfig):
    """A network given stage by stage."""

    stages: tuple[StageConfig, ...]
    """From the highest resolution to the lowest."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.stages:
            raise UserError("stages: an AnyNet needs at least one")


@dataclass(frozen=True, kw_only=True)
class RegNetConfig(FrameConfig):
    """The few numbers from which the stages follow (section 3.3)."""

    depth: int
    """d: blocks."""
    w0: int
    """Width at the start of the line u_j = w0 + wa j; a multiple of 8."""
    wa: float
    """Slope of the line."""
    wm: float
    """Ratio of the widths of neighbouring stages, before rounding."""
    group_width: int
    """g: maps in each group of the 3x3 convolution, in every stage that is wide enough."""
    bottleneck_ratio: float = 1.0
    """b, in every stage: width / width of the 3x3 convolution; below 1 the bottleneck is inverted."""
    se_ratio: float = 0.0
    """Width of the squeeze-and-excitation layer / width that enters the block: 0.25 in RegNetY, 0 (none) in RegNetX."""
    strides: tuple[int, ...] = ()
    """Of each stage; empty: 2 everywhere."""
    width_rule: WidthRule = "pycls"
    """How widths are made divisible by groups: pycls (the authors') or torchvision; five networks differ."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.depth < 1 or self.w0 < 8 or self.w0 % 8 or self.wa < 0 or self.wm <= 1:
            raise UserError(
                f"a RegNet needs depth of at least 1, w0 a positive multiple of 8, wa of at least 0 and "
                f"wm above 1, not depth={self.depth}, w0={self.w0}, wa={self.wa:g}, wm={self.wm:g}"
            )
        if self.group_width < 1 or self.bottleneck_ratio <= 0:
            raise UserError(
                f"group_width={self.group_width} must be at least 1 and "
                f"bottleneck_ratio={self.bottleneck_ratio:g} above 0"
            )
        if self.w0 + self.wa * (self.depth - 1) > WIDEST * min(1, self.bottleneck_ratio):
            raise UserError(
                f"w0={self.w0}, wa={self.wa:g} and bottleneck_ratio={self.bottleneck_ratio:g} are too much for "
                f"depth={self.depth}: no convolution may be wider than {WIDEST}"
            )
        check_choice("width_rule", self.width_rule, WidthRule)
        self.stages()  # finds the mistakes that only the stages show

    def stages(self) -> tuple[StageConfig, ...]:
        """Runs of equal quantised widths, each made divisible by its groups."""
        widths = quantize_widths(self.depth, self.w0, self.wa, self.wm).tolist()
        runs = [(width, len(list(run))) for width, run in groupby(widths)]
        strides = self.strides or (2,) * len(runs)
        if len(strides) != len(runs):
            raise UserError(f"strides={strides} must be {len(runs)} numbers, one for each stage")
        stages = []
        for (width, depth), stride in zip(runs, strides, strict=True):
            width, group = adjust_width(width, self.bottleneck_ratio, self.group_width, self.width_rule)
            stages.append(StageConfig(depth, width, self.bottleneck_ratio, group, self.se_ratio, stride))
        return tuple(stages)

    def anynet(self) -> AnyNetConfig:
        """The same network, stage by stage."""
        frame = {entry.name: getattr(self, entry.name) for entry in fields(FrameConfig)}
        return AnyNetConfig(stages=self.stages(), **frame)


class ConvNorm(nn.Module):
    """A convolution and its normalisation."""

    def __init__(self, width_in: int, width_out: int, kernel: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = conv(width_in, width_out, kernel, stride)
        self.norm = nn.BatchNorm2d(width_out)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.conv(x))

    def count(self, tally: Tally, size: int) -> int:
        return tally.norm(self.norm, tally.conv(self.conv, size))


class Stem(ConvNorm):
    """Convolution, normalisation, ReLU and, in ResNet's stem, max pooling."""

    def __init__(self, kind: StemKind, width: int) -> None:
        super().__init__(3, width, kernel=7 if kind == "resnet" else 3, stride=1 if kind == "cifar" else 2)
        self.pool = nn.MaxPool2d(3, stride=2, padding=1) if kind == "resnet" else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(super().forward(x), inplace=True)
        return x if self.pool is None else self.pool(x)

    def count(self, tally: Tally, size: int) -> int:
        size = super().count(tally, size)
        return size if self.pool is None else tally.max_pool(self.pool, self.conv.out_channels, size)


class SqueezeExcitation(nn.Module):
    """Scales each map by what a small network makes of all maps' means (Hu et al. 2018)."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(width, inner, 1)
        self.expand = nn.Conv2d(inner, width, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        means = x.mean(dim=(2, 3), keepdim=True)
        # Not in place: selective recomputation keeps what leaves a convolution, so nothing may overwrite it.
        return x * torch.sigmoid(self.expand(F.relu(self.reduce(means))))

    def count(self, tally: Tally, size: int) -> int:
        tally.conv(self.expand, tally.conv(self.reduce, 1))
        return size


class Bottleneck(Block):
    """1x1, grouped 3x3, [SE], 1x1, each convolution normalised; ReLU after the sum (figure 4)."""

    def __init__(self, width_in: int, stride: int, stage: StageConfig, drop_path: float) -> None:
        super().__init__()
        inner = stage.inner_width
        self.conv1 = conv(width_in, inner, 1)
        self.norm1 = nn.BatchNorm2d(inner)
        self.conv2 = conv(inner, inner, 3, stride, groups=inner // stage.group_width)
        self.norm2 = nn.BatchNorm2d(inner)
        squeezed = max(1, round(stage.se_ratio * width_in))
        self.se = SqueezeExcitation(inner, squeezed) if stage.se_ratio else None
        self.conv3 = conv(inner, stage.width, 1)
        self.norm3 = nn.BatchNorm2d(stage.width)
        changes_shape = width_in != stage.width or stride > 1
        self.shortcut = ConvNorm(width_in, stage.width, 1, stride) if changes_shape else None
        self.drop_path = drop_path

    def compute(self, *inputs: torch.Tensor) -> torch.Tensor:
        (x,) = inputs
        y = F.relu(self.norm1(self.conv1(x)), inplace=True)
        y = F.relu(self.norm2(self.conv2(y)), inplace=True)
        if self.se is not None:
            y = self.se(y)
        y = self.norm3(self.conv3(y))
        if self.drop_path and self.training:
            y = drop_path(y, self.drop_path)
        return F.relu((x if self.shortcut is None else self.shortcut(x)) + y, inplace=True)

    def count(self, tally: Tally, size: int) -> int:
        if self.shortcut is not None:
            self.shortcut.count(tally, size)
        size = tally.norm(self.norm1, tally.conv(self.conv1, size))
        size = tally.norm(self.norm2, tally.conv(self.conv2, size))
        if self.se is not None:
            self.se.count(tally, size)
        return tally.norm(self.norm3, tally.conv(self.conv3, size))


class AnyNet(nn.Module):
    """Images [n, 3, h, w] to logits [n, num_classes]."""

    def __init__(self, config: AnyNetConfig, num_classes: int = 1000) -> None:
        super().__init__()
        self.config = config
        self.stem = Stem(config.stem, config.stem_width)
        rates = iter(drop_path_rates(config.drop_path, sum(stage.depth for stage in config.stages)))
        self.stages = nn.ModuleList()
        width = config.stem_width
        for stage in config.stages:
            blocks = []
            for number in range(stage.depth):
                blocks.append(Bottleneck(width, stage.stride if number == 0 else 1, stage, next(rates)))
                width = stage.width
            self.stages.append(nn.Sequential(*blocks))
        self.final = ConvNorm(width, config.head_width, 1) if config.head_width else None
        self.dropout = nn.Dropout(config.head_dropout)
        self.head = nn.Linear(config.head_width or width, num_classes)
        self.apply(_initialize)
        if config.zero_gamma:
            self._zero_gammas()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x)
        if self.final is not None:
            x = F.relu(self.final(x), inplace=True)
        return self.head(self.dropout(global_avg_pool(x)))

    def count(self, tally: Tally, size: int) -> int:
        size = tally.all([self.stem, *(block for stage in self.stages for block in stage.children())], size)
        if self.final is not None:
            self.final.count(tally, size)
        tally.linear(self.head)
        return 1

    def _zero_gammas(self) -> None:
        for module in self.modules():
            if isinstance(module, Bottleneck):
                nn.init.zeros_(module.norm3.weight)


def _initialize(module: nn.Module) -> None:
    """Convolutions from N(0, 2 / fan_out), the classifier from N(0, 0.01^2), as the authors' code has it.

    Unlike torch's, this fan_out does not shrink with the number of groups.
    """
    if isinstance(module, nn.Conv2d):
        fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels
        nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.01)
        nn.init.zeros_(module.bias)


def drop_path(x: torch.Tensor, probability: float) -> torch.Tensor:
    """Zero whole images of a batch [n, c, h, w] at random, scaling the others to keep the mean."""
    kept = torch.rand(x.shape[0], 1, 1, 1, device=x.device) >= probability
    return x * (kept.to(x.dtype) / (1 - probability))


def drop_path_rates(last: float, blocks: int) -> list[float]:
    """Skipping probabilities that rise linearly from 0 to `last` over the blocks."""
    return [last * number / max(1, blocks - 1) for number in range(blocks)]
