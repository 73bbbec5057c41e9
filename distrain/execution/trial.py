"""The training step on example images by which time and memory are measured."""

import torch
from torch import nn

from distrain.config import Config
from distrain.execution.precision import Autocast

# Of errors that stand for a lack of memory: cuDNN and cuBLAS allocate by themselves and report it in other words.
_OUT_OF_MEMORY = (
    "out of memory",
    "GET was unable to find an engine",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_NOT_INITIALIZED",
)


def example_images(config: Config, device: torch.device, memory_format: torch.memory_format) -> torch.Tensor:
    """Return noise in the shape of a lane's largest batch: float32 [per_lane, 3, size, size]."""
    size = max(config.data.image_size, *config.data.train_sizes)
    images = torch.randn(config.batch.per_lane, 3, size, size, generator=torch.Generator().manual_seed(0))
    return images.to(device).contiguous(memory_format=memory_format)


def forward_backward(
    network: nn.Module, images: torch.Tensor, precision: str, memory_format: torch.memory_format
) -> None:
    """Run one forward and backward pass. Raises what `is_out_of_memory` recognizes if the memory is too small."""
    Autocast(network, precision, memory_format)(images).sum().backward()


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether an error means that the memory of the device is too small."""
    return isinstance(error, torch.OutOfMemoryError) or any(sign in str(error) for sign in _OUT_OF_MEMORY)
