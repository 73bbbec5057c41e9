"""Decodes and resizes on a pool of threads: decoders and PyTorch release the GIL, so threads do as well as processes
and nothing has to be copied between them."""

from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from distrain.config import AugmentConfig, DataConfig
from distrain.data.augmentation.pixels import augment_pixels, augments_pixels
from distrain.data.loading.jpeg_region import Pixels, crop, resize
from distrain.data.loading.loader import Batch, Request
from distrain.data.loading.reader import ReadSample, SampleReader


class TorchLoader:
    """Batches of which `data.prefetch` are in the making at any time."""

    def __init__(
        self, data: DataConfig, augment: AugmentConfig, seed: int, source: SampleReader, device: torch.device
    ) -> None:
        self._data = data
        self._augment = augment
        self._seed = seed
        self._ahead = max(data.prefetch, data.threads)
        self._augments_pixels = augments_pixels(augment)
        self._source = source
        self._device = device
        self._pool = ThreadPoolExecutor(data.threads, thread_name_prefix="decode")

    def stream(self, requests: Iterable[Request]) -> Generator[Batch, None, None]:
        """Yield one batch per request. Bad samples are quarantined and replaced, or left out."""
        pending: deque[Future[Batch]] = deque()
        try:
            for request in self._source.prefetch_ahead(requests):
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
        shape = len(request.samples.ids), 3, request.size, request.size
        pinned = self._device.type == "cuda"
        images = torch.empty(shape, dtype=torch.uint8, memory_format=torch.channels_last, pin_memory=pinned)
        pixels = images.permute(0, 2, 3, 1).numpy()
        labels: list[int] = []
        for place in range(len(images)):
            found = self._take(request, place)
            if found is not None:
                pixels[len(labels)] = found.decoded
                labels.append(int(self._source.index.label[found.sample]))
        return Batch(images[: len(labels)], torch.tensor(labels, dtype=torch.int64, pin_memory=pinned))

    def _take(self, request: Request, place: int) -> ReadSample | None:
        """The sample at `place` as the network is to see it, or what replaces it; None if nothing does."""
        asked = [(request, place)]  # the last one is decoded: what replaces a sample has a window of its own

        def note_spares(request: Request) -> Request:
            following = request.replacement
            if following is None:
                return request

            def replacement(place: int) -> Request:
                asked.append((note_spares(following(place)), 0))
                return asked[-1][0]

            return request._replace(replacement=replacement)

        return self._source.read_or_replace(
            note_spares(request), place, lambda encoded: self._make(*asked[-1], encoded)
        )

    def _make(self, request: Request, place: int, encoded: bytes) -> Pixels:
        """uint8 [size, size, 3]. Raises DataError if `encoded` is no image."""
        *box, flip = (int(part[place]) for part in request.crops)
        index, sample = self._source.index, int(request.samples.ids[place])
        image = crop(encoded, int(index.height[sample]), int(index.width[sample]), *box)
        image = resize(image, request.size, self._data.interpolation, bool(flip))
        if request.augmented and self._augments_pixels:
            keys = tuple(int(key[place]) for key in request.samples)
            planes = torch.from_numpy(image).permute(2, 0, 1)
            planes = augment_pixels(planes, self._augment, self._data.mean, self._seed, keys)  # type: ignore[arg-type]
            return planes.permute(1, 2, 0).numpy()
        return image


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Copy without waiting for the copy, where the device allows it."""
    return Batch(batch.images.to(device, non_blocking=True), batch.labels.to(device, non_blocking=True))
