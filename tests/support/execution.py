"""A small network and its configuration, for tests of how networks are executed."""

import copy
from pathlib import Path

import torch

from distrain import config
from distrain.execution.recomputation import blocks_of, count_kept_bytes

NETWORK = "densenet_bc_22_12"
REQUIRED = ("run.name=run", "data.train=none", "data.val=none", "data.image_size=16", "data.val_resize=16")


def settings(folder: Path, *overrides: str) -> config.Config:
    """The configuration of NETWORK in a run in `folder`."""
    small = ("batch.per_lane=4", "train.precision=fp32", "train.memory_format=contiguous", "train.dense_block=plain")
    return config.load(
        None, [*REQUIRED, *small, f"run.dir={folder}", f"model.name={NETWORK}", "model.num_classes=5", *overrides]
    )


def modes(network: torch.nn.Module) -> list[str]:
    """The recomputation mode of every block."""
    return [block.recomputation for block in blocks_of(network)]


def kept_bytes(network: torch.nn.Module, images: int) -> int:
    """Bytes that a forward pass on that many images keeps."""
    return count_kept_bytes(copy.deepcopy(network), torch.randn(images, 3, 16, 16))
