"""DenseNet: every layer reads the maps of all layers before it (Huang et al., CVPR 2017)."""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from distrain.errors import UserError
from distrain.models.complexity import Tally
from distrain.models.layers import conv, global_avg_pool
from distrain.models.options import check_choice, check_probability
from distrain.models.recomputation import Block

Stem = Literal["imagenet", "cifar"]
DropoutPlacement = Literal["paper", "torchvision"]


@dataclass(frozen=True)
class DenseNetConfig:
    """What a DenseNet is made of, in the paper's terms."""

    depths: tuple[int, ...]
    """Dense layers in each block."""
    growth_rate: int
    """k: maps each layer adds."""
    stem_width: int
    """Maps before the first block: 2k, or 16 where there is no bottleneck."""
    stem: Stem = "imagenet"
    """imagenet: 7x7 of stride 2, BN, ReLU, 3x3 max pooling of stride 2. cifar: 3x3 alone."""
    bottleneck: int = 4
    """Width of the 1x1 convolution before each 3x3, in growth rates; 0: no such convolution (not -B)."""
    compression: float = 0.5
    """theta: share of the maps that a transition keeps; 1: all (not -C)."""
    dropout: float = 0.0
    """Probability of zeroing an element; the paper uses 0.2 where images are not augmented."""
    dropout_placement: DropoutPlacement = "paper"
    """paper: after every convolution but the first. torchvision: after the 3x3 of each dense layer only."""

    def __post_init__(self) -> None:
        if min(self.depths, default=0) < 1:
            raise UserError(f"depths={self.depths}: a DenseNet needs blocks, and every block at least one layer")
        for name, least in (("growth_rate", 1), ("stem_width", 1), ("bottleneck", 0)):
            if getattr(self, name) < least:
                raise UserError(f"{name}={getattr(self, name)} is too small: it must be at least {least}")
        if not 0 < self.compression <= 1:
            raise UserError(f"compression={self.compression:g} must lie in 0..1, 0 excluded")
        check_probability("dropout", self.dropout)
        check_choice("stem", self.stem, Stem)
        check_choice("dropout_placement", self.dropout_placement, DropoutPlacement)

    @property
    def dropout_elsewhere(self) -> float:
        """Probability after the 1x1 convolutions of dense layers and transitions."""
        return self.dropout if self.dropout_placement == "paper" else 0.0


def configure_cifar(variant: str, depth: int, growth_rate: int) -> DenseNetConfig:
    """The three-block network for small images, `depth` layers deep; `variant` is "", "b", "c" or "bc".

    16 maps enter the first block, or 2k in DenseNet-BC (section 3, "Implementation Details").
    """
    has_bottleneck = "b" in variant
    return DenseNetConfig(
        depths=divide_depth(depth, has_bottleneck),
        growth_rate=growth_rate,
        stem_width=2 * growth_rate if variant == "bc" else 16,
        stem="cifar",
        bottleneck=4 if has_bottleneck else 0,
        compression=0.5 if "c" in variant else 1.0,
    )


def divide_depth(depth: int, has_bottleneck: bool) -> tuple[int, int, int]:
    """Dense layers in each of three equal blocks: n = (L - 4) / 3, or (L - 4) / 6 with bottlenecks.

    The four are the stem, two transitions and the classifier. Raises UserError if the depth does not divide.
    """
    convolutions = 6 if has_bottleneck else 3
    layers, rest = divmod(depth - 4, convolutions)
    if rest or layers < 1:
        lower = max(4 + convolutions, depth - rest)
        raise UserError(
            f"depth {depth} does not make three equal blocks of {convolutions // 3}-convolution layers: "
            f"take {lower} or {lower + convolutions}"
        )
    return layers, layers, layers


