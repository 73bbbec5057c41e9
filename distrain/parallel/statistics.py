"""BatchNorm over lanes: each lane normalises by its own batch, and running statistics take the lanes' mean.

A lane that is cut into parts counts as so many lanes.
"""

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from distrain.parallel.group import Group


class LaneStatistics:
    """Averages what the lanes of a step measured, over all ranks, in one all-reduce.

    Running means and variances of every BatchNorm are moved into one flat tensor, of which they become views,
    so a step costs three small vector operations and one message however deep the network is. Beside them
    travel a few numbers to report.
    """

    def __init__(self, module: nn.Module, group: Group, lanes: int, reported: int) -> None:
        self._group = group
        self._lanes = lanes
        norms = [norm for norm in module.modules() if isinstance(norm, _BatchNorm) and norm.track_running_stats]
        self._running = _join(norms, ("running_mean", "running_var"), torch.float32, group.device)
        self._seen = _join(norms, ("num_batches_tracked",), torch.int64, group.device)
        self._before = torch.empty_like(self._running)
        self._total = torch.zeros(len(self._running) + reported, device=group.device)

    def begin_step(self) -> None:
        self._before.copy_(self._running)
        self._seen_before = self._seen.clone()
        self._total.zero_()

    def end_lane(self, reported: torch.Tensor) -> None:
        """Take in what this lane's forward pass measured, and put the statistics back for the next lane."""
        size = len(self._running)
        self._total[:size] += self._running
        self._total[size:] += reported
        self._running.copy_(self._before)

    def end_step(self, applied: torch.Tensor) -> torch.Tensor:
        """Set the running statistics to the mean over all lanes, unless the step was not `applied`, bool []; return
        the mean of the reported numbers."""
        size = len(self._running)
        mean = self._group.sum(self._total) / self._lanes
        self._running.copy_(torch.where(applied, mean[:size], self._before))
        self._seen.copy_(self._seen_before + applied)  # every lane of this rank has counted itself
        return mean[size:]


def _join(norms: list[_BatchNorm], names: tuple[str, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Move the named buffers of all `norms` into one flat tensor, of which they become views."""
    buffers = [getattr(norm, name) for norm in norms for name in names]
    flat = torch.zeros(sum(buffer.numel() for buffer in buffers), dtype=dtype, device=device)
    for buffer, part in zip(buffers, flat.split([buffer.numel() for buffer in buffers]), strict=True):
        buffer.data = part.copy_(buffer.flatten()).view_as(buffer)
    return flat
