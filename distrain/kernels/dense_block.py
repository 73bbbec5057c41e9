"""A dense block in one buffer, with the statistics of every feature map taken once.

A dense layer l computes o_l = H_l([x_0, ..., x_l-1]) (Huang et al. 2017, equation 2), with H = BN-ReLU-1x1-BN-ReLU-3x3.
Run layer by layer, each one concatenates, normalizes and stores all maps before it, which takes memory and time that
grow with the square of the depth. Here all maps of a block lie in one buffer X, channels last, so that

    layer l reads the columns X[:, :C_l], C_l = C_0 + l k, and writes its k maps to X[:, C_l:C_l+k].

The mean and the variance of a map over the batch do not depend on which layer reads it; only gamma and beta do. So
they are computed once, when the map is written. With the scale s and the shift t of `normalization`, layer l computes

    a = max(0, X[:, :C_l] s1 + t1),   z = a W1^T,   y = max(0, z s2 + t2),   o = the 3x3 convolution of y by W2

Neither a nor y is kept: both are computed again in the backward pass. Kept are X, z, which elements dropout keeps, and
vectors.

Shapes: M = n h w rows, one per pixel; X [M, C], C = C_0 + L k; a [M, C_l]; z and y [M, b]; o [M, k]; W1 [b, C_l, 1, 1];
W2 [k, b, 3, 3]. kernels/README.md draws the way of a map.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from distrain.kernels.choice import TORCH, Kernels
from distrain.kernels.convolutions import (
    convolve,
    convolve_backward,
    normalize_relu_convolve,
    normalize_relu_convolve_backward,
)
from distrain.kernels.normalization import (
    Norm,
    accumulate_direct,
    exact_dtype,
    images_of,
    moments,
    normalize_relu,
    rows_of,
)
from distrain.kernels.products import normalize_relu_multiply, normalize_relu_multiply_backward


class LayerParameters(NamedTuple):
    """The parameters of a dense layer; without a bottleneck the first convolution is the 3x3."""

    gamma1: torch.Tensor
    beta1: torch.Tensor
    weight1: torch.Tensor
    gamma2: torch.Tensor | None = None
    beta2: torch.Tensor | None = None
    weight2: torch.Tensor | None = None

    def norm1(self, statistics: torch.Tensor, eps: float) -> Norm:
        """The one of the maps."""
        return Norm(statistics, self.gamma1, self.beta1, eps)

    def norm2(self, statistics: torch.Tensor, eps: float) -> Norm:
        """The one of z."""
        assert self.gamma2 is not None
        assert self.beta2 is not None
        return Norm(statistics, self.gamma2, self.beta2, eps)


class Statistics(NamedTuple):
    """What running averages need."""

    maps: torch.Tensor
    """Mean and biased variance of every map of the block, [2, C]."""
    inner: torch.Tensor
    """The same of the output of every 1x1, [layers, 2, b]; empty without bottlenecks."""


def dense_block(
    x: torch.Tensor,
    layers: Sequence[LayerParameters],
    eps: float,
    *,
    dropout: tuple[float, float] = (0.0, 0.0),
    keep_inner: Sequence[bool] | None = None,
    kernels: Kernels = TORCH,
) -> tuple[torch.Tensor, Statistics]:
    """All maps [n, C, h, w] of a dense block of `x` [n, C_0, h, w] in training mode, and their statistics.

    `dropout`: probabilities after the 1x1 and after the 3x3. `keep_inner`: for each layer, whether to keep z for the
    backward pass rather than computing it again; by default all do.
    Computes in the dtype of autocast, if that is on, with statistics and sums in fp32 at least.
    """
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    flat = [
        tensor.to(dtype) if name.startswith("weight") else tensor
        for layer in layers
        for name, tensor in zip(LayerParameters._fields, layer, strict=True)
        if tensor is not None
    ]
    settings = _Settings(len(layers), eps, dropout, keep_inner or [True] * len(layers), kernels)
    with torch.autocast(device, enabled=False):
        maps, of_maps, inner = _DenseBlock.apply(x.to(dtype), settings, *flat)
    return maps, Statistics(of_maps, inner)


class _Settings(NamedTuple):
    """What `dense_block` is given beside tensors."""

    depth: int
    eps: float
    dropout: tuple[float, float]
    keep_inner: Sequence[bool]
    kernels: Kernels


class _DenseBlock(torch.autograd.Function):
    """The forward and backward pass of a dense block, as the documentation of this module derives them."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, settings: _Settings, *parameters: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        layers, kernels = _unflatten(parameters, settings.depth), settings.kernels
        shape, width, growth = x.shape, x.shape[1], _outputs_of(layers[0])
        total = width + settings.depth * growth
        maps = x.new_empty((shape[0], *shape[2:], total)).permute(0, 3, 1, 2)
        buffer = rows_of(maps)
        of_maps = x.new_empty((2, total), dtype=exact_dtype(x.dtype))
        of_inner: list[torch.Tensor] = []
        kept: list[torch.Tensor] = []

        def write(new: torch.Tensor, of_new: torch.Tensor, columns: slice) -> None:
            buffer[:, columns] = new
            of_maps[:, columns] = of_new

        write(rows_of(x), moments(rows_of(x)), slice(0, width))
        for number, layer in enumerate(layers):
            read = buffer[:, :width]
            norm = layer.norm1(of_maps[:, :width], settings.eps)
            if layer.weight2 is None:
                y = normalize_relu(read, norm, kernels.compiled_passes)
                written = convolve(y, layer.weight1, shape)
                of_written = moments(written)
            else:
                z, of_z = normalize_relu_multiply(read, norm, layer.weight1.flatten(1), kernels)
                z, noise = _drop(images_of(z, shape), settings.dropout[0])
                of_inner.append(moments(z) if settings.dropout[0] else of_z)
                norm = layer.norm2(of_inner[-1], settings.eps)
                kept += [noise, z if settings.keep_inner[number] else z.new_empty(0)]
                written, of_written = normalize_relu_convolve(z, norm, layer.weight2, shape, kernels)
            if settings.dropout[1]:
                written, noise = _drop(images_of(written, shape), settings.dropout[1])
                of_written = moments(written)
                kept.append(noise)
            write(written, of_written, slice(width, width + growth))
            width += growth
        ctx.settings = settings
        inner = torch.stack(of_inner) if of_inner else of_maps.new_empty(0)
        ctx.save_for_backward(maps, of_maps, inner, *parameters, *kept)
        ctx.mark_non_differentiable(of_maps, inner)
        return maps, of_maps, inner

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor, *_: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """From the last layer to the first: take its own gradient, final as all its readers are done, and add to that
        of the maps it reads."""
        maps, of_maps, of_inner, *rest = ctx.saved_tensors
        settings: _Settings = ctx.settings
        kernels = settings.kernels
        count = len(ctx.needs_input_grad) - 2
        layers, kept = _unflatten(rest[:count], settings.depth), rest[count:]
        shape, width, growth = maps.shape, maps.shape[1], _outputs_of(layers[0])
        of_layers: list[list[torch.Tensor]] = []
        running = _Gradient(gradient, maps, of_maps, settings.eps, kernels)
        for number in reversed(range(settings.depth)):
            layer, width = layers[number], width - growth
            own = running.final(slice(width, width + growth))
            if settings.dropout[1]:
                own = _scale_kept(own, kept.pop(), settings.dropout[1])
            norm = layer.norm1(of_maps[:, :width], settings.eps)
            read = rows_of(maps)[:, :width]
            if layer.weight2 is None:
                y = normalize_relu(read, norm, kernels.compiled_passes)
                of_y, of_weight1 = convolve_backward(own, y, layer.weight1, shape)
                of_layers.append([*running.add(of_y, y, norm), of_weight1])
                continue
            weight = layer.weight1.flatten(1)
            z, noise = kept.pop(), kept.pop()
            if not z.numel():
                z = normalize_relu_multiply(read, norm, weight, kernels)[0]
                z = _scale_kept(z, noise, settings.dropout[0])
            inner = layer.norm2(of_inner[number], settings.eps)
            dz, *of_norm2, of_weight2 = normalize_relu_convolve_backward(own, z, inner, layer.weight2, shape, kernels)
            *of_norm1, of_weight1 = running.add_product(_scale_kept(dz, noise, settings.dropout[0]), weight, norm)
            # A view, but with the strides of the weight, by which DDP has laid out its buckets.
            of_weight1 = of_weight1.as_strided(layer.weight1.shape, layer.weight1.stride())
            of_layers.append([*of_norm1, of_weight1, *of_norm2, of_weight2])
        of_x = images_of(running.final(slice(0, width)), shape)
        return of_x, None, *(one for of_layer in reversed(of_layers) for one in of_layer)


