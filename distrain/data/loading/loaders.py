"""Opens a loader by name."""

import socket

import torch

from distrain.config import AugmentConfig, DataConfig
from distrain.data.loading.loader import Loader
from distrain.data.loading.reader import SampleReader
from distrain.errors import UserError

LOADERS = ("torch", "dali")


def open_loader(
    name: str,
    data: DataConfig,
    augment: AugmentConfig,
    seed: int,
    batch: int,
    reader: SampleReader,
    device: torch.device,
    deterministic: bool = False,
) -> Loader:
    """Open the loader `name` over a reader, for requests of at most `batch` samples.

    All loaders give the same pixels, up to rounding, for the same crop boxes. `deterministic`: on a GPU, an image has
    the same pixels in any batch.
    """
    if name == "dali":
        from distrain.data.loading.dali import DaliLoader

        return DaliLoader(data, augment, seed, batch, reader, device, deterministic)
    from distrain.data.loading.torch import TorchLoader

    return TorchLoader(data, augment, seed, reader, device)


def require_dali() -> None:
    """Raise UserError if DALI is not installed on this machine."""
    if not has_dali():
        raise UserError(
            f"data.loader=dali needs NVIDIA DALI, which is not installed on {socket.gethostname()}: install "
            "nvidia-dali-cuda130 or set data.loader=torch",
            scope="rank",
        )


def has_dali() -> bool:
    """Whether DALI is installed on this machine."""
    try:
        import nvidia.dali  # noqa: F401
    except ImportError:
        return False
    return True
