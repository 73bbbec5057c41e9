"""DenseNet: every layer reads the feature maps of all preceding layers (Huang et al., CVPR 2017)."""

from dataclasses import dataclass
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import nn

from distrain.errors import UserError
from distrain.kernels.dense_block import LayerParameters, dense_block
from distrain.models.complexity import ComplexityCounter
from distrain.models.fusion import Fusible, fused_norm_relu_pool, normalizes_by_batch, update_running_statistics
from distrain.models.layers import conv, global_avg_pool
from distrain.models.options import check_choice, check_probability
from distrain.models.recomputation import Block

Stem = Literal["imagenet", "cifar"]
DropoutPlacement = Literal["paper", "torchvision"]


@dataclass(frozen=True)
class DenseNetConfig:
    """Configuration of a DenseNet, in the paper's terms."""

    depths: tuple[int, ...]
    """Dense layers in each block."""
    growth_rate: int
    """k: feature maps that each layer adds."""
    stem_width: int
    """Feature maps before the first block: 2k, or 16 without bottlenecks."""
    stem: Stem = "imagenet"
    """imagenet: 7x7 convolution, BN, ReLU, 3x3 max pooling, both of stride 2. cifar: a 3x3 convolution only."""
    bottleneck: int = 4
    """Width of the 1x1 convolution before each 3x3, in multiples of the growth rate; 0 disables it (not -B)."""
    compression: float = 0.5
    """theta: fraction of the feature maps that a transition keeps; 1 keeps all (not -C)."""
    dropout: float = 0.0
    """Probability of zeroing an element; the paper uses 0.2 without data augmentation."""
    dropout_placement: DropoutPlacement = "paper"
    """paper: after every convolution except the first. torchvision: only after the 3x3 of each dense layer."""

    def __post_init__(self) -> None:
        if min(self.depths, default=0) < 1:
            raise UserError(f"depths={self.depths}: expected at least one block, and at least one layer in each")
        for name, minimum in (("growth_rate", 1), ("stem_width", 1), ("bottleneck", 0)):
            if getattr(self, name) < minimum:
                raise UserError(f"{name}={getattr(self, name)} must be at least {minimum}")
        if not 0 < self.compression <= 1:
            raise UserError(f"compression={self.compression:g} must be in (0, 1]")
        check_probability("dropout", self.dropout)
        check_choice("stem", self.stem, Stem)
        check_choice("dropout_placement", self.dropout_placement, DropoutPlacement)

    @property
    def dropout_elsewhere(self) -> float:
        """Probability after the 1x1 convolutions of dense layers and transitions."""
        return self.dropout if self.dropout_placement == "paper" else 0.0


