"""The configurations that come with distrain: where each is from, what it promises, and what training it costs."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch

from distrain import config, models
from distrain.config import Config
from distrain.data.loading.loader import Batch, normalize
from distrain.errors import UserError
from distrain.models.complexity import count_complexity, total
from distrain.recipe.losses import make_loss
from distrain.recipe.mixing import mix_batch
from distrain.recipe.optimizers import build_optimizer

_HEADER = re.compile(r"# Source: (?P<source>.+)\n# Expected: (?P<expected>.+)\n# Status: (?P<status>.+)\n")
_IMAGES = {"imagenet": 1_281_167, "cifar10": 50_000, "cifar100": 50_000}  # for training, by the folder of the index
_BACKWARD = 2  # times the multiply-adds of the forward pass


@dataclass(frozen=True)
class Entry:
    """A configuration file whose first three lines are its source, its expected result and its status."""

    path: Path
    source: str
    expected: str
    status: str
    """Where and when it was trained with which result, or that it was not."""
    config: Config


def read_catalog(folder: Path) -> Iterator[Entry]:
    """Yield the entries in `folder` and its subfolders, by path. Files without the three lines, such as those that
    others extend, are left out. Raises UserError for a folder without any, and for a file that cannot be loaded."""
    found = False
    for path in sorted(folder.rglob("*.yaml")):
        if header := _HEADER.match(path.read_text(encoding="utf-8", errors="replace")):
            found = True
            yield Entry(path, **header.groupdict(), config=config.load(path))
    if not found:
        raise UserError(f"{folder}: no configuration that begins with the lines # Source:, # Expected: and # Status:")


def rehearse(settings: Config) -> None:
    """Set up a training and compute the loss of a few images of every size, without weights or memory for them.

    Raises UserError or RuntimeError if that is not possible.
    """
    with torch.device("meta"):
        network = models.build(settings.model.name, settings.model.num_classes, **settings.model.options)
    models.freeze(network, settings.train.freeze)
    build_optimizer(network, settings.optimizer)
    criterion = make_loss(settings.loss, "bce" if settings.loss.name == "bce" else "cross_entropy", None)
    for size in {*settings.data.train_sizes, settings.data.image_size}:
        images = torch.empty(2 * settings.data.repeats, 3, size, size, dtype=torch.uint8, device="meta")
        batch = Batch(images, torch.zeros(len(images), dtype=torch.int64, device="meta"))
        images, labels = mix_batch(batch, settings, 0, 0, 0)
        criterion(network(normalize(images, settings.data.mean, settings.data.std)), labels)


def training_images(settings: Config) -> int | None:
    """The images of an epoch, if the training data is known by its folder."""
    return _IMAGES.get(Path(settings.data.train).parent.name)


def training_cost(settings: Config) -> int | None:
    """The multiply-adds of a whole training: of forward and backward passes over all epochs; None for other data."""
    images = training_images(settings)
    if images is None:
        return None
    epochs, flops = _costs(settings)
    return round(sum(count * each for count, each in zip(epochs, flops, strict=True)) * images * (1 + _BACKWARD))


def relative_cost(settings: Config) -> float:
    """The mean multiply-adds of a training image, relative to those of the first ones, which may be smaller."""
    epochs, flops = _costs(settings)
    mean = sum(count * each for count, each in zip(epochs, flops, strict=True)) / (sum(epochs) or 1)
    return mean / flops[0]


def _costs(settings: Config) -> tuple[list[float], list[int]]:
    """For each size of training images, the epochs and the multiply-adds of an image."""
    unit = settings.train.epochs if settings.data.size_unit == "run" else 1
    starts = [start * unit for start, _ in settings.data.size_schedule] or [0.0]
    bounds = [min(start, settings.train.epochs) for start in [*starts, settings.train.epochs]]
    with torch.device("meta"):
        network = models.build(settings.model.name, settings.model.num_classes, **settings.model.options)
    flops = [total(count_complexity(network, side).values()).flops for side in settings.data.train_sizes]
    return [end - start for start, end in pairwise(bounds)], flops
