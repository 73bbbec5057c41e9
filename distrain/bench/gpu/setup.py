"""What every stage works with: the sizes of its work, the settings of its networks, and the record of its findings."""

import json
import os
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, NamedTuple

import torch

from distrain import config
from distrain.bench.step_cli import UNUSED_SETTINGS
from distrain.config import Config

NEEDS_GPU = "needs a GPU"


class Point(NamedTuple):
    """A network and its batch size."""

    network: str
    batch: int

    def __str__(self) -> str:
        return f"{self.network}, batch {self.batch}"


FIXED_CHOICES = ("train.memory_format=channels_last", "train.dense_block=plain")
"""For comparisons in which what is measured once must not differ."""


class Pass(NamedTuple):
    """Variants of our settings to compare with the other libraries, and the points to compare them at."""

    variants: tuple[str, ...]
    """Each is any number of overrides separated by spaces."""
    points: tuple[Point, ...]


_SMALL, _LARGE = Point("densenet121", 32), Point("regnety_16gf", 32)
_POINTS = (_SMALL, Point("densenet121", 128), Point("regnety_400mf", 128), _LARGE, Point("regnety_16gf", 128))

PASSES = (
    Pass(("", "train.graphs=off", "train.graphs=off train.memory_format=contiguous"), _POINTS),
    Pass(
        (
            "train.dense_block=plain",
            "train.dense_block=fused",
            "train.dense_block=fused train.compile=true",
            "train.dense_block=triton_1x1",
            "train.dense_block=triton",
            "train.dense_block=triton train.compile=true",
        ),
        (_SMALL, Point("densenet121", 128), Point("densenet121", 256)),
    ),
    # Compiling whole networks takes minutes for all points. These come last, so that the limit of the stage cuts off
    # nothing else.
    Pass(("train.compile=true train.dense_block=plain",), (_LARGE, Point("regnety_400mf", 128), _SMALL)),
)
"""The stage `speed`."""


@dataclass(frozen=True)
class Scale:
    """The sizes of all work."""

    small: Point
    """Bound by launching kernels."""
    large: Point
    """Bound by its kernels."""
    crowded: Point
    """Uses much memory."""
    profiled: tuple[Point, ...]
    passes: tuple[Pass, ...]
    image_size: int
    """Pixels."""
    classes: int
    steps: int
    """Per round."""
    rounds: int
    train_steps: int
    """Of a short training."""
    images: int
    """JPEG files to train on."""
    image_width: int
    """Of such a file, pixels; its height is three quarters of it."""
    threads: tuple[int, ...]
    """Numbers of decoding threads."""
    copied_bytes: int
    """Of a copy between host and GPU."""


FULL = Scale(
    small=_SMALL, large=_LARGE, crowded=Point("densenet121", 128), profiled=(_SMALL, _LARGE), passes=PASSES,
    image_size=224, classes=1000, steps=6, rounds=5, train_steps=60, images=240, image_width=500,
    threads=(0, 4, 8, 12), copied_bytes=256 << 20,
)  # fmt: skip

_TINY, _TINY_REGNET = Point("densenet_bc_22_12", 2), Point("regnety_400mf", 2)
REHEARSAL = Scale(
    small=_TINY, large=Point("densenet_bc_22_12", 4), crowded=_TINY, profiled=(_TINY_REGNET,),
    passes=(
        Pass(("train.memory_format=contiguous train.dense_block=fused",), (_TINY, _TINY_REGNET)),
        Pass(("",), (_TINY,)),
    ),
    image_size=32, classes=10, steps=1, rounds=2, train_steps=6, images=24, image_width=40, threads=(0, 1),
    copied_bytes=1 << 20,
)  # fmt: skip


class Record:
    """What a stage has found so far, kept in a file at every addition: if the stage is killed, nothing is lost."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self.results: dict[str, Any] = {}
        self.summary: list[str] = []
        self.not_measured: list[str] = []
        self.errors: list[str] = []
        self.messages: list[str] = []

    def add(self, name: str, value: Any, *lines: str) -> None:
        """Add a result, and lines that summarize it."""
        self.results[name] = value
        self.summary += lines
        self._save()

    def note(self, line: str) -> None:
        """Keep a message of distrain, such as what it has chosen for this device."""
        self.messages.append(line)
        self._save()

    def skip(self, what: str, reason: str) -> None:
        """Note what is not measured on this machine."""
        line = f"{what}: not measured: {reason}"
        if line not in self.not_measured:
            self.not_measured.append(line)
            self._save()

    def fail(self, what: str) -> None:
        """Note that the stage has failed."""
        self.errors.append(what)
        self._save()

    @contextmanager
    def attempt(self, what: str) -> Iterator[None]:
        """Note an exception as an error of `what`, and let the stage continue with what comes after."""
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            reason = " ".join(str(error).split())
            self.fail(f"{what}: {type(error).__name__}: {reason[:300]}")

    def _save(self) -> None:
        tmp = self._file.with_suffix(".tmp")
        found = {name: value for name, value in vars(self).items() if name != "_file"}
        tmp.write_text(json.dumps(found))
        tmp.rename(self._file)


@dataclass(frozen=True)
class Setup:
    """What a stage works with."""

    scale: Scale
    overrides: list[str]
    """Settings of all networks and trainings, from the command line."""
    folder: Path
    """For temporary files."""
    record: Record

    @property
    def device(self) -> torch.device:
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")

    @property
    def has_gpu(self) -> bool:
        return self.device.type == "cuda"

    def settings(self, point: Point, *words: str) -> Config:
        """The configuration of a network on synthetic images, in a run's folder of its own, as what a run has decided
        for its device is kept there."""
        folder = mkdtemp(dir=self.folder)
        sizes = [f"data.image_size={self.scale.image_size}", f"data.val_resize={self.scale.image_size}"]
        network = [f"model.name={point.network}", f"model.num_classes={self.scale.classes}"]
        batch = ["batch.lanes=1", f"batch.per_lane={point.batch}"]
        return config.load(
            None, [*UNUSED_SETTINGS, f"run.dir={folder}", *network, *sizes, *batch, *words, *self.overrides]
        )

    def allow_deterministic(self) -> None:
        """Set what some releases of PyTorch demand for deterministic matrix products; call it before CUDA is used."""
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
