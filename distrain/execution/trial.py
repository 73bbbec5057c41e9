"""The forward and backward pass on example images by which time and memory are measured."""

import torch
from torch import nn

from distrain.config import Config
from distrain.execution.precision import Autocast


def example_images(config: Config, device: torch.device, memory_format: torch.memory_format) -> torch.Tensor:
    """Return noise in the shape of a lane's batch: float32 [per_lane, 3, size, size]."""
    size = config.data.image_size
    images = torch.randn(config.batch.per_lane, 3, size, size, generator=torch.Generator().manual_seed(0))
    return images.to(device).contiguous(memory_format=memory_format)


def forward_backward(network: nn.Module, images: torch.Tensor, precision: str) -> None:
    """Run one forward and backward pass. Raises torch.OutOfMemoryError."""
    Autocast(network, precision)(images).sum().backward()