class DenseLayer(Block):
    """BN-ReLU-1x1-BN-ReLU-3x3, or BN-ReLU-3x3: reads all maps so far, gives `growth_rate` new ones."""

    def __init__(self, width: int, config: DenseNetConfig) -> None:
        super().__init__()
        self.has_bottleneck = config.bottleneck > 0
        self.norm1 = nn.BatchNorm2d(width)
        if self.has_bottleneck:
            inner = config.bottleneck * config.growth_rate
            self.conv1 = conv(width, inner, 1)
            self.dropout1 = nn.Dropout(config.dropout_elsewhere)
            self.norm2 = nn.BatchNorm2d(inner)
            self.conv2 = conv(inner, config.growth_rate, 3)
        else:
            self.conv1 = conv(width, config.growth_rate, 3)
        self.dropout = nn.Dropout(config.dropout)

    def compute(self, *inputs: torch.Tensor) -> torch.Tensor:
        x = self.conv1(F.relu(self.norm1(torch.cat(inputs, dim=1)), inplace=True))
        if self.has_bottleneck:
            x = self.conv2(F.relu(self.norm2(self.dropout1(x)), inplace=True))
        return self.dropout(x)

    def count(self, tally: Tally, size: int) -> int:
        size = tally.conv(self.conv1, tally.norm(self.norm1, size))
        if self.has_bottleneck:
            size = tally.conv(self.conv2, tally.norm(self.norm2, size))
        return size


class DenseBlock(nn.ModuleList):
    """Dense layers in a row: x_l = H_l([x_0, ..., x_l-1]) (equation 2)."""

    def __init__(self, width: int, depth: int, config: DenseNetConfig) -> None:
        super().__init__(DenseLayer(width + number * config.growth_rate, config) for number in range(depth))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        maps = [x]
        for layer in self:
            maps.append(layer(*maps))
        return torch.cat(maps, dim=1)

    def count(self, tally: Tally, size: int) -> int:
        return tally.all(self, size)


class Transition(nn.Module):
    """BN-ReLU-1x1 and 2x2 average pooling, between two blocks."""

    def __init__(self, width_in: int, width_out: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(width_in)
        self.conv = conv(width_in, width_out, 1)
        self.dropout = nn.Dropout(dropout)
        self.pool = nn.AvgPool2d(2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.pool(self.dropout(self.conv(F.relu(self.norm(x), inplace=True))))

    def count(self, tally: Tally, size: int) -> int:
        return tally.average_pool(self.pool, tally.conv(self.conv, tally.norm(self.norm, size)))


class ImageNetStem(nn.Module):
    """7x7 of stride 2, normalisation, ReLU, 3x3 max pooling of stride 2."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = conv(3, width, 7, stride=2)
        self.norm = nn.BatchNorm2d(width)
        self.pool = nn.MaxPool2d(3, stride=2, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.pool(F.relu(self.norm(self.conv(x)), inplace=True))

    def count(self, tally: Tally, size: int) -> int:
        size = tally.norm(self.norm, tally.conv(self.conv, size))
        return tally.max_pool(self.pool, self.conv.out_channels, size)


class CifarStem(nn.Module):
    """3x3 at full resolution; the first dense layer brings its own normalisation."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = conv(3, width, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x)

    def count(self, tally: Tally, size: int) -> int:
        return tally.conv(self.conv, size)


class DenseNet(nn.Module):
    """Images [n, 3, h, w] to logits [n, num_classes]."""

    def __init__(self, config: DenseNetConfig, num_classes: int = 1000) -> None:
        super().__init__()
        self.config = config
        width = config.stem_width
        self.stem = ImageNetStem(width) if config.stem == "imagenet" else CifarStem(width)
        self.blocks = nn.ModuleList()
        self.transitions = nn.ModuleList()
        for number, depth in enumerate(config.depths):
            if number:
                kept = max(1, int(config.compression * width))
                self.transitions.append(Transition(width, kept, config.dropout_elsewhere))
                width = kept
            self.blocks.append(DenseBlock(width, depth, config))
            width += depth * config.growth_rate
        self.norm = nn.BatchNorm2d(width)
        self.head = nn.Linear(width, num_classes)
        self.apply(_initialize)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for part in self._trunk():
            x = part(x)
        return self.head(global_avg_pool(F.relu(self.norm(x), inplace=True)))

    def count(self, tally: Tally, size: int) -> int:
        tally.norm(self.norm, tally.all([self.stem, *self._trunk()], size))
        tally.linear(self.head)
        return 1

    def _trunk(self) -> list[nn.Module]:
        """Block, transition, block, ... block."""
        pairs = zip(self.transitions, self.blocks[1:], strict=True)
        return [self.blocks[0], *(module for pair in pairs for module in pair)]


def _initialize(module: nn.Module) -> None:
    """Convolutions after He et al. 2015, by fan-in as torchvision has it (the authors' code goes by fan-out); the
    classifier's bias at zero."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight)
    elif isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)