class _Gradient:
    """G [M, C], the gradient of all maps, as the layers that read them add to it.

    Directly, a reader adds D s, where D is the gradient of its BN(X). Through mean and variance, which are functions of
    the whole map, the gradient of a map gets (Ioffe and Szegedy 2015, section 3)

        - r / M (c1 + x^ c2),   c1 = sum over readers of gamma sum(D),   c2 = sum over readers of gamma sum(D x^)

    which is linear in c1 and c2 and therefore waits until all readers have added to them.
    """

    def __init__(
        self, gradient: torch.Tensor, maps: torch.Tensor, of_maps: torch.Tensor, eps: float, kernels: Kernels
    ) -> None:
        self._maps = rows_of(maps)
        self._direct = rows_of(gradient.to(maps.dtype).clone(memory_format=torch.channels_last))
        self._means, variances = of_maps.unbind()
        self._inverse = (variances + eps).rsqrt()
        self._c1, self._c2 = torch.zeros_like(of_maps).unbind()
        self._kernels = kernels

    def final(self, columns: slice) -> torch.Tensor:
        """The whole gradient of these maps, [M, columns]."""
        scale = -self._inverse[columns] / len(self._maps)
        slope = scale * self._inverse[columns] * self._c2[columns]
        offset = scale * self._c1[columns] - slope * self._means[columns]
        maps = self._maps[:, columns]
        return (self._direct[:, columns] + torch.addcmul(offset, maps.to(slope.dtype), slope)).to(maps.dtype)

    def add(self, of_a: torch.Tensor, a: torch.Tensor, norm: Norm) -> tuple[torch.Tensor, torch.Tensor]:
        """Add what a reader's a = max(0, BN(X)) gives. Returns the gradients of gamma and beta."""
        width = a.shape[1]
        x, total = self._maps[:, :width], self._direct[:, :width]
        of_beta, of_gamma = accumulate_direct(of_a, a, x, norm, total, self._kernels.compiled_passes)
        return self._add_statistics(norm, of_beta, of_gamma)

    def add_product(
        self, dz: torch.Tensor, weight: torch.Tensor, norm: Norm
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Add what the gradient of a reader's z = a W^T gives. Returns the gradients of gamma, beta and W."""
        width = weight.shape[1]
        x, total = self._maps[:, :width], self._direct[:, :width]
        of_weight, of_beta, of_gamma = normalize_relu_multiply_backward(dz, x, norm, weight, total, self._kernels)
        return *self._add_statistics(norm, of_beta, of_gamma), of_weight.to(weight.dtype)

    def _add_statistics(
        self, norm: Norm, of_beta: torch.Tensor, of_gamma: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        width = len(of_beta)
        self._c1[:width] += norm.gamma * of_beta
        self._c2[:width] += norm.gamma * of_gamma
        return of_gamma, of_beta


def _drop(images: torch.Tensor, probability: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Dropout, drawing what F.dropout draws for these images. Returns rows and which elements are kept, bool."""
    if not probability:
        return rows_of(images), images.new_empty(0, dtype=torch.bool)
    kept = rows_of(F.dropout(torch.ones_like(images), probability) != 0)
    return _scale_kept(rows_of(images), kept, probability), kept


def _scale_kept(rows: torch.Tensor, kept: torch.Tensor, probability: float) -> torch.Tensor:
    """What dropout leaves of rows, or of their gradient."""
    return rows * kept / (1 - probability) if probability else rows


def _outputs_of(layer: LayerParameters) -> int:
    """k: the maps that a layer adds."""
    return len(layer.weight1 if layer.weight2 is None else layer.weight2)


def _unflatten(parameters: Sequence[torch.Tensor], depth: int) -> list[LayerParameters]:
    each = len(parameters) // depth
    return [LayerParameters(*parameters[start : start + each]) for start in range(0, len(parameters), each)]
