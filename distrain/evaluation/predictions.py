"""Predict every sample of an index once, on any number of ranks, with the same result."""

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from distrain.config import Config, RunConfig
from distrain.config.schema import EvaluateConfig
from distrain.data.image import ImageError
from distrain.data.index import Index
from distrain.data.loading.loader import Batch, normalize
from distrain.data.loading.reader import SampleReader
from distrain.data.loading.requests import validation_requests
from distrain.data.loading.setup import make_loader, make_quarantine
from distrain.data.storage.remote import open_store
from distrain.data.storage.store import DataError
from distrain.evaluate import rank_of_label
from distrain.export.classifier import Classifier, read_image
from distrain.export.model import Model
from distrain.parallel.group import Group

TOP = 5


class Scores(NamedTuple):
    """What a classifier says of n samples."""

    sample: NDArray[np.int64]
    """Sample ids [n], ascending."""
    probabilities: NDArray[np.float32]
    """Of the scored outputs [n, outputs]."""
    rank: NDArray[np.int32]
    """How many other outputs do not score lower than the label [n]: 0 is a top-1 hit."""
    loss: NDArray[np.float32]
    """Cross-entropy [n]."""


class Settings(NamedTuple):
    """How an index is evaluated."""

    batch: int = 64
    """Images per forward pass."""
    flip: bool = False
    """Average the probabilities of an image and its mirror image."""
    mask: bool = False
    """Score among the classes of the data only."""
    accepted: Path | None = None
    """File of several right classes for each sample."""


def predict(
    model: Model,
    index: Index,
    labels: NDArray[np.int32],
    outputs: NDArray[np.int32],
    group: Group,
    folder: Path,
    settings: Settings,
) -> Scores:
    """Predict all samples of an index; the same on every rank.

    `labels` are the samples' classes by the model's outputs, int32 [n]; `outputs` those that are scored. Samples that
    cannot be read are left out and listed in `folder`/quarantine.jsonl. Raises UserError if none can be read.
    """
    label = torch.from_numpy(labels.astype(np.int64))
    scored = torch.from_numpy(outputs.astype(np.int64))
    position = torch.full((len(model.classes),), -1, dtype=torch.int64)
    position[scored] = torch.arange(len(scored))
    parts: list[Scores] = []
    with torch.no_grad():
        for samples, logits in _stream(model, index, group, folder, settings):
            probabilities = torch.stack([one[:, scored].double().softmax(dim=1) for one in logits]).mean(dim=0)
            target = position[label[samples]]
            likelihood = probabilities.gather(1, target[:, None])[:, 0]
            ranked = rank_of_label(logits[0][:, scored] if len(logits) == 1 else probabilities, target)
            parts.append(
                Scores(
                    samples.numpy(),
                    probabilities.float().numpy(),
                    ranked.int().numpy(),
                    (-likelihood.log()).float().numpy(),
                )
            )
    return Scores(*_join(group, parts))


class SetScores(NamedTuple):
    """What a multi-label classifier says of n samples."""

    sample: NDArray[np.int64]
    """Sample ids [n], ascending."""
    targets: NDArray[np.uint8]
    """1 for each label of the sample and 0 for each other scored output [n, outputs]."""
    probabilities: NDArray[np.float32]
    """Of the scored outputs [n, outputs], each decided by itself."""
    loss: NDArray[np.float32]
    """Binary cross-entropy, mean over the outputs [n]."""


def predict_sets(
    model: Model,
    index: Index,
    labels: NDArray[np.int32],
    outputs: NDArray[np.int32],
    group: Group,
    folder: Path,
    settings: Settings,
) -> SetScores:
    """The same for multi-label data; `labels` are the model's outputs for the classes of the index, int32 [classes]."""
    scored = torch.from_numpy(outputs.astype(np.int64))
    columns = np.searchsorted(outputs, labels)
    parts: list[SetScores] = []
    with torch.no_grad():
        for samples, logits in _stream(model, index, group, folder, settings):
            targets = np.zeros((len(samples), len(outputs)), np.uint8)
            targets[:, columns] = index.targets(samples.tolist())
            probabilities = torch.stack([one[:, scored].double().sigmoid() for one in logits]).mean(dim=0)
            loss = F.binary_cross_entropy(probabilities, torch.from_numpy(targets).double(), reduction="none")
            parts.append(
                SetScores(samples.numpy(), targets, probabilities.float().numpy(), loss.mean(dim=1).float().numpy())
            )
    return SetScores(*_join(group, parts))


def _join(group: Group, parts: Sequence[tuple[NDArray[Any], ...]]) -> Iterator[NDArray[Any]]:
    """Yield the columns of all ranks' parts, in the order of the first one, the sample."""
    joined = [part for parts_of_rank in group.gather(parts) for part in parts_of_rank]
    order = np.argsort(np.concatenate([part[0] for part in joined]))
    return (np.concatenate(columns)[order] for columns in zip(*joined, strict=True))


def _stream(
    model: Model, index: Index, group: Group, folder: Path, settings: Settings
) -> Iterator[tuple[torch.Tensor, list[torch.Tensor]]]:
    """Yield sample ids and logits, the second of mirror images, of this rank's samples."""
    config = Config(
        run=RunConfig(name=folder.name, dir=str(folder.parent)),
        data=model.preprocessing.data_config(max_bad=1.0),
        evaluate=EvaluateConfig(batch=settings.batch),
    )
    if isinstance(model, Classifier):
        return _batches(model, index, config, group, settings.flip)
    return _single_images(model, index, config, group, settings.flip)


def _batches(
    classifier: Classifier, index: Index, config: Config, group: Group, flip: bool
) -> Iterator[tuple[torch.Tensor, list[torch.Tensor]]]:
    """The samples of a classifier, read in batches as in validation.

    The batches do not depend on the number of ranks, so every image goes through the same arithmetic.
    """
    network, device = classifier.network.to(group.device), group.device
    # A batch holds labels only: give every sample its id as its label.
    numbered = replace(index, label=np.arange(len(index), dtype=np.int32))
    quarantine = make_quarantine(config, index, "val")
    count = -(-len(index) // config.evaluate.batch)
    with closing(make_loader(config, "torch", numbered, quarantine, device)) as loader:
        requests = validation_requests(config, index, range(group.rank, count, group.world))
        batch: Batch
        for batch in loader.stream(requests):
            inputs = normalize(batch.images, config.data.mean, config.data.std)
            views = [inputs, inputs.flip(-1)] if flip else [inputs]
            yield batch.labels.cpu(), [network(view).float().cpu() for view in views]


def _single_images(
    model: Model, index: Index, config: Config, group: Group, flip: bool
) -> Iterator[tuple[torch.Tensor, list[torch.Tensor]]]:
    """The same from an exported program, which gets whole images one by one and resizes them itself."""
    quarantine = make_quarantine(config, index, "val")
    with closing(SampleReader(index, open_store(index, config.download), quarantine)) as reader:
        for sample in range(group.rank, len(index), group.world):
            try:
                image = read_image(reader.read(sample))
            except (DataError, ImageError) as error:
                reader.quarantine_sample(sample, str(error))
                continue
            views = [image, image.flip(-1)] if flip else [image]
            yield torch.tensor([sample]), [model(view.contiguous()) for view in views]
