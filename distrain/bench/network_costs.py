"""What a training step of a network costs, found without a clock: memory, operations, bytes and flops.

Like `models`, it imports PyTorch and, for a plot, matplotlib.
"""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.profiler import DeviceType, ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from distrain.bench.rounds import measure_interleaved, time_on_gpu, time_on_host
from distrain.models.densenet import DenseBlock, DenseNetConfig
from distrain.models.fusion import set_fused

_LARGEST = 4096  # images
_DEPTHS = (4, 8, 12, 16, 20, 24)


def saved_bytes(forward: Callable[[], torch.Tensor], network: nn.Module) -> int:
    """The bytes of the tensors that a forward pass saves for the backward pass, without parameters and buffers.

    Autocast's copies of weights count; the inputs of torch's checkpoints, which hold them in another way, do not.
    """
    own = {tensor.untyped_storage().data_ptr() for tensor in (*network.parameters(), *network.buffers())}
    sizes: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        logits = forward()
    assert logits.requires_grad
    return sum(sizes.values())


def count_traffic(step: Callable[[], object]) -> tuple[int, int, int]:
    """The operations of a step, the bytes that they read and write, and their flops, two per multiply-add.

    What compiled code does is not seen.
    """
    with _Traffic() as traffic, FlopCounterMode(display=False) as flops:
        step()
    return traffic.operations, traffic.bytes, flops.get_total_flops()


class _Traffic(TorchDispatchMode):
    """Counts operations and the bytes they read and write; views are none."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = self.bytes = 0

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = operation(*args, **(kwargs or {}))
        read = {id(leaf): leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)}
        written = [leaf for leaf in tree_leaves(results) if isinstance(leaf, torch.Tensor)]
        if not operation.is_view:
            self.operations += 1
            self.bytes += sum(leaf.nbytes for leaf in (*read.values(), *written))
        return results


def count_kernels(step: Callable[[], object]) -> int:
    """The kernels and copies that a step launches on a GPU."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        step()
    return sum(event.device_type == DeviceType.CUDA for event in profiler.events() or ())


def largest_batch(fits: Callable[[int], bool], start: int) -> int:
    """The largest number of images that `fits`, to a precision of an eighth; at most the first power of two times
    `start` above _LARGEST is tried."""
    low, high = 0, start
    while fits(high):
        low, high = high, 2 * high
        if low > _LARGEST:
            return low
    while high - low > max(1, low // 8):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def ceilings(dtype: torch.dtype, device: torch.device) -> tuple[float, float]:
    """What this device reaches in large operations: bytes per second of a copy, and flops of a matrix product."""
    is_gpu = device.type == "cuda"
    source = torch.empty((1 << 30) if is_gpu else (1 << 27), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    side = 8192 if is_gpu else 1024
    a = torch.randn(side, side, device=device, dtype=dtype)
    work = {"copy": lambda: target.copy_(source), "product": lambda: a @ a}

    def repeat(run: Callable[[], Any]) -> Callable[[], int]:
        return lambda: len([run() for _ in range(5)])

    rates = measure_interleaved(
        {name: repeat(run) for name, run in work.items()}, 5, time_on_gpu if is_gpu else time_on_host
    )
    copies, products = (rate.median for rate in rates)
    return copies * 2 * source.nbytes, products * 2 * side**3


def bytes_by_depth() -> Iterator[tuple[str, list[int]]]:
    """What dense blocks of _DEPTHS layers save for the backward pass, bytes of an image of 32 x 32, fused and plain."""
    for kind in ("plain", "fused"):
        sizes = []
        for depth in _DEPTHS:
            block = DenseBlock(64, depth, DenseNetConfig(depths=(depth,), growth_rate=32, stem_width=64))
            set_fused(block, kind == "fused")
            x = torch.randn(2, 64, 32, 32, requires_grad=True)
            sizes.append(saved_bytes(partial(block, x), block) // len(x))
        yield kind, sizes


def plot_bytes_by_depth(file: Path) -> None:
    """Plot `bytes_by_depth` as PNG, SVG or PDF. Needs matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3.5), layout="constrained")
    axes = figure.subplots()
    for kind, sizes in bytes_by_depth():
        axes.plot(_DEPTHS, [size / 2**20 for size in sizes], marker="o", label=kind)
    axes.set_xlabel("layers of a dense block (k = 32, 32 x 32 pixels)")
    axes.set_ylabel("saved for backward (MiB per image)")
    axes.set_ylim(bottom=0)
    axes.legend()
    figure.savefig(file)
