"""BatchNorm per lane: each lane normalizes by its own batch, and running statistics are the mean over the lanes.

If the batch of a lane is split, each micro-batch counts as a lane.
"""

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from distrain.models.freezing import FrozenBatchNorm2d
from distrain.parallel.group import Group


class UncountedBatchNorm2d(nn.BatchNorm2d):
    """Batch normalization that leaves counting batches to `LaneStatistics`, which does it in one operation for all."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        assert self.momentum is not None
        mean, variance = self.running_mean, self.running_var
        return F.batch_norm(input, mean, variance, self.weight, self.bias, self.training, self.momentum, self.eps)


class LaneStatistics:
    """Averages the running statistics and metrics of a step over all lanes of all ranks, in one all-reduce.

    The running means and variances of every BatchNorm become views into one flat tensor, so a step costs three
    small vector operations and one message however deep the network is. The scalar `metrics` share that message.
    """

    def __init__(self, module: nn.Module, group: Group, lanes: int, metrics: Sequence[str]) -> None:
        self._group = group
        self._lanes = lanes
        self._metrics = tuple(metrics)
        norms = _norms_of(module)
        for norm in norms:
            if type(norm) is nn.BatchNorm2d and norm.momentum is not None:
                norm.__class__ = UncountedBatchNorm2d  # keeps its tensors and their names
        self._running = _flatten_buffers(norms, ("running_mean", "running_var"), torch.float32, group.device)
        self._batches_tracked = _flatten_buffers(norms, ("num_batches_tracked",), torch.int64, group.device)
        self._running_before = torch.empty_like(self._running)
        self._total = torch.zeros(len(self._running) + len(self._metrics), device=group.device)

    @property
    def buffers(self) -> list[torch.Tensor]:
        """The running statistics of the network, which a forward pass changes."""
        return [self._running, self._batches_tracked]

    def begin_step(self) -> None:
        """Remember the statistics that every lane of the step starts from."""
        self._running_before.copy_(self._running)
        self._batches_tracked_before = self._batches_tracked.clone()
        self._total.zero_()

    def end_lane(self, **metrics: torch.Tensor) -> None:
        """Add a lane's statistics and metrics, each float [], and reset the statistics for the next lane."""
        size = len(self._running)
        self._total[:size] += self._running
        self._total[size:] += torch.stack([metrics[name] for name in self._metrics])
        self._running.copy_(self._running_before)

    def end_step(self, applied: torch.Tensor) -> dict[str, torch.Tensor]:
        """Set the running statistics to the mean over all lanes and return the mean of every metric, float [].

        If the step was not `applied`, bool [], the statistics are left as before it.
        """
        size = len(self._running)
        mean = self._group.sum(self._total) / self._lanes
        self._running.copy_(torch.where(applied, mean[:size], self._running_before))
        # Every lane of this rank has counted a batch; a step counts as one.
        self._batches_tracked.copy_(self._batches_tracked_before + applied)
        return dict(zip(self._metrics, mean[size:].unbind(), strict=True))


@torch.no_grad()
def recompute_statistics(networks: Sequence[nn.Module], batches: Iterable[torch.Tensor], group: Group) -> None:
    """Set the running statistics of `networks` to the means of those of `batches`, with the weights as they are.

    A running average holds statistics of earlier weights too (Wu and Johnson 2021, section 3). As in pycls, the result
    is the mean of the means, and of the unbiased variances, of all batches of all ranks. `batches` are this rank's
    images [n, 3, size, size], each the batch of a lane. Networks are in training mode. All ranks call this.
    """
    norms = [norm for network in networks for norm in _norms_of(network)]
    if not norms:
        return
    buffers, counters = (
        _buffers_of(norms, ("running_mean", "running_var")),
        _buffers_of(norms, ("num_batches_tracked",)),
    )
    counted, momenta = [counter.clone() for counter in counters], [norm.momentum for norm in norms]
    sums, number = [torch.zeros_like(buffer, dtype=torch.float64) for buffer in buffers], 0
    for norm in norms:
        norm.momentum = 1.0  # so that the running statistics become those of the batch
    for images in batches:
        for network in networks:
            network(images)
        torch._foreach_add_(sums, [buffer.double() for buffer in buffers])
        number += 1
    totals = group.sum(torch.cat([*(one.flatten() for one in sums), sums[0].new_tensor([number])]))
    means = (totals[:-1] / totals[-1]).split([buffer.numel() for buffer in buffers])
    for buffer, mean in zip(buffers, means, strict=True):
        buffer.copy_(mean)
    for norm, momentum, counter, value in zip(norms, momenta, counters, counted, strict=True):
        norm.momentum = momentum
        counter.copy_(value)


def _norms_of(module: nn.Module) -> list[_BatchNorm]:
    """The normalizations with running statistics that training changes."""
    return [
        norm
        for norm in module.modules()
        if isinstance(norm, _BatchNorm) and norm.track_running_stats and not isinstance(norm, FrozenBatchNorm2d)
    ]


def _buffers_of(norms: list[_BatchNorm], names: tuple[str, ...]) -> list[torch.Tensor]:
    return [getattr(norm, name) for norm in norms for name in names]


def _flatten_buffers(
    norms: list[_BatchNorm], names: tuple[str, ...], dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """Move the named buffers of all `norms` into one flat tensor, of which they become views."""
    buffers = _buffers_of(norms, names)
    flat = torch.zeros(sum(buffer.numel() for buffer in buffers), dtype=dtype, device=device)
    for buffer, view in zip(buffers, flat.split([buffer.numel() for buffer in buffers]), strict=True):
        buffer.data = view.copy_(buffer.flatten()).view_as(buffer)
    return flat
