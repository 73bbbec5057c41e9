"""Decodes and resizes on a pool of threads: decoders and PyTorch release the GIL, so threads are as fast as processes
and nothing is copied between processes."""

from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import Future

import torch

from distrain.config import AugmentConfig, DataConfig
from distrain.data.augmentation.pixels import augment_pixels, augments_pixels
from distrain.data.jpeg import Pixels
from distrain.data.loading.in_flight import Crop
from distrain.data.loading.jpeg_region import crop, resize
from distrain.data.loading.loader import Batch, Request
from distrain.data.loading.reader import SampleReader
from distrain.data.loading.threads import open_pool


class TorchLoader:
    """Decodes on the CPU with nvImageCodec and Pillow, up to `data.prefetch` batches ahead."""

    def __init__(
        self, data: DataConfig, augment: AugmentConfig, seed: int, reader: SampleReader, device: torch.device
    ) -> None:
        self._data = data
        self._augment = augment
        self._seed = seed
        self._ahead = max(data.prefetch, data.threads)
        self._augments_pixels = augments_pixels(augment)
        self._reader = reader
        self._device = device
        self._pool = open_pool(data.threads, "decode", device)

    def stream(self, requests: Iterable[Request]) -> Generator[Batch, None, None]:
        """Yield one batch per request. Bad samples are quarantined and replaced or dropped."""
        pending: deque[Future[Batch]] = deque()
        try:
            for request in self._reader.prefetch_ahead(requests):
                pending.append(self._pool.submit(self.load, request))
                if len(pending) > self._ahead:
                    yield to_device(pending.popleft().result(), self._device)
            while pending:
                yield to_device(pending.popleft().result(), self._device)
        finally:
            for future in pending:
                future.cancel()

    def close(self) -> None:
        self._reader.close()  # first: a thread may be waiting for a download
        self._pool.shutdown(cancel_futures=True)

    def load(self, request: Request) -> Batch:
        """Decode one request, on the calling thread and in host memory."""
        shape = len(request.samples.ids), 3, request.size, request.size
        pinned = self._device.type == "cuda"
        images = torch.empty(shape, dtype=torch.uint8, memory_format=torch.channels_last, pin_memory=pinned)
        pixels = images.permute(0, 2, 3, 1).numpy()
        samples: list[int] = []
        for index in range(len(images)):
            read = self._reader.read_or_replace(request, index, self._decode)
            if read is not None:
                pixels[len(samples)] = read.decoded
                samples.append(read.sample)
        labels = torch.from_numpy(self._reader.index.targets(samples))
        return Batch(images[: len(samples)], labels.pin_memory() if pinned else labels)

    def _decode(self, request: Request, index: int, encoded: bytes) -> Pixels:
        """Decode, crop, resize, flip and augment. uint8 [size, size, 3]. Raises DataError if it cannot be decoded."""
        top, left, height, width, flip = (int(column[index]) for column in request.crops)
        table, sample = self._reader.index, int(request.samples.ids[index])
        with self._reader.decoding([Crop(sample, top, left, height, width, request.size)]):
            shape = int(table.height[sample]), int(table.width[sample])
            image = crop(encoded, *shape, top, left, height, width)
        image = resize(image, request.size, self._data.interpolation, bool(flip))
        if request.augmented and self._augments_pixels:
            keys = tuple(int(column[index]) for column in request.samples)
            planes = torch.from_numpy(image).permute(2, 0, 1)
            planes = augment_pixels(planes, self._augment, self._data.mean, self._seed, keys)  # type: ignore[arg-type]
            return planes.permute(1, 2, 0).numpy()
        return image


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Copy a batch to the device, asynchronously from pinned memory."""
    return Batch(batch.images.to(device, non_blocking=True), batch.labels.to(device, non_blocking=True))
