"""What a network costs: multiply-adds, parameters and activations, counted without running it."""

from dataclasses import dataclass, field
from typing import Protocol

from torch import nn


@dataclass
class Cost:
    """Of one layer, or summed over many. flops: multiply-adds of one image. activations: output elements of
    convolutions, max pooling and the classifier for one image (Radosavovic et al. 2020, section 3.1; pooling as
    in the authors' code)."""

    flops: int = 0
    params: int = 0
    activations: int = 0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(
            self.flops + other.flops, self.params + other.params, self.activations + other.activations
        )


class Countable(Protocol):
    """A module that can walk over its layers in the order in which `forward` runs them."""

    def count(self, tally: "Tally", size: int) -> int:
        """Enter every layer into `tally` for square maps of `size` pixels; return the size that comes out."""
        ...


@dataclass
class Tally:
    """Collects the cost of each layer, with the size of its output map in pixels."""

    layers: list[tuple[nn.Module, Cost, int]] = field(default_factory=list)

    def conv(self, layer: nn.Conv2d, size: int) -> int:
        size = _output_size(size, layer.kernel_size[0], layer.stride[0], int(layer.padding[0]))
        weights = layer.weight.numel()
        flops = weights * size * size
        activations = layer.out_channels * size * size
        if layer.bias is not None:
            weights += layer.bias.numel()
            flops += activations
        self.layers.append((layer, Cost(flops, weights, activations), size))
        return size

    def norm(self, layer: nn.BatchNorm2d, size: int) -> int:
        self.layers.append((layer, Cost(params=layer.weight.numel() + layer.bias.numel()), size))
        return size

    def pool(self, layer: nn.MaxPool2d | nn.AvgPool2d, size: int) -> int:
        kernel, stride, padding = (int(value) for value in (layer.kernel_size, layer.stride, layer.padding))  # type: ignore[arg-type]
        return _output_size(size, kernel, stride, padding)

    def max_pool(self, layer: nn.MaxPool2d, channels: int, size: int) -> int:
        size = self.pool(layer, size)
        self.layers.append((layer, Cost(activations=channels * size * size), size))
        return size

    def linear(self, layer: nn.Linear) -> None:
        weights = layer.weight.numel()
        bias = layer.bias.numel()
        self.layers.append((layer, Cost(weights + bias, weights + bias, layer.out_features), 1))


def count_complexity(network: nn.Module, resolution: int) -> Tally:
    """The cost of every layer of a network of `distrain.models` for one square image of `resolution` pixels."""
    tally = Tally()
    network.count(tally, resolution)  # type: ignore[operator]
    return tally


def total(tally: Tally) -> Cost:
    """The sum over all layers."""
    return sum((cost for _, cost, _ in tally.layers), Cost())


def _output_size(size: int, kernel: int, stride: int, padding: int) -> int:
    return (size + 2 * padding - kernel) // stride + 1
