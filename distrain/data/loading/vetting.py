"""Try images that may crash their decoder in a process of its own, with the loader that trains on them.

`python -m distrain.data.loading.vetting` is that process.
"""

import signal
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from numpy.typing import NDArray

from distrain.config import AugmentConfig, DataConfig
from distrain.data.augmentation.crops import CropBoxes
from distrain.data.index import Index, Shard
from distrain.data.loading.in_flight import Crop
from distrain.data.loading.loader import Request
from distrain.data.loading.loaders import open_loader
from distrain.data.loading.quarantine import Quarantine
from distrain.data.loading.reader import SampleReader
from distrain.data.sampling.plan import LaneBatch
from distrain.data.worker import TIMEOUT_S, Worker, WorkerEnded, serve

Image = tuple[Crop, bytes, tuple[int, int]]
"""What is decoded of it; the encoded image; its height and width in pixels."""


def find_crashing(images: Sequence[Image], loader: str, data: DataConfig, device: torch.device) -> dict[int, str]:
    """Decode images in a process of its own. Returns why those cannot be decoded that end it, by sample."""
    reasons: dict[int, str] = {}
    worker: Worker | None = None
    for image in images:
        worker = worker or Worker(__name__)
        try:
            worker.ask((image, loader, data, device))
        except WorkerEnded as ended:
            if not ended.reason:  # it could not start or failed otherwise: nothing is known
                break
            reasons[image[0].sample] = ended.reason
            worker = None
    return reasons


class _OneImage:
    """A store of one image."""

    def __init__(self, encoded: bytes) -> None:
        self._encoded = encoded

    def read(self, sample: int) -> bytes:
        return self._encoded

    def prefetch(self, samples: NDArray[np.int64]) -> None: ...

    def close(self) -> None: ...


def _decode(message: tuple[Image, str, DataConfig, torch.device]) -> None:
    (crop, encoded, shape), loader, data, device = message
    signal.alarm(TIMEOUT_S)
    number, wide = np.zeros(1, np.int32), np.zeros(1, np.int64)
    index = Index(
        "", (Shard("", 0, 0),), ("",), shard=number, offset=wide, size=number, label=number,
        width=np.array([shape[1]], np.int32), height=np.array([shape[0]], np.int32), crc32=number.astype(np.uint32),
    )  # fmt: skip
    top, left, height, width = (np.array([value], np.int32) for value in crop[1:5])
    boxes = CropBoxes(top, left, height, width, np.zeros(1, np.bool_))
    with TemporaryDirectory() as folder:
        reader = SampleReader(index, _OneImage(encoded), Quarantine(Path(folder) / "list", "train", 2, 1.0))
        request = Request(LaneBatch(wide, wide, wide), boxes, crop.size)
        with closing(open_loader(loader, data, AugmentConfig(), 0, 1, reader, device)) as opened:
            for _ in opened.stream([request]):
                pass
    signal.alarm(0)


if __name__ == "__main__":
    serve(_decode)
