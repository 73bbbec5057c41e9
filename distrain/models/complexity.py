"""Complexity of a network: multiply-adds, parameters and activations, counted without running it.

Next to `forward`, every module has a method `count` that visits its layers in the same order.
"""

import sys
from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Protocol, cast

from torch import nn

from distrain.errors import UserError


@dataclass(frozen=True)
class Cost:
    """Complexity of one layer, or of several, for one image."""

    flops: int = 0
    """Multiply-adds of convolutions and the classifier."""
    params: int = 0
    """Weights and biases, without buffers."""
    activations: int = 0
    """Output elements of convolutions, max pooling and the classifier, as pycls counts."""
    conv_activations: int = 0
    """Output elements of convolutions only, as the RegNet paper defines activations (section 3.1)."""

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(*(getattr(self, entry.name) + getattr(other, entry.name) for entry in fields(Cost)))


@dataclass(frozen=True)
class Layer:
    """A layer with a cost, and the shape of its output: [width, size, size]."""

    module: nn.Module
    cost: Cost
    width: int
    size: int


class ComplexityCounter:
    """Collects the layers of a network. Methods take the input size in pixels and return the output size."""

    def __init__(self) -> None:
        self.layers: list[Layer] = []

    def conv(self, conv: nn.Conv2d, size: int) -> int:
        size = _output_size(size, conv.kernel_size[0], conv.stride[0], int(conv.padding[0]))
        elements = conv.out_channels * size * size
        bias = 0 if conv.bias is None else conv.out_channels
        flops = (conv.weight.numel() + bias) * size * size
        self._add(conv, Cost(flops, conv.weight.numel() + bias, elements, elements), conv.out_channels, size)
        return size

    def norm(self, norm: nn.BatchNorm2d, size: int) -> int:
        self._add(norm, Cost(params=2 * norm.num_features), norm.num_features, size)
        return size

    def max_pool(self, pool: nn.MaxPool2d, width: int, size: int) -> int:
        size = _pooled_size(pool, size)
        self._add(pool, Cost(activations=width * size * size), width, size)
        return size

    def average_pool(self, pool: nn.AvgPool2d, size: int) -> int:
        return _pooled_size(pool, size)

    def linear(self, linear: nn.Linear) -> None:
        weights = linear.weight.numel() + linear.bias.numel()
        self._add(linear, Cost(weights, weights, linear.out_features), linear.out_features, 1)

    def sequential(self, modules: Iterable[nn.Module], size: int) -> int:
        """Count modules that run in sequence."""
        for module in modules:
            size = cast(Countable, module).count(self, size)
        return size

    def _add(self, module: nn.Module, cost: Cost, width: int, size: int) -> None:
        self.layers.append(Layer(module, cost, width, size))


class _EmptyMapError(Exception):
    """A feature map would have no pixels."""


class Countable(Protocol):
    """A module that reports its layers to a ComplexityCounter."""

    def count(self, counter: ComplexityCounter, size: int) -> int:
        """Add every layer to `counter` for a `size` x `size` input; return the output size."""
        ...


def count_complexity(network: nn.Module, resolution: int) -> dict[str, Layer]:
    """Return the layers of a network of `distrain.models` by name, in execution order, for one image of
    `resolution` x `resolution` pixels. Raises UserError if the image is too small."""
    check_resolution(network, resolution)
    names = {module: name for name, module in network.named_modules()}
    return {names[layer.module]: layer for layer in _count(network, resolution)}


def check_resolution(network: nn.Module, resolution: int) -> None:
    """Raise UserError if images of `resolution` x `resolution` pixels are too small for the network."""
    if _has_output(network, resolution):
        return
    smallest = bisect_left(range(sys.maxsize), True, key=lambda size: _has_output(network, size))
    raise UserError(f"image size {resolution} is too small for this network: use at least {smallest} pixels")


def total(layers: Iterable[Layer]) -> Cost:
    """Return the sum of the costs of `layers`."""
    return sum((layer.cost for layer in layers), Cost())


def _count(network: nn.Module, resolution: int) -> list[Layer]:
    counter = ComplexityCounter()
    counter.sequential([network], resolution)
    return counter.layers


def _has_output(network: nn.Module, resolution: int) -> bool:
    try:
        return bool(_count(network, resolution))
    except _EmptyMapError:
        return False


def _pooled_size(pool: nn.MaxPool2d | nn.AvgPool2d, size: int) -> int:
    kernel, stride, padding = (cast(int, value) for value in (pool.kernel_size, pool.stride, pool.padding))
    return _output_size(size, kernel, stride, padding)


def _output_size(size: int, kernel: int, stride: int, padding: int) -> int:
    output = (size + 2 * padding - kernel) // stride + 1
    if output < 1:
        raise _EmptyMapError
    return output
