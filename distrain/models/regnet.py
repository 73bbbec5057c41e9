"""RegNet, and the AnyNet it specializes: stages of residual bottleneck blocks.

Radosavovic et al., "Designing Network Design Spaces", CVPR 2020. The width rules
are in `regnet_widths`.
"""

import math
from dataclasses import dataclass, fields
from functools import lru_cache
from itertools import groupby
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from distrain.errors import UserError
from distrain.models.complexity import ComplexityCounter
from distrain.models.layers import conv, global_avg_pool
from distrain.models.options import check_choice, check_probability
from distrain.models.recomputation import Block
from distrain.models.regnet_widths import MAX_WIDTH, WidthRule, adjust_width, quantize_widths

StemKind = Literal["imagenet", "resnet", "cifar"]


@dataclass(frozen=True)
class StageConfig:
    """A stage of identical blocks; only the first may reduce the resolution."""

    depth: int
    """d_i: number of blocks."""
    width: int
    """w_i: output channels of each block."""
    bottleneck_ratio: float = 1.0
    """b_i: width / width of the 3x3 convolution; below 1 the bottleneck is inverted."""
    group_width: int = 1
    """g_i: channels per group of the 3x3 convolution; 1 is depthwise."""
    se_ratio: float = 0.0
    """Width of the squeeze-and-excitation layer / input width of the block; 0 disables it (RegNetX)."""
    stride: int = 2
    """Stride of the first block."""

    def __post_init__(self) -> None:
        for name in ("depth", "width", "group_width", "stride"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} of a stage must be at least 1")
        if self.bottleneck_ratio <= 0 or self.se_ratio < 0:
            raise UserError(
                f"a stage needs bottleneck_ratio > 0 and se_ratio >= 0, "
                f"not {self.bottleneck_ratio:g} and {self.se_ratio:g}"
            )
        if self.width > MAX_WIDTH * min(1, self.bottleneck_ratio):
            raise UserError(
                f"width={self.width} of a stage with bottleneck_ratio={self.bottleneck_ratio:g} is too large: "
                f"no convolution may be wider than {MAX_WIDTH}"
            )
        if self.inner_width % self.group_width:
            raise UserError(
                f"group_width={self.group_width} does not divide {self.inner_width}, the width of the 3x3 "
                f"convolution (width={self.width} over bottleneck_ratio={self.bottleneck_ratio:g})"
            )

    @property
    def inner_width(self) -> int:
        """Channels of the 3x3 convolution."""
        return max(1, round(self.width / self.bottleneck_ratio))


