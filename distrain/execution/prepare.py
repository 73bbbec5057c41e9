"""Prepare a network for its device: dense blocks, memory format, recomputation, micro-batches that fit, compilation.

What is measured is measured once in the life of a run and kept, because another choice rounds differently.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from distrain.config import Config
from distrain.decisions import RunDecisions
from distrain.errors import UserError
from distrain.execution.compile import compile_regions
from distrain.execution.dense_blocks import choose_dense_block, has_dense_blocks
from distrain.execution.fitting import fit_memory
from distrain.execution.graphs import uses_graphs
from distrain.execution.memory_format import DEFAULT, MEMORY_FORMATS, find_faster_format
from distrain.execution.recomputation import blocks_of, find_least_level, recompute_level, set_level
from distrain.execution.trial import example_images, forward_backward
from distrain.kernels.choice import KERNELS, TORCH
from distrain.models.freezing import FrozenBatchNorm2d
from distrain.models.fusion import set_fused
from distrain.parallel.group import Group
from distrain.recipe.optimizers import build_optimizer, state_names

_BUFFER_BYTES = 512 << 20  # of NCCL and nvJPEG


@dataclass(frozen=True)
class Execution:
    """How the network of a run is executed."""

    memory_format: torch.memory_format
    """Of the images that the network receives."""
    splits: int
    """Micro-batches that the batch of a lane is split into; more than one if it does not fit the device's memory."""
    graphs: bool
    """Whether micro-batches are captured as CUDA graphs."""


def prepare(config: Config, network: nn.Module, group: Group, info: Callable[[str], None]) -> Execution:
    """Set up `network` in place as configured, and return what the training loop has to know. All ranks call this.

    Raises UserError if the device cannot do what is configured.
    """
    decisions = RunDecisions(config.run.folder)

    def decide(name: str, measure: Callable[[], Any]) -> Any:
        return group.broadcast(decisions.get(name, measure) if group.is_main else None)

    if config.parallel.batch_norm == "sync":
        _convert_to_sync_batch_norm(network, group)

    kind: str = config.train.dense_block if has_dense_blocks(network) else "plain"
    if kind == "auto":
        started = group.is_main and "lane_splits" in decisions  # by an earlier release, whose blocks were plain
        choose = partial(choose_dense_block, config, network, group.device, info)
        kind = decide("dense_block", (lambda: "plain") if started else choose)
    if kind.startswith("triton"):
        _require_triton(config, group.device)
    fused = kind != "plain"
    kernels = KERNELS[kind] if fused else TORCH
    set_fused(network, fused, kernels)

    name = config.train.memory_format
    if name == "auto":
        name = decide("memory_format", partial(_choose_format, config, network, fused, group.device, info))
    memory_format = MEMORY_FORMATS[name]
    network.to(memory_format=memory_format)

    blocks = blocks_of(network)
    if config.train.recompute == "auto":
        level = decide("recompute_level", partial(find_least_level, config, network, group.device, info))
    else:
        level = recompute_level(config.train.recompute, blocks)
    set_level(blocks, level)

    splits = int(decide("lane_splits", lambda: 1))
    # On a CPU, a process that allocates too much is killed without an exception to catch.
    if group.device.type == "cuda" and config.parallel.batch_norm == "lane":
        images = example_images(config, group.device, memory_format)
        reserved = reserved_bytes(config, network, group)

        def trial_step(network: nn.Module, images: torch.Tensor) -> None:
            state = torch.empty(reserved, dtype=torch.uint8, device=group.device)
            forward_backward(network, images, config.train.precision, memory_format)
            del state

        splits = fit_memory(network, images, splits, group, trial_step, info)
        if group.is_main:
            decisions.set("lane_splits", splits)
    if config.train.compile and fused:  # not before, as what measures memory cannot look into compiled code
        set_fused(network, fused, kernels._replace(compiled_passes=True))
    elif config.train.compile:
        compile_regions(network)
    return Execution(memory_format, splits, uses_graphs(config, group, fused, info))


def _choose_format(
    config: Config, network: nn.Module, fused: bool, device: torch.device, info: Callable[[str], None]
) -> str:
    if fused or config.train.deterministic:  # what is timed may differ between two runs
        reason = "of train.deterministic" if config.train.deterministic else "fused dense blocks are"
        info(f"train.memory_format=auto: {DEFAULT}, not measured because {reason}")
        return DEFAULT
    return find_faster_format(config, network, device, info)


def reserved_bytes(config: Config, network: nn.Module, group: Group) -> int:
    """What a rank holds in training beside weights, gradients and activations: optimizer state, EMA, and the buffers of
    NCCL and of the decoder. Less one copy of the weights, as a trial is on a copy of the network."""
    optimizer = build_optimizer(network, config.optimizer)
    copies = float(len(state_names(optimizer)))
    if config.parallel.offload:
        copies = 0
    elif config.parallel.strategy not in ("ddp", "zero0"):
        copies /= group.world
    copies += config.ema.enabled
    weights = sum(parameter.nbytes for parameter in network.parameters())
    return max(0, int((copies - 1) * weights)) + _BUFFER_BYTES


def _convert_to_sync_batch_norm(network: nn.Module, group: Group) -> None:
    if group.device.type != "cuda":
        raise UserError("parallel.batch_norm=sync works on GPUs only: set parallel.batch_norm=lane")
    for parent in list(network.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.BatchNorm2d) and not isinstance(child, FrozenBatchNorm2d):
                setattr(parent, name, nn.SyncBatchNorm.convert_sync_batchnorm(child))


def _require_triton(config: Config, device: torch.device) -> None:
    """Raises UserError where no dense block could be computed by Triton kernels."""
    reasons = {
        "a GPU": device.type == "cpu",
        "train.precision=bf16 or fp16": config.train.precision == "fp32",
        "Triton, which is not installed": find_spec("triton") is None,
        "a GPU of compute capability 8.0": device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0),
    }
    if missing := next((text for text, applies in reasons.items() if applies), ""):
        raise UserError(f"train.dense_block={config.train.dense_block} needs {missing}: set train.dense_block=fused")
