"""The 3x3 of a dense layer as Triton kernels that normalize what they load and sum what they store.

As `triton_products`, for the second half of a layer: o is the 3x3 convolution, by W2, of y = max(0, BN(z)), and y is
never stored, forward or backward. `dense_block` has the shapes.

A row of z is a pixel, p = (image h + row) w + column. The pixel i rows below and j columns to the right of it, i and j
in -1, 0, 1, is p + i w + j if it lies in the same image; otherwise it counts as zero. The weight of that pixel is tap
3 (i + 1) + j + 1.

Sums over pixels are merged as in `triton_products`.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from distrain.kernels.normalization import Norm
from distrain.kernels.triton_products import EIGHTH, PROGRAMS, merge_moments, precision_of, relu

FORWARD = {"block_m": 128, "block_k": 32, "num_warps": 8, "num_stages": 2}
BACKWARD = {"block_m": 128, "block_n": 64, "num_warps": 4, "num_stages": 2}
WEIGHT = {"block_m": 64, "block_n": 64, "num_warps": 4, "num_stages": 2}
STATISTICS = {"block": 1024, "num_warps": 4}


def normalize_relu_convolve(
    z: torch.Tensor, norm: Norm, weight: torch.Tensor, shape: torch.Size
) -> tuple[torch.Tensor, torch.Tensor]:
    """o, [M, k], from z, [M, b], and weight [k, b, 3, 3]; and mean and biased variance of its columns, [2, k].

    `shape`: [n, any, h, w], the shape of the images.
    """
    rows, inner = z.shape
    growth = len(weight)
    block = FORWARD["block_m"] - 2
    tiles = triton.cdiv(rows, block)
    o = z.new_empty((rows, growth))
    partial = torch.empty((tiles, 2, growth), dtype=torch.float32, device=z.device)
    scale = norm.scale
    _forward[(tiles,)](
        z, scale, norm.beta - norm.mean * scale, _by_tap(weight), o, partial, rows, shape[2], shape[3],
        inner // EIGHTH, growth=growth, padded=padded(growth), precision=precision_of(z), **FORWARD,
    )  # fmt: skip
    return o, merge_moments(partial, rows, block)


def padded(growth: int) -> int:
    """The width of a tile for `growth` columns: a power of 2, and no less than tensor cores take."""
    return max(16, int(triton.next_power_of_2(growth)))


def normalize_relu_convolve_backward(
    gradient: torch.Tensor, z: torch.Tensor, norm: Norm, weight: torch.Tensor, shape: torch.Size
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of z, [M, b], through its statistics too, of gamma and beta [b] and of the weight, from that of o,
    [M, k]."""
    rows, inner = z.shape
    growth = len(weight)
    tiles = triton.cdiv(rows, BACKWARD["block_m"])
    blocks = triton.cdiv(inner, BACKWARD["block_n"])
    gradient = gradient.contiguous()
    d = torch.empty_like(z)
    partial = torch.empty((tiles, 2, inner), dtype=torch.float32, device=z.device)
    scale, inverse = norm.scale, norm.inverse
    _backward[(blocks * tiles,)](  # one axis: only the first is unlimited
        gradient, z, scale, norm.beta - norm.mean * scale, norm.mean, inverse, _by_tap(weight), d, partial, rows,
        shape[2], shape[3], inner // EIGHTH, growth=growth, padded=padded(growth), precision=precision_of(z),
        **BACKWARD,
    )  # fmt: skip
    of_beta, of_gamma = partial.sum(0)
    slope = -scale * inverse * of_gamma / rows
    offset = -scale * of_beta / rows - slope * norm.mean
    _add_statistics[(triton.cdiv(z.numel(), STATISTICS["block"]),)](
        d, z, scale, slope, offset, z.numel() // EIGHTH, inner, **STATISTICS
    )
    return d, of_gamma, of_beta, _gradient_of_weight(gradient, z, norm, weight, shape)


