"""Ways to decode: each gives the same pixels, up to rounding, for the same windows."""

import torch

from distrain.config import AugmentConfig, DataConfig
from distrain.data.loading.loader import Loader
from distrain.data.loading.reader import SampleReader

LOADERS = ("torch", "dali")


def open_loader(
    name: str,
    data: DataConfig,
    augment: AugmentConfig,
    seed: int,
    batch: int,
    source: SampleReader,
    device: torch.device,
) -> Loader:
    """The loader `name`, for requests of at most `batch` samples."""
    if name == "dali":
        from distrain.data.loading.dali import DaliLoader

        return DaliLoader(data, augment, seed, batch, source, device)
    from distrain.data.loading.torch import TorchLoader

    return TorchLoader(data, augment, seed, source, device)
