"""Decode images of unknown origin in a process of its own, as training does: a damaged one may crash the decoder.

`python -m distrain.data.vetting` is that process. It is one per thread, starts in a fraction of a second, without
PyTorch, and gets many images per message.
"""

import os
import resource
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple, TypeVar

from distrain.data.image import ImageError, decode_rgb, measure
from distrain.data.worker import TIMEOUT_S, Worker, WorkerEnded, serve
from distrain.errors import TemporaryError

_IMAGES = 32  # per message
_BYTES = 1 << 20  # after which a message is sent
_MEMORY = 4 << 30  # bytes, several times those of the largest image that is decoded

T = TypeVar("T")
_of_thread = threading.local()


class Verdict(NamedTuple):
    """Width and height of an image in pixels as stored, both 0 if there is a `problem`: why it cannot be decoded; and
    its mode as Pillow names it."""

    width: int
    height: int
    problem: str = ""
    mode: str = ""


def vet(images: Iterable[tuple[T, bytes]], poll: Callable[[], None]) -> Iterator[tuple[T, bytes, Verdict]]:
    """Decode encoded images, each with whatever belongs to it, and yield all of them in the same order.

    `poll` is called every now and then. Raises what it raises, and TemporaryError if an image cannot be tried.
    """
    batch: list[tuple[T, bytes]] = []
    size = 0
    for item, data in images:
        batch.append((item, data))
        size += len(data)
        if len(batch) == _IMAGES or size > _BYTES:
            yield from _vet_batch(batch, poll)
            batch, size = [], 0
    if batch:
        yield from _vet_batch(batch, poll)


def _vet_batch(batch: list[tuple[T, bytes]], poll: Callable[[], None]) -> Iterator[tuple[T, bytes, Verdict]]:
    for (item, data), verdict in zip(batch, vet_all([data for _, data in batch], poll), strict=True):
        yield item, data, verdict


def vet_all(images: Sequence[bytes], poll: Callable[[], None] = lambda: None) -> list[Verdict]:
    """Decode encoded images in the process of this thread. Raises as `vet` does.

    An image is to blame for the end of a process only if that has decoded nothing else.
    """
    worker: Worker | None = getattr(_of_thread, "worker", None)
    fresh = worker is None
    if worker is None:
        worker = _of_thread.worker = Worker(__name__)
    try:
        return [Verdict(*verdict) for verdict in worker.ask(images, poll)]
    except WorkerEnded as ended:
        del _of_thread.worker
        if len(images) > 1:
            return [vet_all([image], poll)[0] for image in images]
        if not fresh:
            return vet_all(images, poll)
        if not ended.reason:
            raise TemporaryError(
                f"the process that decodes images ended ({ended.how}), as on a host that is short of memory; run again "
                "with fewer --workers"
            ) from None
        return [Verdict(0, 0, ended.reason)]


def _decode_all(images: list[bytes]) -> list[tuple[int, int, str, str]]:
    return [_decode(image) for image in images]


def _decode(data: bytes) -> tuple[int, int, str, str]:
    signal.alarm(TIMEOUT_S)  # ends this process, wherever it is
    try:
        width, height, mode = measure(data)
        if data.startswith(b"\xff\xd8"):
            from distrain.data.jpeg import jpeg_decoder

            if jpeg_decoder.decode(data, 0, 0, height, width) is None:
                decode_rgb(data)
    except ImageError as error:
        return 0, 0, str(error), ""
    except MemoryError:
        return 0, 0, "needs too much memory", ""
    finally:
        signal.alarm(0)
    return width, height, "", mode


def _limit() -> None:
    """Decoders print what they find about every image, and a bomb takes all memory."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_DATA, (_MEMORY, _MEMORY))


if __name__ == "__main__":
    _limit()
    serve(_decode_all)