def _gradient_of_weight(
    gradient: torch.Tensor, z: torch.Tensor, norm: Norm, weight: torch.Tensor, shape: torch.Size
) -> torch.Tensor:
    rows, inner = z.shape
    growth = len(weight)
    tiles = 3 * triton.cdiv(inner, WEIGHT["block_n"])
    blocks = triton.cdiv(rows, WEIGHT["block_m"])
    chunks = min(blocks, max(1, PROGRAMS // tiles))
    of_taps = torch.empty((chunks, 9, inner, padded(growth)), dtype=torch.float32, device=z.device)
    scale = norm.scale
    _backward_weight[(tiles, chunks)](
        gradient, z, scale, norm.beta - norm.mean * scale, of_taps, rows, shape[2], shape[3], inner // EIGHTH,
        triton.cdiv(blocks, chunks), growth=growth, padded=padded(growth), precision=precision_of(z), **WEIGHT,
    )  # fmt: skip
    of_weight = torch.empty_like(weight)  # with its strides, by which DDP has laid out its buckets
    return of_weight.copy_(of_taps.sum(0)[:, :, :growth].permute(2, 1, 0).reshape(weight.shape))


def _by_tap(weight: torch.Tensor) -> torch.Tensor:
    """[k, b, 3, 3] -> [9, b, padded k]."""
    growth, inner = weight.shape[:2]
    taps = weight.permute(2, 3, 1, 0).reshape(9, inner, growth)
    return F.pad(taps, (0, padded(growth) - growth)).contiguous()


@triton.jit
def _forward(
    z, scale, shift, weight, o, partial, rows, height, width, inner_8,
    growth: tl.constexpr, padded: tl.constexpr, block_m: tl.constexpr, block_k: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    """block_m - 2 rows of o, and a row before and after them, which are needed as neighbours only.

    Each pixel is normalized three times, not nine: products with the three weights of a row of taps are summed where
    the pixel is, and only the sums, which are narrower than z, move to the column on the left or on the right.
    """
    inner = inner_8 * 8
    tile = tl.program_id(0)
    index = tl.arange(0, block_m)
    p = tile * (block_m - 2) - 1 + index
    is_pixel = (p >= 0) & (p < rows)
    row = (p // width) % height
    column = p % width
    n = tl.arange(0, padded)
    before = tl.zeros((block_m, padded), tl.float32)
    here = tl.zeros((block_m, padded), tl.float32)
    after = tl.zeros((block_m, padded), tl.float32)
    for start in range(0, inner, block_k):
        k = start + tl.arange(0, block_k)
        is_inner = k < inner
        s = tl.load(scale + k, mask=is_inner, other=0.0)
        t = tl.load(shift + k, mask=is_inner, other=0.0)
        for tap_row in tl.static_range(3):
            i = tap_row - 1
            is_inside = is_pixel & (row + i >= 0) & (row + i < height)
            is_loaded = is_inside[:, None] & is_inner[None, :]
            loaded = tl.load(z + (p + i * width)[:, None].to(tl.int64) * inner + k[None, :], mask=is_loaded, other=0.0)
            y = tl.where(is_loaded, relu(loaded.to(tl.float32) * s[None, :] + t[None, :]), 0.0)
            y = y.to(loaded.dtype)
            w = weight + 3 * tap_row * inner * padded + k[:, None] * padded + n[None, :]
            tap = inner * padded
            before = tl.dot(y, tl.load(w, mask=is_inner[:, None], other=0.0), before, input_precision=precision)
            here = tl.dot(y, tl.load(w + tap, mask=is_inner[:, None], other=0.0), here, input_precision=precision)
            after = tl.dot(y, tl.load(w + 2 * tap, mask=is_inner[:, None], other=0.0), after, input_precision=precision)
    left = tl.maximum(index - 1, 0)[:, None] + tl.zeros((block_m, padded), tl.int32)
    right = tl.minimum(index + 1, block_m - 1)[:, None] + tl.zeros((block_m, padded), tl.int32)
    sums = here + tl.where((column > 0)[:, None], tl.gather(before, left, 0), 0.0)
    sums += tl.where((column < width - 1)[:, None], tl.gather(after, right, 0), 0.0)
    rounded = sums.to(o.dtype.element_ty)
    is_own = (is_pixel & (index > 0) & (index < block_m - 1))[:, None]
    is_map = n < growth
    tl.store(o + p[:, None].to(tl.int64) * growth + n[None, :], rounded, mask=is_own & is_map[None, :])
    values = tl.where(is_own, rounded.to(tl.float32), 0.0)
    count = tl.minimum(rows - tile * (block_m - 2), block_m - 2).to(tl.float32)
    mean = tl.sum(values, 0) / count
    centred = tl.where(is_own, values - mean[None, :], 0.0)
    tl.store(partial + tile * 2 * growth + n, mean, mask=is_map)
    tl.store(partial + (tile * 2 + 1) * growth + n, tl.sum(centred * centred, 0), mask=is_map)


@triton.jit
def _backward(
    gradient, z, scale, shift, mean, inverse, weight, d, partial, rows, height, width, inner_8,
    growth: tl.constexpr, padded: tl.constexpr, block_m: tl.constexpr, block_n: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    """A tile of D, the gradient of BN(z), and its sums: y reached the pixel at (-i, -j) by tap (i, j)."""
    inner = inner_8 * 8
    blocks_n = tl.cdiv(inner, block_n)
    tile = tl.program_id(0) // blocks_n
    p = tile * block_m + tl.arange(0, block_m)
    n = tl.program_id(0) % blocks_n * block_n + tl.arange(0, block_n)
    g = tl.arange(0, padded)
    is_pixel = p < rows
    row = (p // width) % height
    column = p % width
    is_inner = n < inner
    sums = tl.zeros((block_m, block_n), tl.float32)
    for tap in range(0, 9):
        i = tap // 3 - 1
        j = tap % 3 - 1
        is_inside = is_pixel & (row >= i) & (row - i < height) & (column >= j) & (column - j < width)
        from_row = (p - i * width - j)[:, None].to(tl.int64)
        is_loaded = is_inside[:, None] & (g < growth)[None, :]
        of_o = tl.load(gradient + from_row * growth + g[None, :], mask=is_loaded, other=0.0)
        w = weight + tap * inner * padded + n[None, :] * padded + g[:, None]
        sums = tl.dot(of_o, tl.load(w, mask=is_inner[None, :], other=0.0), sums, input_precision=precision)
    s = tl.load(scale + n, mask=is_inner, other=0.0)
    t = tl.load(shift + n, mask=is_inner, other=0.0)
    m = tl.load(mean + n, mask=is_inner, other=0.0)
    r = tl.load(inverse + n, mask=is_inner, other=0.0)
    is_stored = is_pixel[:, None] & is_inner[None, :]
    place = p[:, None].to(tl.int64) * inner + n[None, :]
    loaded = tl.load(z + place, mask=is_stored, other=0.0)
    exact = loaded.to(tl.float32)
    y = relu(exact * s[None, :] + t[None, :]).to(loaded.dtype)
    rounded = tl.where(y > 0, sums, 0.0).to(loaded.dtype)
    tl.store(d + place, rounded, mask=is_stored)
    values = rounded.to(tl.float32)
    tl.store(partial + tile * 2 * inner + n, tl.sum(values, 0), mask=is_inner)
    of_gamma = tl.sum(values * ((exact - m[None, :]) * r[None, :]), 0)
    tl.store(partial + (tile * 2 + 1) * inner + n, of_gamma, mask=is_inner)


@triton.jit
def _add_statistics(d, z, scale, slope, offset, count_8, inner, block: tl.constexpr):
    """D -> D s + z slope + offset, in place: the gradient of z."""
    place = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    is_inside = place < count_8.to(tl.int64) * 8
    column = place % inner
    of_d = tl.load(d + place, mask=is_inside, other=0.0)
    of_z = tl.load(z + place, mask=is_inside, other=0.0)
    s = tl.load(scale + column, mask=is_inside, other=0.0)
    a = tl.load(slope + column, mask=is_inside, other=0.0)
    b = tl.load(offset + column, mask=is_inside, other=0.0)
    result = of_d.to(tl.float32) * s + of_z.to(tl.float32) * a + b
    tl.store(d + place, result.to(of_d.dtype), mask=is_inside)


@triton.jit
def _backward_weight(
    gradient, z, scale, shift, of_taps, rows, height, width, inner_8, blocks,
    growth: tl.constexpr, padded: tl.constexpr, block_m: tl.constexpr, block_n: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    """The gradients of a row of three taps for block_n columns of z, over `blocks` tiles of block_m rows.

    Programs of the same rows are neighbours and find them in the cache.
    """
    inner = inner_8 * 8
    i = tl.program_id(0) % 3 - 1
    chunk = tl.program_id(1)
    n = tl.program_id(0) // 3 * block_n + tl.arange(0, block_n)
    g = tl.arange(0, padded)
    is_inner = n < inner
    is_map = (g < growth)[None, :]
    s = tl.load(scale + n, mask=is_inner, other=0.0)
    t = tl.load(shift + n, mask=is_inner, other=0.0)
    before = tl.zeros((block_n, padded), tl.float32)
    here = tl.zeros((block_n, padded), tl.float32)
    after = tl.zeros((block_n, padded), tl.float32)
    for block in range(0, blocks):
        p = (chunk * blocks + block) * block_m + tl.arange(0, block_m)
        row = (p // width) % height
        column = p % width
        is_inside = (p < rows) & (row >= i) & (row - i < height)
        is_loaded = is_inside[:, None] & is_inner[None, :]
        loaded = tl.load(z + p[:, None].to(tl.int64) * inner + n[None, :], mask=is_loaded, other=0.0)
        y = relu(loaded.to(tl.float32) * s[None, :] + t[None, :]).to(loaded.dtype)
        y = tl.trans(y)
        place = gradient + (p - i * width)[:, None].to(tl.int64) * growth + g[None, :]
        is_before = (is_inside & (column < width - 1))[:, None] & is_map  # j = -1: y is left of the pixel of o
        is_after = (is_inside & (column > 0))[:, None] & is_map
        before = tl.dot(y, tl.load(place + growth, mask=is_before, other=0.0), before, input_precision=precision)
        here = tl.dot(y, tl.load(place, mask=is_inside[:, None] & is_map, other=0.0), here, input_precision=precision)
        after = tl.dot(y, tl.load(place - growth, mask=is_after, other=0.0), after, input_precision=precision)
    place = of_taps + (chunk * 9 + 3 * (i + 1)) * inner * padded + n[:, None] * padded + g[None, :]
    tl.store(place, before, mask=is_inner[:, None])
    tl.store(place + inner * padded, here, mask=is_inner[:, None])
    tl.store(place + 2 * inner * padded, after, mask=is_inner[:, None])
