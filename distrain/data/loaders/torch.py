"""Decodes with torchvision on a pool of threads: its decoders release the GIL, so threads do as well as
processes and nothing has to be copied between them."""

from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms.v2.functional import crop, resize

from distrain.config import DataConfig
from distrain.data.index import Index
from distrain.data.loader import Batch, Request
from distrain.data.store import DataError, Store


class TorchLoader:
    """Batches of `data.image_size` squares, `data.prefetch` of them in the making at any time."""

    def __init__(self, data: DataConfig, index: Index, store: Store, device: torch.device) -> None:
        self._size = data.image_size
        self._ahead = max(data.prefetch, data.threads)
        self._labels = torch.from_numpy(index.label).long()
        self._store = store
        self._device = device
        self._pool = ThreadPoolExecutor(data.threads, thread_name_prefix="decode")

    def stream(self, requests: Iterable[Request]) -> Generator[Batch, None, None]:
        """Yield one batch per request. Raises DataError for a sample that cannot be decoded."""
        pending: deque[Future[Batch]] = deque()
        try:
            for request in requests:
                pending.append(self._pool.submit(self._load, request))
                if len(pending) > self._ahead:
                    yield self._to_device(pending.popleft().result())
            while pending:
                yield self._to_device(pending.popleft().result())
        finally:
            for future in pending:
                future.cancel()

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)
        self._store.close()

    def _to_device(self, batch: Batch) -> Batch:
        return Batch(*(part.to(self._device, non_blocking=True) for part in batch))

    def _load(self, request: Request) -> Batch:
        images = torch.empty(len(request.ids), 3, self._size, self._size, dtype=torch.uint8)
        images = images.contiguous(memory_format=torch.channels_last)
        for place, sample in enumerate(request.ids):
            top, left, height, width, flip = (int(part[place]) for part in request.windows)
            image = crop(self._decode(int(sample)), top, left, height, width)
            if (height, width) != (self._size, self._size):
                image = resize(image, [self._size, self._size], antialias=True)
            images[place] = image.flip(-1) if flip else image
        labels = self._labels[torch.from_numpy(request.ids)]
        if self._device.type == "cuda":
            return Batch(images.pin_memory(), labels.pin_memory())
        return Batch(images, labels)

    def _decode(self, sample: int) -> torch.Tensor:
        encoded = torch.frombuffer(bytearray(self._store.read(sample)), dtype=torch.uint8)
        try:
            return decode_image(encoded, mode=ImageReadMode.RGB)
        except RuntimeError as error:
            raise DataError(f"sample {sample} cannot be decoded: {error}") from error
