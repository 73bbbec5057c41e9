"""Decodes with torchvision on a pool of threads: its decoders release the GIL, so threads do as well as
processes and nothing has to be copied between them."""

from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch.nn.functional import interpolate

from distrain.config import DataConfig
from distrain.data.loader import Batch, Request
from distrain.data.loaders.parts import decode_part
from distrain.data.pixels import change_pixels, changes_pixels
from distrain.data.source import Found, Source


class TorchLoader:
    """Batches of which `data.prefetch` are in the making at any time."""

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
        shape = len(request.samples.ids), 3, request.size, request.size
        pinned = self._device.type == "cuda"
        images = torch.empty(shape, dtype=torch.uint8, memory_format=torch.channels_last, pin_memory=pinned)
        labels: list[int] = []
        for place in range(len(images)):
            found = self._take(request, place)
            if found is not None:
                assert isinstance(found.decoded, torch.Tensor)
                images[len(labels)] = found.decoded
                labels.append(int(self._source.index.label[found.sample]))
        return Batch(images[: len(labels)], torch.tensor(labels, dtype=torch.int64, pin_memory=pinned))

    def _take(self, request: Request, place: int) -> Found | None:
        """The sample at `place` as the network is to see it, or what replaces it; None if nothing does."""
        asked = [(request, place)]  # the last one is decoded: what replaces a sample has a window of its own

        def note_spares(request: Request) -> Request:
            following = request.spare
            if following is None:
                return request

            def spare(place: int) -> Request:
                asked.append((note_spares(following(place)), 0))
                return asked[-1][0]

            return request._replace(spare=spare)

        return self._source.take(note_spares(request), place, lambda encoded: self._make(*asked[-1], encoded))

    def _make(self, request: Request, place: int, encoded: bytes) -> torch.Tensor:
        """uint8 [3, size, size]. Raises DataError if `encoded` is no image."""
        *window, flip = (int(part[place]) for part in request.windows)
        index, sample = self._source.index, int(request.samples.ids[place])
        image = cut(encoded, int(index.height[sample]), int(index.width[sample]), *window)
        size = request.size, request.size
        if image.shape[2:] != size:
            image = interpolate(image, size, mode=self._data.interpolation, antialias=True)
        if flip:
            image = image.flip(-1)
        if request.augmented and self._changes_pixels:
            keys = tuple(int(key[place]) for key in request.samples)
            return change_pixels(image[0], self._data, self._seed, keys)  # type: ignore[arg-type]
        return image[0]


def cut(
    encoded: bytes, image_height: int, image_width: int, top: int, left: int, height: int, width: int
) -> torch.Tensor:
    """A window of an encoded image of the given size, uint8 [1, 3, height, width] in channels_last memory, black where
    it lies outside of the image. Raises DataError if it is no image."""
    first_row, last_row = max(top, 0), min(top + height, image_height)
    first_column, last_column = max(left, 0), min(left + width, image_width)
    rows, columns = max(last_row - first_row, 0), max(last_column - first_column, 0)
    part = decode_part(encoded, first_row, first_column, rows, columns)
    if (rows, columns) == (height, width):
        # Resizing takes twice as long if the memory format of a single image cannot be told from its strides.
        return part.permute(1, 2, 0)[None].permute(0, 3, 1, 2)
    window = torch.zeros(1, 3, height, width, dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
    row, column = first_row - top, first_column - left
    window[0, :, row : row + rows, column : column + columns] = part
    return window


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Copy without waiting for the copy, where the device allows it."""
    return Batch(batch.images.to(device, non_blocking=True), batch.labels.to(device, non_blocking=True))
