"""Exact validation: every sample once, on any number of ranks."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from distrain.config import Config
from distrain.data.index import Index
from distrain.data.loading.loader import Batch, Loader, normalize
from distrain.data.loading.requests import validation_requests
from distrain.parallel.group import Group


@dataclass(frozen=True)
class Accuracy:
    """Counts over the whole validation set, and the mean cross-entropy `loss`."""

    images: int
    top1: int
    top5: int
    loss: float

    def metrics(self) -> dict[str, float]:
        """Return accuracies and loss by metric name."""
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
    """Validate `network` on all samples of `index`. Every rank calls `before_batch` equally often.

    The batches do not depend on the number of ranks, which take turns, so every image goes through the same arithmetic
    and the counts are exactly equal on any number of ranks.
    """
    counts = torch.zeros(3, dtype=torch.int64, device=group.device)
    loss = torch.zeros(1, dtype=torch.float64, device=group.device)
    total_batches = -(-len(index) // config.evaluate.batch)
    batches = loader.stream(validation_requests(config, index, range(group.rank, total_batches, group.world)))
    empty = empty_batch(config.data.image_size, group.device)
    network.eval()
    try:
        for _ in range(0, total_batches, group.world):
            before_batch()
            # There may be fewer batches in the last round than ranks, but a partitioned network needs all of them.
            batch = next(batches, empty)
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
    """Return a batch without images."""
    images = torch.empty(0, 3, size, size, dtype=torch.uint8, device=device)
    return Batch(images, torch.empty(0, dtype=torch.int64, device=device))


def rank_of_label(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return how many other classes do not score lower than the true one: 0 is a top-1 hit. int64 [n].

    Ties and NaN count as misses, so a network that outputs the same for all classes, or has diverged, is never right.
    """
    true_logit = logits.gather(1, labels[:, None])
    return (~(logits < true_logit)).sum(dim=1) - 1
