"""DenseNet: every layer reads the maps of all layers before it (Huang et al., CVPR 2017)."""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from distrain.errors import UserError
from distrain.models.complexity import Tally
from distrain.models.layers import Block, conv, pool_globally


@dataclass(frozen=True)
class DenseNetConfig:
    """What a DenseNet is made of, in the paper's terms."""

    depths: tuple[int, ...]
    """Dense layers in each block."""
    growth_rate: int
    """k: maps each layer adds."""
    stem_width: int
    """Maps before the first block: 16 or 2k."""
    stem: Literal["imagenet", "cifar"] = "imagenet"
    """imagenet: 7x7 stride 2, BN, ReLU, 3x3 max pooling stride 2. cifar: 3x3 alone."""
    bottleneck: int = 4
    """Width of the 1x1 convolution before each 3x3, in growth rates; 0: no such convolution (not -B)."""
    compression: float = 0.5
    """theta: share of the maps that a transition keeps; 1: all (not -C)."""
    dropout: float = 0.0
    """Probability of zeroing an element; the paper uses 0.2 where images are not augmented."""
    dropout_after: Literal["convolutions", "layers"] = "convolutions"
    """convolutions: after every one but the first, as in the paper. layers: after the 3x3 of each dense layer
    only, as in torchvision."""

    def __post_init__(self) -> None:
        if min(self.depths, default=0) < 1:
            raise UserError(f"depths={self.depths}: every dense block needs at least one layer")
        if self.growth_rate < 1 or self.stem_width < 1 or self.bottleneck < 0:
            raise UserError("growth_rate and stem_width must be at least 1, bottleneck at least 0")
        if not 0 < self.compression <= 1:
            raise UserError(f"compression={self.compression} must lie in 0..1, 0 excluded")
        if not 0 <= self.dropout < 1:
            raise UserError(f"dropout={self.dropout} must lie in 0..1, 1 excluded")
        if self.stem not in ("imagenet", "cifar"):
            raise UserError(f"stem={self.stem} is not known: imagenet or cifar")
        if self.dropout_after not in ("convolutions", "layers"):
            raise UserError(f"dropout_after={self.dropout_after} is not known: convolutions or layers")


def cifar_depths(depth: int, bottleneck: bool) -> tuple[int, int, int]:
    """Layers in each of the three blocks of a network that is `depth` layers deep (section 3, "Implementation
    Details"): the stem, two transitions and the classifier are not in a block, and a bottleneck layer counts two.

    Raises UserError when the depth does not divide.
    """
    layers, rest = divmod(depth - 4, 6 if bottleneck else 3)
    if rest or layers < 1:
        step = 6 if bottleneck else 3
        lower = max(4 + step, depth - rest)
        raise UserError(
            f"depth {depth} does not make three equal blocks of {step // 3}-convolution layers: "
            f"take {lower} or {lower + step}"
        )
    return layers, layers, layers


class Dropout(nn.Module):
    """Dropout of single elements, absent at 0."""

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability = probability

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.dropout(x, self.probability, self.training) if self.probability else x


class DenseLayer(Block):
    """BN-ReLU-1x1-BN-ReLU-3x3, or BN-ReLU-3x3: reads all maps so far, gives `growth_rate` new ones."""

    def __init__(self, width: int, config: DenseNetConfig) -> None:
        super().__init__()
        inner = config.bottleneck * config.growth_rate
        self.norm1 = nn.BatchNorm2d(width)
        if inner:
            self.conv1 = conv(width, inner, 1)
            self.dropout1 = Dropout(config.dropout if config.dropout_after == "convolutions" else 0.0)
            self.norm2 = nn.BatchNorm2d(inner)
            self.conv2 = conv(inner, config.growth_rate, 3)
        else:
            self.conv1 = conv(width, config.growth_rate, 3)
        self.dropout = Dropout(config.dropout)
        self.has_bottleneck = inner > 0

    def compute(self, *maps: torch.Tensor) -> torch.Tensor:
        x = self.conv1(F.relu(self.norm1(torch.cat(maps, dim=1)), inplace=True))
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


class Transition(nn.Module):
    """BN-ReLU-1x1 and 2x2 average pooling, between two blocks."""

    def __init__(self, width_in: int, width_out: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(width_in)
        self.conv = conv(width_in, width_out, 1)
        self.dropout = Dropout(dropout)
        self.pool = nn.AvgPool2d(2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.pool(self.dropout(self.conv(F.relu(self.norm(x), inplace=True))))

    def count(self, tally: Tally, size: int) -> int:
        return tally.pool(self.pool, tally.conv(self.conv, tally.norm(self.norm, size)))


class ImageNetStem(nn.Module):
    """7x7 stride 2, BN, ReLU, 3x3 max pooling stride 2: a quarter of the side is left."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = conv(3, width, 7, stride=2)
        self.norm = nn.BatchNorm2d(width)
        self.pool = nn.MaxPool2d(3, 2, 1)

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
        stem = ImageNetStem if config.stem == "imagenet" else CifarStem
        width = config.stem_width
        self.stem = stem(width)
        self.blocks = nn.ModuleList()
        self.transitions = nn.ModuleList()
        transition_dropout = config.dropout if config.dropout_after == "convolutions" else 0.0
        for number, depth in enumerate(config.depths):
            if number:
                kept = int(config.compression * width)
                self.transitions.append(Transition(width, kept, transition_dropout))
                width = kept
            self.blocks.append(DenseBlock(width, depth, config))
            width += depth * config.growth_rate
        self.norm = nn.BatchNorm2d(width)
        self.head = nn.Linear(width, num_classes)
        self.apply(_initialize)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for number, block in enumerate(self.blocks):
            if number:
                x = self.transitions[number - 1](x)
            x = block(x)
        return self.head(pool_globally(F.relu(self.norm(x), inplace=True)))

    def count(self, tally: Tally, size: int) -> int:
        size = self.stem.count(tally, size)
        for number, block in enumerate(self.blocks):
            if number:
                size = self.transitions[number - 1].count(tally, size)  # type: ignore[operator]
            assert isinstance(block, DenseBlock)
            for layer in block:
                size = layer.count(tally, size)  # type: ignore[operator]
        tally.norm(self.norm, size)
        tally.linear(self.head)
        return 1


def _initialize(module: nn.Module) -> None:
    """He et al. 2015, as the paper says in section 4.2; biases start at zero."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight)
    elif isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)
