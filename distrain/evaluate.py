"""Exact validation: every sample once, on any number of ranks."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from distrain.config import Config
from distrain.data.index import Index
from distrain.data.loading.feed import validation_requests
from distrain.data.loading.loader import Batch, Loader, normalize
from distrain.parallel.group import Group


@dataclass(frozen=True)
class Accuracy:
    """Counts of images over the whole validation set; `loss` is the mean cross-entropy."""

    images: int
    top1: int
    top5: int
    loss: float

    def metrics(self) -> dict[str, float]:
        """Shares and loss under the names they are tracked by."""
        return {"val/loss": self.loss, "val/top1": self.top1 / self.images, "val/top5": self.top5 / self.images}

    def __str__(self) -> str:
        top1, top5 = self.top1 / self.images, self.top5 / self.images
        return f"top-1 {top1:.2%}  top-5 {top5:.2%}  of {self.images:,} images"


@torch.no_grad()
def evaluate(
    network: nn.Module,
    index: Index,
    loader: Loader,
    config: Config,
    group: Group,
    before_batch: Callable[[], object],
) -> Accuracy:
    """Measure `network` on all of `index`. `before_batch` is called as often on every rank.

    The batches are the same whatever the number of ranks, which take them in turn, so that each image meets
    the same arithmetic and the counts are equal to the last digit.
    """
    counts = torch.zeros(3, dtype=torch.int64, device=group.device)
    loss = torch.zeros(1, dtype=torch.float64, device=group.device)
    total_batches = -(-len(index) // config.evaluate.batch)
    batches = loader.stream(validation_requests(config, index, range(group.rank, total_batches, group.world)))
    nothing = empty_batch(config.data.image_size, group.device)
    network.eval()
    try:
        for _ in range(0, total_batches, group.world):
            before_batch()
            # The last round may be too short for all ranks, but a network that they share needs every one of them.
            batch = next(batches, nothing)
            images = normalize(batch.images, config.data.mean, config.data.std)
            logits = network(images).float()
            rank = rank_of_label(logits, batch.labels)
            counts += torch.stack([torch.ones_like(rank), rank < 1, rank < 5]).sum(dim=1)
            loss += F.cross_entropy(logits, batch.labels, reduction="sum")
    finally:
        network.train()
        batches.close()
    images_seen, top1, top5 = group.sum(counts).tolist()
    return Accuracy(images_seen, top1, top5, group.sum(loss).item() / images_seen)


def empty_batch(size: int, device: torch.device) -> Batch:
    """A batch of no images."""
    images = torch.empty(0, 3, size, size, dtype=torch.uint8, device=device)
    return Batch(images, torch.empty(0, dtype=torch.int64, device=device))


def rank_of_label(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """How many other classes do not score lower than the true one: 0 is a hit. int64 [n].

    Ties and NaN count against the network, so that one which says the same of all classes, or has diverged, is
    never right.
    """
    own = logits.gather(1, labels[:, None])
    return (~(logits < own)).sum(dim=1) - 1