@dataclass(frozen=True, kw_only=True)
class FrameConfig:
    """Stem, head, initialization and stochastic depth."""

    stem: StemKind = "imagenet"
    """imagenet: 3x3 of stride 2. resnet: 7x7 of stride 2 and max pooling. cifar: 3x3 of stride 1."""
    stem_width: int = 32
    """Output channels of the stem."""
    head_width: int = 0
    """Channels of a 1x1 convolution with BN between the last stage and the pooling; 0 disables it."""
    head_dropout: float = 0.0
    """Probability of zeroing an element before the classifier."""
    zero_gamma: bool = False
    """Initialize the last BN weight of every block to zero: blocks start as identities (Goyal et al. 2017)."""
    drop_path: float = 0.0
    """Stochastic depth (Huang et al. 2016): probability of skipping the last block, growing linearly from 0."""

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
    """A network defined stage by stage."""

    stages: tuple[StageConfig, ...]
    """From the highest resolution to the lowest."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.stages:
            raise UserError("stages: expected at least one")


@dataclass(frozen=True, kw_only=True)
class RegNetConfig(FrameConfig):
    """The parameters that define all stages (section 3.3)."""

    depth: int
    """d: number of blocks."""
    w0: int
    """Initial width in u_j = w0 + wa j; a multiple of 8."""
    wa: float
    """Slope in u_j = w0 + wa j."""
    wm: float
    """Ratio between the widths of successive stages, before rounding."""
    group_width: int
    """g: channels per group of the 3x3 convolution, in every stage that is wide enough."""
    bottleneck_ratio: float = 1.0
    """b, in every stage: width / width of the 3x3 convolution; below 1 the bottleneck is inverted."""
    se_ratio: float = 0.0
    """Width of the squeeze-and-excitation layer / input width of the block: 0.25 in RegNetY, 0 (none) in RegNetX."""
    strides: tuple[int, ...] = ()
    """Stride of each stage; empty means 2 everywhere."""
    width_rule: WidthRule = "pycls"
    """How widths are rounded to be divisible by groups: as in pycls (the authors' code) or in torchvision."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.depth < 1 or self.w0 < 8 or self.w0 % 8 or self.wa < 0 or self.wm <= 1:
            raise UserError(
                f"a RegNet needs depth >= 1, w0 a positive multiple of 8, wa >= 0 and wm > 1, "
                f"not depth={self.depth}, w0={self.w0}, wa={self.wa:g}, wm={self.wm:g}"
            )
        if self.group_width < 1 or self.bottleneck_ratio <= 0:
            raise UserError(
                f"group_width={self.group_width} must be at least 1 and "
                f"bottleneck_ratio={self.bottleneck_ratio:g} greater than 0"
            )
        if self.w0 + self.wa * (self.depth - 1) > MAX_WIDTH * min(1, self.bottleneck_ratio):
            raise UserError(
                f"w0={self.w0}, wa={self.wa:g} and bottleneck_ratio={self.bottleneck_ratio:g} are too large for "
                f"depth={self.depth}: no convolution may be wider than {MAX_WIDTH}"
            )
        check_choice("width_rule", self.width_rule, WidthRule)
        self.stages()  # checks every stage

    @lru_cache(maxsize=1)  # noqa: B019, it is asked for several times while a network is drawn
    def stages(self) -> tuple[StageConfig, ...]:
        """Return one stage per run of equal quantized widths, rounded to be divisible by its groups."""
        widths = quantize_widths(self.depth, self.w0, self.wa, self.wm).tolist()
        runs = [(width, len(list(run))) for width, run in groupby(widths)]
        strides = self.strides or (2,) * len(runs)
        if len(strides) != len(runs):
            raise UserError(f"strides={strides}: expected {len(runs)} values, one per stage")
        stages = []
        for (width, depth), stride in zip(runs, strides, strict=True):
            width, group = adjust_width(width, self.bottleneck_ratio, self.group_width, self.width_rule)
            stages.append(StageConfig(depth, width, self.bottleneck_ratio, group, self.se_ratio, stride))
        return tuple(stages)

    def anynet(self) -> AnyNetConfig:
        """Return the same network defined stage by stage."""
        frame = {entry.name: getattr(self, entry.name) for entry in fields(FrameConfig)}
        return AnyNetConfig(stages=self.stages(), **frame)


class ConvNorm(nn.Module):
    """Convolution and BN."""

    def __init__(self, width_in: int, width_out: int, kernel: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = conv(width_in, width_out, kernel, stride)
        self.norm = nn.BatchNorm2d(width_out)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.conv(x))

    def count(self, counter: ComplexityCounter, size: int) -> int:
        return counter.norm(self.norm, counter.conv(self.conv, size))


class Stem(ConvNorm):
    """Convolution, BN, ReLU and, in ResNet's stem, max pooling."""

    def __init__(self, kind: StemKind, width: int) -> None:
        super().__init__(3, width, kernel=7 if kind == "resnet" else 3, stride=1 if kind == "cifar" else 2)
        self.pool = nn.MaxPool2d(3, stride=2, padding=1) if kind == "resnet" else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(super().forward(x), inplace=True)
        return x if self.pool is None else self.pool(x)

    def count(self, counter: ComplexityCounter, size: int) -> int:
        size = super().count(counter, size)
        return size if self.pool is None else counter.max_pool(self.pool, self.conv.out_channels, size)


class SqueezeExcitation(nn.Module):
    """Scale each channel by a gate computed from the means of all channels (Hu et al. 2018)."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(width, inner, 1)
        self.expand = nn.Conv2d(inner, width, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        means = x.mean(dim=(2, 3), keepdim=True)
        # Not in place: selective recomputation stores convolution outputs, which must not be overwritten.
        return x * torch.sigmoid(self.expand(F.relu(self.reduce(means))))

    def count(self, counter: ComplexityCounter, size: int) -> int:
        counter.conv(self.expand, counter.conv(self.reduce, 1))
        return size


class Bottleneck(Block):
    """1x1, grouped 3x3, [SE], 1x1, each convolution followed by BN; ReLU after the sum (figure 4)."""

    def __init__(self, width_in: int, stride: int, stage: StageConfig, drop_rate: float) -> None:
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
        self.drop_rate = drop_rate

    @property
    def is_random(self) -> bool:
        return self.drop_rate > 0

    def compute(self, *inputs: torch.Tensor) -> torch.Tensor:
        (x,) = inputs
        y = F.relu(self.norm1(self.conv1(x)), inplace=True)
        y = F.relu(self.norm2(self.conv2(y)), inplace=True)
        if self.se is not None:
            y = self.se(y)
        y = self.norm3(self.conv3(y))
        if self.drop_rate and self.training:
            y = drop_path(y, self.drop_rate)
        return F.relu((x if self.shortcut is None else self.shortcut(x)) + y, inplace=True)

    def count(self, counter: ComplexityCounter, size: int) -> int:
        if self.shortcut is not None:
            self.shortcut.count(counter, size)
        size = counter.norm(self.norm1, counter.conv(self.conv1, size))
        size = counter.norm(self.norm2, counter.conv(self.conv2, size))
        if self.se is not None:
            self.se.count(counter, size)
        return counter.norm(self.norm3, counter.conv(self.conv3, size))


class AnyNet(nn.Module):
    """Maps images [n, 3, h, w] to logits [n, num_classes]."""

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
        return self.head(self.dropout(global_avg_pool(self.features(x))))

    def features(self, x: torch.Tensor) -> torch.Tensor:
        """Images [n, 3, h, w] to the maps [n, c, h', w'] that the classifier averages."""
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x)
        return x if self.final is None else F.relu(self.final(x), inplace=True)

    def count(self, counter: ComplexityCounter, size: int) -> int:
        size = counter.sequential([self.stem, *(block for stage in self.stages for block in stage.children())], size)
        if self.final is not None:
            self.final.count(counter, size)
        counter.linear(self.head)
        return 1

    def _zero_gammas(self) -> None:
        for module in self.modules():
            if isinstance(module, Bottleneck):
                nn.init.zeros_(module.norm3.weight)


def _initialize(module: nn.Module) -> None:
    """Initialize convolutions from N(0, 2 / fan_out) and the classifier from N(0, 0.01^2), as in pycls.

    Unlike torch's, this fan_out is not divided by the number of groups.
    """
    if isinstance(module, (nn.Conv2d, nn.Linear)) and module.weight.is_meta:
        return  # torch would import its compiler for that, which takes a second or two
    if isinstance(module, nn.Conv2d):
        fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels
        nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.01)
        nn.init.zeros_(module.bias)


def drop_path(x: torch.Tensor, probability: float) -> torch.Tensor:
    """Zero random images of a batch [n, c, h, w] and scale the others to preserve the mean."""
    kept = torch.rand(x.shape[0], 1, 1, 1, device=x.device) >= probability
    return x * (kept.to(x.dtype) / (1 - probability))


def drop_path_rates(last: float, blocks: int) -> list[float]:
    """Return drop probabilities that grow linearly from 0 to `last` over the blocks."""
    return [last * number / max(1, blocks - 1) for number in range(blocks)]
