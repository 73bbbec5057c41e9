"""The 1x1 of a dense layer as Triton kernels that normalize what they load and sum what they store.

In plain PyTorch, a pass writes max(0, BN(X)) and a matrix product reads it again, forward and backward. Here a tile is
normalized in registers on its way from memory to the product, and what batch normalization needs of the result is
summed before the result leaves them. `dense_block` derives the formulas and has the same in plain PyTorch.

Sums over rows are taken tile by tile and merged in a fixed order, without atomic operations, so that results repeat bit
for bit. Columns and row strides are passed in eighths: so the compiler knows that they are multiples of 8, and loads 16
bytes at once.
"""

import torch
import triton
import triton.language as tl

from distrain.kernels.normalization import Norm

FORWARD = {"block_m": 128, "block_n": 64, "block_k": 64, "num_warps": 8, "num_stages": 3}
BACKWARD = {"block_m": 64, "block_n": 64, "num_warps": 8, "num_stages": 2}
EIGHTH = 8
PROGRAMS = 528  # four for each of the 132 multiprocessors of an H100


def normalize_relu_multiply(x: torch.Tensor, norm: Norm, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """z = max(0, BN(x)) weight^T, [M, b], and mean and biased variance of its columns, [2, b]."""
    rows, columns = x.shape
    inner = len(weight)
    tiles = triton.cdiv(rows, FORWARD["block_m"])
    z = x.new_empty((rows, inner))
    partial = torch.empty((tiles, 2, inner), dtype=torch.float32, device=x.device)
    scale = norm.scale
    _forward[(triton.cdiv(inner, FORWARD["block_n"]) * tiles,)](  # one axis: only the first is unlimited
        x, scale, norm.beta - norm.mean * scale, weight, z, partial, rows, columns // EIGHTH, x.stride(0) // EIGHTH,
        inner, precision=precision_of(x), **FORWARD,
    )  # fmt: skip
    return z, merge_moments(partial, rows, FORWARD["block_m"])


def merge_moments(partial: torch.Tensor, rows: int, block: int) -> torch.Tensor:
    """Mean and biased variance of all rows, [2, b], from mean and sum of centred squares of each tile of `block` rows,
    [tiles, 2, b] (Chan et al. 1979, equation 2.1)."""
    counts = torch.full((len(partial), 1), float(block), device=partial.device)
    counts[-1] = rows - block * (len(partial) - 1)
    means, squares = partial.unbind(1)
    mean = (means * counts).sum(0) / rows
    return torch.stack((mean, (squares + (means - mean) ** 2 * counts).sum(0) / rows))


def normalize_relu_multiply_backward(
    dz: torch.Tensor, x: torch.Tensor, norm: Norm, weight: torch.Tensor, total: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of weight [b, C], beta and gamma [C] from that of z, for constant statistics; adds that of x to
    `total`, [M, C], a slice of a buffer like that of x."""
    rows, columns = x.shape
    inner = len(weight)
    tiles = triton.cdiv(columns, BACKWARD["block_n"])
    blocks = triton.cdiv(rows, BACKWARD["block_m"])
    chunks = min(blocks, max(1, PROGRAMS // tiles))
    of_weight = torch.empty((chunks, inner, columns), dtype=torch.float32, device=x.device)
    sums = torch.empty((chunks, 2, columns), dtype=torch.float32, device=x.device)
    scale, inverse = norm.scale, norm.inverse
    _backward[(tiles, chunks)](
        dz, x, scale, norm.beta - norm.mean * scale, norm.mean, inverse, weight, total, of_weight, sums,
        rows, columns // EIGHTH, x.stride(0) // EIGHTH, total.stride(0) // EIGHTH, triton.cdiv(blocks, chunks),
        inner, triton.next_power_of_2(inner), precision=precision_of(x), **BACKWARD,
    )  # fmt: skip
    of_beta, of_gamma = sums.sum(0)
    return of_weight.sum(0), of_beta, of_gamma


def precision_of(x: torch.Tensor) -> str:
    """Of the products of `x` for `tl.dot`."""
    return "ieee" if x.dtype == torch.float32 else "tf32"


@triton.jit
def relu(x):
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)  # as torch's, so that the loss shows a NaN


@triton.jit
def _forward(
    x, scale, shift, weight, z, partial, rows, columns_8, stride_8,
    inner: tl.constexpr, block_m: tl.constexpr, block_n: tl.constexpr, block_k: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    """A tile of z: block_m rows, block_n columns. Tiles of the same rows are neighbours, so that x is read once from
    memory."""
    columns = columns_8 * 8
    stride = (stride_8 * 8).to(tl.int64)
    blocks_n = tl.cdiv(inner, block_n)
    tile = tl.program_id(0) // blocks_n
    m = tile * block_m + tl.arange(0, block_m)
    n = tl.program_id(0) % blocks_n * block_n + tl.arange(0, block_n)
    is_row = m < rows
    is_inner = n < inner
    sums = tl.zeros((block_m, block_n), tl.float32)
    for start in range(0, columns, block_k):
        k = start + tl.arange(0, block_k)
        is_column = k < columns
        maps = tl.load(x + m[:, None] * stride + k[None, :], mask=is_row[:, None] & is_column[None, :], other=0.0)
        s = tl.load(scale + k, mask=is_column, other=0.0)
        t = tl.load(shift + k, mask=is_column, other=0.0)
        a = relu(maps.to(tl.float32) * s[None, :] + t[None, :]).to(maps.dtype)
        w = tl.load(weight + n[None, :] * columns + k[:, None], mask=is_inner[None, :] & is_column[:, None], other=0.0)
        sums = tl.dot(a, w, sums, input_precision=precision)
    rounded = sums.to(z.dtype.element_ty)
    tl.store(z + m[:, None].to(tl.int64) * inner + n[None, :], rounded, mask=is_row[:, None] & is_inner[None, :])
    values = tl.where(is_row[:, None], rounded.to(tl.float32), 0.0)
    count = tl.minimum(rows - tile * block_m, block_m).to(tl.float32)
    mean = tl.sum(values, 0) / count
    centred = tl.where(is_row[:, None], values - mean[None, :], 0.0)
    tl.store(partial + tile * 2 * inner + n, mean, mask=is_inner)
    tl.store(partial + (tile * 2 + 1) * inner + n, tl.sum(centred * centred, 0), mask=is_inner)


@triton.jit
def _backward(
    dz, x, scale, shift, mean, inverse, weight, total, of_weight, sums,
    rows, columns_8, stride_8, total_stride_8, blocks,
    inner: tl.constexpr, padded: tl.constexpr, block_m: tl.constexpr, block_n: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    """block_n columns of x, in `blocks` tiles of block_m rows: D = dz W [a > 0], total += D s, and what is summed over
    rows stays in registers until the end. Programs of the same rows are neighbours and find dz in the cache."""
    columns = columns_8 * 8
    stride = (stride_8 * 8).to(tl.int64)
    total_stride = (total_stride_8 * 8).to(tl.int64)
    chunk = tl.program_id(1)
    n = tl.program_id(0) * block_n + tl.arange(0, block_n)
    b = tl.arange(0, padded)
    is_column = n < columns
    is_inner = b < inner
    s = tl.load(scale + n, mask=is_column, other=0.0)
    t = tl.load(shift + n, mask=is_column, other=0.0)
    m = tl.load(mean + n, mask=is_column, other=0.0)
    r = tl.load(inverse + n, mask=is_column, other=0.0)
    w = tl.load(weight + b[:, None] * columns + n[None, :], mask=is_inner[:, None] & is_column[None, :], other=0.0)
    product = tl.zeros((padded, block_n), tl.float32)
    beta = tl.zeros((block_n,), tl.float32)
    gamma = tl.zeros((block_n,), tl.float32)
    for block in range(0, blocks):
        row = (chunk * blocks + block) * block_m + tl.arange(0, block_m)
        is_row = row < rows
        is_inside = is_row[:, None] & is_column[None, :]
        is_loaded = is_row[:, None] & is_inner[None, :]
        g = tl.load(dz + row[:, None].to(tl.int64) * inner + b[None, :], mask=is_loaded, other=0.0)
        maps = tl.load(x + row[:, None] * stride + n[None, :], mask=is_inside, other=0.0)
        exact = maps.to(tl.float32)
        a = relu(exact * s[None, :] + t[None, :]).to(maps.dtype)
        d = tl.where(a > 0, tl.dot(g, w, input_precision=precision), 0.0)
        place = total + row[:, None] * total_stride + n[None, :]
        before = tl.load(place, mask=is_inside, other=0.0).to(tl.float32)
        tl.store(place, (before + d * s[None, :]).to(maps.dtype), mask=is_inside)
        beta += tl.sum(d, 0)
        gamma += tl.sum(d * ((exact - m[None, :]) * r[None, :]), 0)
        product = tl.dot(tl.trans(g), a, product, input_precision=precision)
    place = of_weight + chunk * inner * columns + b[:, None] * columns + n[None, :]
    tl.store(place, product, mask=is_inner[:, None] & is_column[None, :])
    tl.store(sums + chunk * 2 * columns + n, beta, mask=is_column)
    tl.store(sums + (chunk * 2 + 1) * columns + n, gamma, mask=is_column)
