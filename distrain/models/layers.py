"""What both families are made of."""

from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager, nullcontext
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from distrain.errors import UserError, nearest

Recomputation = Literal["none", "block", "selective"]
RECOMPUTATIONS: tuple[Recomputation, ...] = ("none", "block", "selective")


class Block(nn.Module):
    """A part of a network whose activations may be computed again in the backward pass instead of kept.

    Subclasses write `compute`. BatchNorm statistics are updated by the first computation alone: the second
    normalises by the same batch but leaves no trace (pytorch/pytorch issue 96136 is what happens otherwise).
    """

    recomputation: Recomputation = "none"

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        if self.recomputation == "none" or not (self.training and torch.is_grad_enabled()):
            return self.compute(*inputs)
        return checkpoint(self.compute, *inputs, use_reentrant=False, context_fn=self._contexts)

    def compute(self, *inputs: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def _contexts(self) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        if self.recomputation == "block":
            return nullcontext(), self._statistics_untouched()
        first, second = create_selective_checkpoint_contexts(_keep_convolutions)
        return first, _both(second, self._statistics_untouched())

    @contextmanager
    def _statistics_untouched(self) -> Iterator[None]:
        norms = [module for module in self.modules() if isinstance(module, nn.BatchNorm2d)]
        for norm in norms:
            norm.track_running_stats = False
        try:
            yield
        finally:
            for norm in norms:
                norm.track_running_stats = True


def set_recomputation(network: nn.Module, mode: str) -> None:
    """Choose what the backward pass of `network` computes again (Chen et al. 2016).

    none: nothing, all activations are kept. block: everything inside a residual block or dense layer.
    selective: normalisation, ReLU, concatenation and dropout; outputs of convolutions are kept. Results,
    gradients and running statistics are the same bits in all three. Raises UserError for another mode.
    """
    if mode not in RECOMPUTATIONS:
        raise UserError(f"activation checkpointing {mode!r} is not known: {nearest(mode, RECOMPUTATIONS)}")
    for module in network.modules():
        if isinstance(module, Block):
            module.recomputation = mode  # type: ignore[assignment]


def conv(width_in: int, width_out: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    """A convolution without bias that keeps the size at stride 1."""
    return nn.Conv2d(
        width_in, width_out, kernel, stride=stride, padding=(kernel - 1) // 2, groups=groups, bias=False
    )


def pool_globally(x: torch.Tensor) -> torch.Tensor:
    """Mean over the map: [n, c, h, w] -> [n, c]."""
    return x.mean(dim=(2, 3))


def _keep_convolutions(context: Any, operation: Callable[..., Any], *args: Any, **kwargs: Any) -> CheckpointPolicy:
    kept = operation in (torch.ops.aten.convolution.default, torch.ops.aten.cudnn_convolution.default)
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


@contextmanager
def _both(outer: AbstractContextManager[Any], inner: AbstractContextManager[Any]) -> Iterator[None]:
    with outer, inner:
        yield
