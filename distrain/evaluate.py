"""Exact validation: every sample once, on any number of ranks."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from distrain.config import Config
from distrain.data.augment import centre_windows
from distrain.data.index import Index
from distrain.data.loader import Loader, Request, normalize
from distrain.parallel.group import Group


@dataclass(frozen=True)
class Accuracy:
    """Counts over the whole validation set; `loss` is the mean cross-entropy."""

    images: int
    top1: int
    top5: int
    loss: float

    def metrics(self) -> dict[str, float]:
        """Shares and loss under the names they are tracked by."""
        return {"val/loss": self.loss, "val/top1": self.top1 / self.images, "val/top5": self.top5 / self.images}


@torch.no_grad()
def evaluate(
    network: nn.Module,
    index: Index,
    loader: Loader,
    config: Config,
    group: Group,
    keep_going: Callable[[], bool],
) -> Accuracy | None:
    """Measure `network` on all of `index`; None if a stop was asked for on the way.

    The batches are the same whatever the number of ranks, which take them in turn, so that each image meets
    the same arithmetic and the counts are equal to the last digit.
    """
    size = config.evaluate.batch
    starts = range(0, len(index), size)
    requests = (_request(index, config, start, min(start + size, len(index))) for start in starts[group.rank :: group.world])
    counts = torch.zeros(3, dtype=torch.int64, device=group.device)
    loss = torch.zeros(1, dtype=torch.float64, device=group.device)
    batches = loader.stream(requests)
    network.eval()
    try:
        for _ in range(0, len(starts), group.world):  # in the last round some ranks may have none
            if not keep_going():
                return None
            for batch in (next(batches, None),):
                if batch is None:
                    continue
                images = normalize(batch.images, config.data.mean, config.data.std)
                with torch.autocast(group.device.type, torch.bfloat16, enabled=config.train.precision == "bf16"):
                    logits = network(images).float()
                ranks = rank_of_label(logits, batch.labels)
                counts += torch.stack([torch.ones_like(ranks), ranks < 1, ranks < 5]).sum(dim=1)
                loss += F.cross_entropy(logits, batch.labels, reduction="sum")
    finally:
        network.train()
        batches.close()
    images, top1, top5 = (int(count) for count in group.sum(counts))
    return Accuracy(images, top1, top5, float(group.sum(loss)) / images)


def rank_of_label(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """How many classes score at least as high as the true one, itself apart: 0 is a hit. int64 [n].

    A tie counts against the network, so that equal logits for all classes are not called a success.
    """
    own = logits.gather(1, labels[:, None])
    return (logits >= own).sum(dim=1) - 1


def _request(index: Index, config: Config, start: int, stop: int) -> Request:
    ids = np.arange(start, stop)
    return Request(ids, centre_windows(config.data, index.width[ids], index.height[ids]))
