"""Reads encoded images for a loader, and replaces bad samples."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from distrain.data.image import MAX_PIXELS
from distrain.data.index import Index
from distrain.data.loading.in_flight import Crop, InFlight
from distrain.data.loading.loader import Request
from distrain.data.loading.quarantine import Quarantine
from distrain.data.storage.store import DataError, Store
from distrain.data.vetting import vet_all

Decode = Callable[[Request, int, bytes], object]
"""(request, index in its batch, encoded image) -> decoded image. Raises DataError if it cannot be decoded."""


@dataclass(frozen=True)
class ReadSample:
    """A decoded sample: the request it belongs to, its index in that request, and what `decode` returned."""

    request: Request
    index: int
    decoded: object

    @property
    def sample(self) -> int:
        """The sample id."""
        return int(self.request.samples.ids[self.index])


class SampleReader:
    """Reads samples from a store and checks them against the index."""

    def __init__(self, index: Index, store: Store, quarantine: Quarantine, in_flight: InFlight | None = None) -> None:
        """`in_flight` records what is being decoded, for the case of a crash."""
        self.index = index
        self._in_flight = in_flight
        self._store = store
        self._quarantine = quarantine

    def read(self, sample: int) -> bytes:
        """Return the encoded image. Raises DataError if it is not safe to decode."""
        width, height = int(self.index.width[sample]), int(self.index.height[sample])
        if not width or not height:
            raise DataError(f"was not a readable image when indexed: {self._diagnose(sample)}")
        if width * height > MAX_PIXELS:
            raise DataError(f"{width} x {height} pixels exceed the limit of {MAX_PIXELS:,}")
        if reason := self._quarantine.crash_reason(sample, int(self.index.crc32[sample])):
            raise DataError(reason)
        return self._store.read(sample)

    def read_or_replace(self, request: Request, index: int, decode: Decode) -> ReadSample | None:
        """Read and decode the sample at `index` of a request.

        A bad sample is quarantined and its replacement returned, or None if there is none. A replacement is decoded
        with its own request, because it has its own crop box. Raises UserError if there are too many bad samples.
        """
        while True:
            sample = int(request.samples.ids[index])
            try:
                return ReadSample(request, index, decode(request, index, self.read(sample)))
            except DataError as error:
                self.quarantine_sample(sample, str(error))
            if request.replacement is None:
                return None
            request, index = request.replacement(index), 0

    def decoding(self, crops: Sequence[Crop]) -> AbstractContextManager[None]:
        """The context of decoding images, which are recorded for the case that this ends the process."""
        return nullcontext() if self._in_flight is None else self._in_flight.decoding(crops)

    def prefetch_ahead(self, requests: Iterable[Request]) -> Iterator[Request]:
        """Yield the requests unchanged, and prefetch the samples of each `request.ahead` requests before its turn."""
        pending: deque[Request] = deque()
        for request in requests:
            self._store.prefetch(request.samples.ids)
            pending.append(request)
            if len(pending) > request.ahead:
                yield pending.popleft()
        yield from pending

    def quarantine_sample(self, sample: int, reason: str) -> None:
        """Quarantine a sample. Raises UserError if there are too many bad samples."""
        shard = self.index.shards[int(self.index.shard[sample])].name
        self._quarantine.add(sample, f"{shard} at {int(self.index.offset[sample])}: {reason}")

    def close(self) -> None:
        self._store.close()
        if self._in_flight is not None:
            self._in_flight.close()

    def _diagnose(self, sample: int) -> str:
        """Return why an image is unreadable, which the index does not record. Raises DataError if its bytes have
        changed since."""
        (verdict,) = vet_all([self._store.read(sample)])
        return verdict.problem or "it is now; index the shards again"
