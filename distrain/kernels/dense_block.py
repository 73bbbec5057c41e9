"""A dense block in one buffer, with the statistics of every feature map taken once.

A dense layer l computes o_l = H_l([x_0, ..., x_l-1]) (Huang et al. 2017, equation 2), with H = BN-ReLU-1x1-BN-ReLU-3x3.
Run layer by layer, each one concatenates, normalizes and stores all maps before it, which takes memory and time that grow
with the square of the depth. Here all maps of a block lie in one buffer X, channels last, so that

    layer l reads the columns X[:, :C_l], C_l = C_0 + l k, and writes its k maps to X[:, C_l:C_l+k].

The mean and the variance of a map over the batch do not depend on which layer reads it; only gamma and beta do. So they
are computed once, when the map is written, and the BN and ReLU of layer l are

    a_l = max(0, X[:, :C_l] s + t),   s = gamma / sqrt(var + eps),   t = beta - mean s    (Ioffe and Szegedy 2015, alg. 1)

which is computed again in the backward pass instead of being kept. Kept are X, the output z of each 1x1, and vectors.

Shapes: M = n h w rows, one per pixel; X [M, C], C = C_0 + L k; z [M, b]; o [M, k]; weights W1 [b, C_l], W2 [k, b, 3, 3].
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

_CACHED_BYTES = 2 << 20
"""On a CPU, rows are processed in groups of about so many bytes, which remain in the cache between operations."""


class LayerParameters(NamedTuple):
    """The parameters of a dense layer; without a bottleneck the first convolution is the 3x3."""

    gamma1: torch.Tensor
    beta1: torch.Tensor
    weight1: torch.Tensor
    gamma2: torch.Tensor | None = None
    beta2: torch.Tensor | None = None
    weight2: torch.Tensor | None = None


class Norm(NamedTuple):
    """A batch normalization by given statistics, each [columns]."""

    mean: torch.Tensor
    variance: torch.Tensor
    gamma: torch.Tensor | None
    beta: torch.Tensor | None
    eps: float


class Statistics(NamedTuple):
    """What running averages need."""

    maps: torch.Tensor
    """Mean and biased variance of every map of the block, [2, C]."""
    inner: torch.Tensor
    """The same of the output of every 1x1, [layers, 2, b]; empty without bottlenecks."""


def dense_block(
    x: torch.Tensor, layers: Sequence[LayerParameters], eps: float, dropout: tuple[float, float], keep_inner: bool
) -> tuple[torch.Tensor, Statistics]:
    """All maps [n, C, h, w] of a dense block of `x` [n, C_0, h, w] in training mode, and their statistics.

    `dropout`: probabilities after the 1x1 and after the 3x3. `keep_inner`: keep the outputs of 1x1 convolutions for
    the backward pass rather than computing them again. Computes in the dtype of autocast, with statistics and sums in
    fp32 at least.
    """
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    flat = [
        tensor.to(dtype) if name.startswith("weight") else tensor
        for layer in layers
        for name, tensor in zip(LayerParameters._fields, layer, strict=True)
        if tensor is not None
    ]
    with torch.autocast(device, enabled=False):
        maps, of_maps, inner = _DenseBlock.apply(x.to(dtype), eps, dropout, keep_inner, len(layers), *flat)
    return maps, Statistics(of_maps, inner)


class _DenseBlock(torch.autograd.Function):
    """The forward and backward pass of a dense block, as the documentation of this module derives them."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        eps: float,
        dropout: tuple[float, float],
        keep_inner: bool,
        depth: int,
        *parameters: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        layers = _unflatten(parameters, depth)
        (n, width, h, w), growth = x.shape, _outputs_of(layers[0])
        total, exact = width + depth * growth, _exact(x.dtype)
        maps = x.new_empty((n, h, w, total))
        buffer = maps.view(-1, total)
        maps[..., :width] = x.permute(0, 2, 3, 1)
        means, variances = x.new_empty((2, total), dtype=exact).unbind()
        means[:width], variances[:width] = _moments(buffer[:, :width])
        kept: list[torch.Tensor] = []
        inner: list[torch.Tensor] = []
        for layer in layers:
            norm = Norm(means[:width], variances[:width], layer.gamma1, layer.beta1, eps)
            read = buffer[:, :width]
            if layer.weight2 is None:
                y, weight = _images(_normalize_relu(read, norm), n, h, w), layer.weight1
            else:
                z = _normalize_relu_multiply(read, norm, layer.weight1.flatten(1))
                z, noise = _drop(_images(z, n, h, w), dropout[0])
                inner.append(torch.stack(_moments(_rows(z))))
                norm = Norm(*inner[-1], layer.gamma2, layer.beta2, eps)
                y, weight = _images(_normalize_relu(_rows(z), norm), n, h, w), layer.weight2
                kept += [noise, z if keep_inner else z.new_empty(0)]
            written, noise = _drop(F.conv2d(y, weight, padding=1), dropout[1])
            kept.append(noise)
            columns = slice(width, width + growth)
            buffer[:, columns] = _rows(written)
            means[columns], variances[columns] = _moments(_rows(written))
            width += growth
        ctx.eps, ctx.dropout, ctx.depth, ctx.width = eps, dropout, depth, x.shape[1]
        of_maps = torch.stack((means, variances))
        of_inner = torch.stack(inner) if inner else means.new_empty(0)
        output = maps.permute(0, 3, 1, 2)
        ctx.save_for_backward(output, of_maps, of_inner, *parameters, *kept)
        ctx.mark_non_differentiable(of_maps, of_inner)
        return output, of_maps, of_inner

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor, *_: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """With G [M, C], the gradient of all maps, from the last layer to the first:

        The gradient of a map is final once all its readers are done. Through the mean and the variance, which are
        functions of the whole map, it gets (Ioffe and Szegedy 2015, section 3)

            G -= r / M (c1 + x^ c2),   r = 1 / sqrt(var + eps),   x^ = (X - mean) r,
            c1 = sum over readers of gamma sum(D),   c2 = sum over readers of gamma sum(D x^)

        where D = (dz W1) [a > 0] is the gradient of a reader's BN output. This is linear in c1 and c2, which is why it
        can wait until all readers have added to them. Directly, each reader adds D s.
        """
        output, of_maps, of_inner, *rest = ctx.saved_tensors
        sizes = len(ctx.needs_input_grad) - 5
        layers, kept = _unflatten(rest[:sizes], ctx.depth), rest[sizes:]
        n, total, h, w = output.shape
        buffer = _rows(output)
        grown = _rows(gradient.to(output.dtype).clone(memory_format=torch.channels_last))
        means, variances = of_maps.unbind()
        inverse = (variances + ctx.eps).rsqrt()
        first, second = torch.zeros_like(of_maps).unbind()  # c1 and c2
        growth, results = _outputs_of(layers[0]), []

        def final(columns: slice) -> torch.Tensor:
            """The whole gradient of these maps, [M, columns]."""
            slope = -(inverse[columns] ** 2) * second[columns] / len(buffer)
            offset = -inverse[columns] * first[columns] / len(buffer) - slope * means[columns]
            exact = grown[:, columns] + torch.addcmul(offset, buffer[:, columns].to(slope.dtype), slope)
            return exact.to(output.dtype)

        for number in reversed(range(ctx.depth)):
            layer, width = layers[number], ctx.width + number * growth
            read, add_to = buffer[:, :width], grown[:, :width]
            own = _images(final(slice(width, width + growth)), n, h, w)
            own = _undrop(own, kept.pop(), ctx.dropout[1])
            norm = Norm(means[:width], variances[:width], layer.gamma1, layer.beta1, ctx.eps)
            if layer.weight2 is None:
                y = _images(_normalize_relu(read, norm), n, h, w)
                of_y, of_weight = _convolution_backward(own, y, layer.weight1)
                d = torch.ops.aten.threshold_backward(of_y, y, 0)
                of_beta, of_gamma = _accumulate(_rows(d), read, norm, add_to)
                of_layer = [of_gamma, of_beta, of_weight]
            else:
                z, noise = kept.pop(), kept.pop()
                if not z.numel():
                    z = _images(_normalize_relu_multiply(read, norm, layer.weight1.flatten(1)), n, h, w)
                    z = _undrop(z, noise, ctx.dropout[0])
                inner = Norm(*of_inner[number], layer.gamma2, layer.beta2, ctx.eps)
                dz, of_gamma2, of_beta2, of_weight2 = _inner_backward(own, z, inner, layer.weight2)
                dz = _rows(_undrop(dz, noise, ctx.dropout[0]))
                of_weight1, of_beta, of_gamma = _read_backward(
                    dz, read, layer.weight1.flatten(1), norm, add_to
                )
                of_weight1 = of_weight1.to(layer.weight1.dtype).view_as(layer.weight1)
                of_layer = [of_gamma, of_beta, of_weight1, of_gamma2, of_beta2, of_weight2]
            first[:width] += layer.gamma1 * of_beta
            second[:width] += layer.gamma1 * of_gamma
            results.append(of_layer)
        of_x = _images(final(slice(0, ctx.width)), n, h, w) if ctx.needs_input_grad[0] else None
        return of_x, None, None, None, None, *(one for of_layer in reversed(results) for one in of_layer)