def cifar_config(variant: str, depth: int, growth_rate: int) -> DenseNetConfig:
    """Return the three-block configuration for small images, `depth` layers deep; `variant` is "", "b", "c" or "bc".

    16 feature maps enter the first block, or 2k in DenseNet-BC (section 3, "Implementation Details").
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
    """Return the dense layers per block for three equal blocks: n = (L - 4) / 3, or (L - 4) / 6 with bottlenecks.

    The other four layers are the stem, two transitions and the classifier. Raises UserError if L does not divide.
    """
    convolutions = 6 if has_bottleneck else 3
    layers, rest = divmod(depth - 4, convolutions)
    if rest or layers < 1:
        lower = max(4 + convolutions, depth - rest)
        raise UserError(
            f"depth {depth} does not split into three equal blocks of {convolutions // 3}-convolution layers: "
            f"use {lower} or {lower + convolutions}"
        )
    return layers, layers, layers


class DenseLayer(Block):
    """BN-ReLU-1x1-BN-ReLU-3x3, or BN-ReLU-3x3: reads all preceding feature maps and adds `growth_rate`."""

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

    def operands(self) -> LayerParameters:
        """The parameters, for `dense_block`."""
        first = self.norm1.weight, self.norm1.bias, self.conv1.weight
        if self.has_bottleneck:
            return LayerParameters(*first, self.norm2.weight, self.norm2.bias, self.conv2.weight)
        return LayerParameters(*first)

    def count(self, counter: ComplexityCounter, size: int) -> int:
        size = counter.conv(self.conv1, counter.norm(self.norm1, size))
        if self.has_bottleneck:
            size = counter.conv(self.conv2, counter.norm(self.norm2, size))
        return size


class DenseBlock(Fusible, nn.ModuleList):
    """Consecutive dense layers: x_l = H_l([x_0, ..., x_l-1]) (equation 2)."""

    def __init__(self, width: int, depth: int, config: DenseNetConfig) -> None:
        super().__init__(DenseLayer(width + number * config.growth_rate, config) for number in range(depth))
        self.dropout_probabilities = config.dropout_elsewhere, config.dropout

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        layers = cast(list[DenseLayer], list(self))
        norms = [layer.norm1 for layer in layers] + [layer.norm2 for layer in layers if layer.has_bottleneck]
        if self.is_fused and normalizes_by_batch(norms, x):
            return self._compute_fused(x, layers, norms)
        maps = [x]
        for layer in layers:
            maps.append(layer(*maps))
        return torch.cat(maps, dim=1)

    def _compute_fused(self, x: torch.Tensor, layers: list[DenseLayer], norms: list[nn.BatchNorm2d]) -> torch.Tensor:
        """Compute all layers in one operation. `norms`: those of the maps, layer by layer, then those inside layers."""
        maps, statistics = dense_block(
            x,
            [layer.operands() for layer in layers],
            norms[0].eps,
            dropout=self.dropout_probabilities,
            keep_inner=[layer.recomputation != "full" for layer in layers],
            kernels=self.kernels,
        )
        of_maps = [statistics.maps[:, : norm.num_features] for norm in norms[: len(layers)]]
        update_running_statistics(norms, [*of_maps, *statistics.inner], count=x.numel() // x.shape[1])
        return maps

    def count(self, counter: ComplexityCounter, size: int) -> int:
        return counter.sequential(self, size)


class Transition(Fusible):
    """BN-ReLU-1x1 and 2x2 average pooling between two blocks. Fused, it pools first: a 1x1 and an average commute."""

    def __init__(self, width_in: int, width_out: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(width_in)
        self.conv = conv(width_in, width_out, 1)
        self.dropout = nn.Dropout(dropout)
        self.pool = nn.AvgPool2d(2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.is_fused and not self.dropout.p and normalizes_by_batch([self.norm], x):
            pooled = fused_norm_relu_pool(x, self.norm, "average", self.kernels.compiled_passes)
            return cast(torch.Tensor, self.conv(pooled))
        return self.pool(self.dropout(self.conv(F.relu(self.norm(x), inplace=True))))

    def count(self, counter: ComplexityCounter, size: int) -> int:
        return counter.average_pool(self.pool, counter.conv(self.conv, counter.norm(self.norm, size)))


class ImageNetStem(Fusible):
    """7x7 convolution of stride 2, BN, ReLU, 3x3 max pooling of stride 2."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = conv(3, width, 7, stride=2)
        self.norm = nn.BatchNorm2d(width)
        self.pool = nn.MaxPool2d(3, stride=2, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x)
        if self.is_fused and normalizes_by_batch([self.norm], x):
            return fused_norm_relu_pool(x, self.norm, "max", self.kernels.compiled_passes)
        return self.pool(F.relu(self.norm(x), inplace=True))

    def count(self, counter: ComplexityCounter, size: int) -> int:
        size = counter.norm(self.norm, counter.conv(self.conv, size))
        return counter.max_pool(self.pool, self.conv.out_channels, size)


class CifarStem(nn.Module):
    """3x3 convolution at full resolution, without BN: the first dense layer starts with one."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = conv(3, width, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x)

    def count(self, counter: ComplexityCounter, size: int) -> int:
        return counter.conv(self.conv, size)


class DenseNet(nn.Module):
    """Maps images [n, 3, h, w] to logits [n, num_classes]."""

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
        return self.head(global_avg_pool(self.features(x)))

    def features(self, x: torch.Tensor) -> torch.Tensor:
        """Images [n, 3, h, w] to the maps [n, c, h', w'] that the classifier averages."""
        x = self.stem(x)
        for module in self._trunk():
            x = module(x)
        return F.relu(self.norm(x), inplace=True)

    def count(self, counter: ComplexityCounter, size: int) -> int:
        counter.norm(self.norm, counter.sequential([self.stem, *self._trunk()], size))
        counter.linear(self.head)
        return 1

    def _trunk(self) -> list[nn.Module]:
        """Return block, transition, block, ..., block."""
        pairs = zip(self.transitions, self.blocks[1:], strict=True)
        return [self.blocks[0], *(module for pair in pairs for module in pair)]


def _initialize(module: nn.Module) -> None:
    """Initialize convolutions as He et al. 2015, by fan-in as in torchvision (the authors' code uses fan-out), and the
    classifier's bias to zero."""
    if isinstance(module, nn.Conv2d):
        if not module.weight.is_meta:  # torch would import its compiler for that, which takes a second or two
            nn.init.kaiming_normal_(module.weight)
    elif isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)
