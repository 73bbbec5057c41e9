"""Encoded images fit to be decoded, and what is taken instead of those that are not."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple, TypeVar

from distrain.data.image import MAX_PIXELS, ImageError, measure
from distrain.data.index import Index
from distrain.data.loading.loader import Request
from distrain.data.loading.quarantine import Quarantine
from distrain.data.storage.store import DataError, Store

T = TypeVar("T")


class ReadSample(NamedTuple):
    """A sample that could be used: where it was asked for, and what its decoder made of it."""

    request: Request
    place: int
    decoded: object

    @property
    def sample(self) -> int:
        return int(self.request.samples.ids[self.place])


class SampleReader:
    """Reads samples from a store for a loader, vetting them against the index."""

    def __init__(self, index: Index, store: Store, quarantine: Quarantine) -> None:
        self.index = index
        self._store = store
        self._quarantine = quarantine

    def read(self, sample: int) -> bytes:
        """The encoded image. Raises DataError when it is not one that a decoder should be given."""
        width, height = int(self.index.width[sample]), int(self.index.height[sample])
        if not width or not height:
            raise DataError(f"not a readable image when it was indexed: {self._examine(sample)}")
        if width * height > MAX_PIXELS:
            raise DataError(f"{width} x {height} pixels are more than the {MAX_PIXELS:,} that are decoded")
        return self._store.read(sample)

    def read_or_replace(self, request: Request, place: int, decode: Callable[[bytes], T]) -> ReadSample | None:
        """The sample at `place`, decoded, or what replaces it if it is bad; None if nothing does.

        `decode` raises DataError for bytes it can make nothing of.
        """
        while True:
            sample = int(request.samples.ids[place])
            try:
                return ReadSample(request, place, decode(self.read(sample)))
            except DataError as error:
                self.quarantine_sample(sample, str(error))
            if request.replacement is None:
                return None
            request, place = request.replacement(place), 0

    def prefetch_ahead(self, requests: Iterable[Request]) -> Iterator[Request]:
        """Pass requests on, letting the store know of each of them as early as it says."""
        waiting: deque[Request] = deque()
        for request in requests:
            self._store.prefetch(request.samples.ids)
            waiting.append(request)
            if len(waiting) > request.ahead:
                yield waiting.popleft()
        yield from waiting

    def quarantine_sample(self, sample: int, reason: str) -> None:
        """Quarantine a sample. Raises UserError when there are too many."""
        shard = self.index.shards[int(self.index.shard[sample])].name
        self._quarantine.report(sample, f"{shard} at {int(self.index.offset[sample])}: {reason}")

    def close(self) -> None:
        self._store.close()

    def _examine(self, sample: int) -> str:
        """Why an image is none, which the index does not tell. Raises DataError if its bytes have changed since."""
        try:
            measure(self._store.read(sample))
        except ImageError as error:
            return str(error)
        return "it is one now; index the shards again"
