"""Try images that may crash their decoder in a process of its own, with the loader that trains on them.

`python -m distrain.data.loading.vetting` is that process: it reads images from standard input and answers each.
"""

import json
import signal
import struct
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Timer
from typing import Any, BinaryIO

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
from distrain.lifetime import tied

_TIMEOUT_S = 120.0  # for an image, including the start of the process
_LENGTH = struct.Struct("<Q")

Image = tuple[Crop, bytes, tuple[int, int]]
"""What is decoded of it; the encoded image; its height and width in pixels."""


def find_crashing(images: Sequence[Image], loader: str, data: DataConfig, device: torch.device) -> dict[int, str]:
    """Decode images in a process of its own. Returns why those cannot be decoded that end it, by sample."""
    reasons: dict[int, str] = {}
    waiting = list(images)
    while waiting:
        done, reason = _try(waiting, loader, data, device)
        if reason:
            reasons[waiting[done][0].sample] = reason
            done += 1
        waiting = waiting[done:]
    return reasons


def _try(images: Sequence[Image], loader: str, data: DataConfig, device: torch.device) -> tuple[int, str]:
    """Decode images in a new process until one ends it. Returns how many did not, and why the next one did."""
    command = tied([sys.executable, "-m", "distrain.data.loading.vetting"])
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        done, timed_out = 0, False
        try:
            _send(process.stdin, {"loader": loader, "data": asdict(data), "device": str(device)}, b"")
            for crop, encoded, shape in images:
                timer = Timer(_TIMEOUT_S, process.kill)
                timer.start()
                _send(process.stdin, {"crop": crop, "shape": shape}, encoded)
                answer = process.stdout.readline()
                timed_out = not timer.is_alive()
                timer.cancel()
                if not answer:
                    break
                done += 1
            process.stdin.close()
        except BrokenPipeError:
            pass
        code = process.wait()
    if done == len(images):
        return done, ""
    if timed_out:
        return done, f"was not decoded within {_TIMEOUT_S:.0f} s"
    if code < 0:
        return done, f"crashes the decoder ({signal.Signals(-code).name})"
    return len(images), ""  # the process could not start or failed otherwise: nothing is known


def _send(pipe: Any, header: dict[str, Any], content: bytes) -> None:
    text = json.dumps(header).encode()
    pipe.write(_LENGTH.pack(len(text)) + text + _LENGTH.pack(len(content)) + content)
    pipe.flush()


def _receive(pipe: BinaryIO) -> Iterator[tuple[dict[str, Any], bytes]]:
    while head := pipe.read(_LENGTH.size):
        header = json.loads(pipe.read(_LENGTH.unpack(head)[0]))
        yield header, pipe.read(_LENGTH.unpack(pipe.read(_LENGTH.size))[0])


class _OneImage:
    """A store of one image."""

    def __init__(self, encoded: bytes) -> None:
        self._encoded = encoded

    def read(self, sample: int) -> bytes:
        return self._encoded

    def prefetch(self, samples: NDArray[np.int64]) -> None: ...

    def close(self) -> None: ...


def _serve() -> None:
    messages = _receive(sys.stdin.buffer)
    settings, _ = next(messages)
    data, device = DataConfig(**settings["data"]), torch.device(settings["device"])
    with TemporaryDirectory() as folder:
        for header, encoded in messages:
            crop, (height, width) = Crop(*header["crop"]), header["shape"]
            number, wide = np.zeros(1, np.int32), np.zeros(1, np.int64)
            index = Index(
                "", (Shard("", 0, 0),), ("",), shard=number, offset=wide, size=number, label=number,
                width=np.array([width], np.int32), height=np.array([height], np.int32), crc32=number.astype(np.uint32),
            )  # fmt: skip
            reader = SampleReader(index, _OneImage(encoded), Quarantine(Path(folder) / "list", "train", 2, 1.0))
            top, left, high, broad = (np.array([value], np.int32) for value in crop[1:5])
            boxes = CropBoxes(top, left, high, broad, np.zeros(1, np.bool_))
            request = Request(LaneBatch(wide, wide, wide), boxes, crop.size)
            with closing(open_loader(settings["loader"], data, AugmentConfig(), 0, 1, reader, device)) as loader:
                for _ in loader.stream([request]):
                    pass
            print(flush=True)


if __name__ == "__main__":
    _serve()