def _inner_backward(own: torch.Tensor, z: torch.Tensor, norm: Norm, weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """From the gradient of the 3x3's output to those of z, gamma2, beta2 and W2: y = max(0, BN(z)) is computed again."""
    y = _images(_normalize_relu(_rows(z), norm), *z.shape[::2], z.shape[3])
    of_y, of_weight2 = _convolution_backward(own, y, weight)
    d = torch.ops.aten.threshold_backward(of_y, y, 0)
    inverse = (norm.variance + norm.eps).rsqrt()
    dz, of_gamma2, of_beta2 = torch.ops.aten.native_batch_norm_backward(
        d, z, norm.gamma, None, None, norm.mean, inverse, True, norm.eps, [True, True, True]
    )
    return dz, of_gamma2, of_beta2, of_weight2


def _convolution_backward(
    gradient: torch.Tensor, images: torch.Tensor, weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    of_images, of_weight, _ = torch.ops.aten.convolution_backward(
        gradient, images, weight, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [True, True, False]
    )
    return of_images, of_weight


def _read_backward(
    dz: torch.Tensor, read: torch.Tensor, weight: torch.Tensor, norm: Norm, add_to: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """From the gradient of z = a W1^T to those of W1, beta and gamma; adds D s to the gradient of the maps."""
    of_weight = torch.zeros_like(weight, dtype=_exact(weight.dtype))
    of_beta, of_gamma = torch.zeros_like(norm.mean), torch.zeros_like(norm.mean)
    for part in _parts(read):
        x = read[part].contiguous()
        a = _normalize_relu(x, norm)
        of_weight += dz[part].T @ a
        d = torch.ops.aten.threshold_backward(dz[part] @ weight, a, 0)
        beta, gamma = _accumulate(d, x, norm, add_to[part])
        of_beta += beta
        of_gamma += gamma
    return of_weight, of_beta, of_gamma


def _accumulate(
    d: torch.Tensor, read: torch.Tensor, norm: Norm, add_to: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add D s to the gradient of the maps. Returns sum(D) and sum(D x^)."""
    direct, of_gamma, of_beta = torch.ops.aten.native_batch_norm_backward(
        _line(d), _line(read.contiguous()), norm.gamma, norm.mean, norm.variance, None, None, False, norm.eps,
        [True, True, True],
    )  # fmt: skip
    add_to.add_(_rows(direct))
    return of_beta, of_gamma


def _normalize_relu_multiply(read: torch.Tensor, norm: Norm, weight: torch.Tensor) -> torch.Tensor:
    """max(0, BN(read)) weight^T, [M, b], without keeping the first factor."""
    z = read.new_empty((len(read), len(weight)))
    for part in _parts(read):
        torch.mm(_normalize_relu(read[part], norm), weight.T, out=z[part])
    return z


def _normalize_relu(read: torch.Tensor, norm: Norm) -> torch.Tensor:
    """max(0, BN(read)), [M, columns], rounded once."""
    images = _line(read.contiguous())
    normalized = torch.ops.aten.native_batch_norm(
        images, norm.gamma, norm.beta, norm.mean, norm.variance, False, 0.0, norm.eps
    )[0]
    return _rows(normalized.relu_())


def _line(rows: torch.Tensor) -> torch.Tensor:
    """[M, c] -> an image of one column, [1, c, M, 1], a view with channels last, for which torch has fast kernels."""
    return rows.view(1, len(rows), 1, -1).permute(0, 3, 1, 2)


def _moments(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean and the biased variance of each column, each [columns]."""
    scratch = rows.new_zeros(2, rows.shape[1], dtype=_exact(rows.dtype))  # torch takes their dtype for the results
    mean, variance = torch.ops.aten.batch_norm_update_stats(_line(rows.contiguous()), scratch[0], scratch[1], 0.0)
    return mean, variance


def _parts(rows: torch.Tensor) -> list[slice]:
    """Groups of rows that fit the cache; one group on a GPU."""
    count = len(rows)
    if rows.device.type == "cpu":
        count = max(64, _CACHED_BYTES // (rows.shape[1] * rows.element_size()))
    return [slice(start, start + count) for start in range(0, len(rows), count)]


def _drop(images: torch.Tensor, probability: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Dropout, drawing what F.dropout would draw. Returns the images and which elements are kept, bool."""
    if not probability:
        return images, images.new_empty(0, dtype=torch.bool)
    noise = F.dropout(torch.ones_like(images), probability)
    return images * noise, noise != 0


def _undrop(images: torch.Tensor, kept: torch.Tensor, probability: float) -> torch.Tensor:
    return images * kept / (1 - probability) if probability else images


def _rows(images: torch.Tensor) -> torch.Tensor:
    """[n, c, h, w] -> [n h w, c]: a view if channels are last."""
    return images.permute(0, 2, 3, 1).reshape(-1, images.shape[1])


def _images(rows: torch.Tensor, n: int, h: int, w: int) -> torch.Tensor:
    """[n h w, c] -> [n, c, h, w], a view with channels last."""
    return rows.view(n, h, w, -1).permute(0, 3, 1, 2)


def _exact(dtype: torch.dtype) -> torch.dtype:
    """The dtype of statistics and sums."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _outputs_of(layer: LayerParameters) -> int:
    """k: the maps that a layer adds."""
    return len(layer.weight1 if layer.weight2 is None else layer.weight2)


def _unflatten(parameters: Sequence[torch.Tensor], depth: int) -> list[LayerParameters]:
    each = len(parameters) // depth
    return [LayerParameters(*parameters[start : start + each]) for start in range(0, len(parameters), each)]
