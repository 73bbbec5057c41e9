"""Decodes with torchvision on a pool of threads: its decoders release the GIL, so threads do as well as
processes and nothing has to be copied between them."""

from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import crop, resize

from distrain.config import DataConfig
from distrain.data.loader import Batch, Request
from distrain.data.pixels import change_pixels, changes_pixels
from distrain.data.source import Found, Source
from distrain.data.store import DataError


class TorchLoader:
    """Batches of `data.image_size` squares, `data.prefetch` of them in the making at any time."""

    def __init__(self, data: DataConfig, seed: int, source: Source, device: torch.device) -> None:
        self._data = data
        self._seed = seed
        self._ahead = max(data.prefetch, data.threads)
        self._changes_pixels = changes_pixels(data)
        self._source = source
        self._device = device
        self._pool = ThreadPoolExecutor(data.threads, thread_name_prefix="decode")

    def stream(self, requests: Iterable[Request]) -> Generator[Batch, None, None]:
        """Yield one batch per request. Bad samples are quarantined and replaced, or left out."""
        pending: deque[Future[Batch]] = deque()
        try:
            for request in self._source.announce(requests):
                pending.append(self._pool.submit(self.load, request))
                if len(pending) > self._ahead:
                    yield to_device(pending.popleft().result(), self._device)
            while pending:
                yield to_device(pending.popleft().result(), self._device)
        finally:
            for future in pending:
                future.cancel()

    def close(self) -> None:
        self._source.close()  # first: a thread may be waiting for a download
        self._pool.shutdown(cancel_futures=True)

    def load(self, request: Request) -> Batch:
        """Decode one request, on the calling thread and in the memory of the host."""
        size = self._data.image_size
        images = torch.empty(len(request.samples.ids), 3, size, size, dtype=torch.uint8)
        images = images.contiguous(memory_format=torch.channels_last)
        labels: list[int] = []
        for place in range(len(images)):
            found = self._source.take(request, place, decode)
            if found is not None:
                images[len(labels)] = self._cut(found)
                labels.append(int(self._source.index.label[found.sample]))
        return Batch(images[: len(labels)], torch.tensor(labels, dtype=torch.int64))

    def _cut(self, found: Found) -> torch.Tensor:
        top, left, height, width, flip = (int(part[found.place]) for part in found.request.windows)
        size = self._data.image_size
        assert isinstance(found.decoded, torch.Tensor)
        image = crop(found.decoded, top, left, height, width)
        if (height, width) != (size, size):
            image = resize(image, [size, size], InterpolationMode(self._data.interpolation), antialias=True)
        if flip:
            image = image.flip(-1)
        if found.request.augmented and self._changes_pixels:
            sample = tuple(int(key[found.place]) for key in found.request.samples)
            image = change_pixels(image, self._data, self._seed, sample)  # type: ignore[arg-type]
        return image


def decode(encoded: bytes) -> torch.Tensor:
    """An encoded image as uint8 [3, h, w], as stored: EXIF orientation is ignored. Raises DataError if it is none."""
    try:
        return decode_image(torch.frombuffer(bytearray(encoded), dtype=torch.uint8), mode=ImageReadMode.RGB)
    except (RuntimeError, ValueError) as error:
        raise DataError(f"cannot be decoded: {' '.join(str(error).split())[:100]}") from error


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Copy without waiting for the copy, where the device allows it."""
    if device.type == "cuda":
        batch = Batch(batch.images.pin_memory(), batch.labels.pin_memory())
    return Batch(batch.images.to(device, non_blocking=True), batch.labels.to(device, non_blocking=True))
