"""Activation checkpointing: compute activations again in the backward pass instead of keeping them."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, get_args

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from distrain.errors import UserError, nearest

Recomputation = Literal["none", "full", "selective"]
RECOMPUTATIONS: tuple[Recomputation, ...] = get_args(Recomputation)

Contexts = tuple[AbstractContextManager[Any], AbstractContextManager[Any]]


def set_recomputation(network: nn.Module, mode: str) -> None:
    """Choose what the backward pass of `network` computes again (Chen et al. 2016).

    none: nothing, all activations are kept. full: everything inside a residual block or dense layer.
    selective: normalisation, ReLU, concatenation and dropout; outputs of convolutions are kept. Results,
    gradients and running statistics are the same bits in all three. Raises UserError for another mode.
    """
    if mode not in RECOMPUTATIONS:
        raise UserError(f"activation checkpointing {mode!r} is not known: {nearest(mode, RECOMPUTATIONS)}")
    for module in network.modules():
        if isinstance(module, Block):
            module.recomputation = mode


class Block(nn.Module):
    """A part of a network whose activations may be computed again. Subclasses write `compute`.

    BatchNorm statistics are updated by the first computation alone: the second normalises by the same batch
    but leaves no trace (pytorch/pytorch issue 96136 is what happens otherwise).
    """

    recomputation: Recomputation = "none"

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        if self.recomputation == "none" or not (self.training and torch.is_grad_enabled()):
            return self.compute(*inputs)
        if not torch.compiler.is_compiling():
            return checkpoint(self.compute, *inputs, use_reentrant=False, context_fn=self._contexts)
        # The compiler writes buffers back once, at the end of its graph, so it needs no care for statistics.
        if self.recomputation == "full":
            return checkpoint(self.compute, *inputs, use_reentrant=False)
        return checkpoint(self.compute, *inputs, use_reentrant=False, context_fn=_keep_convolutions)

    def compute(self, *inputs: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def _contexts(self) -> Contexts:
        first, second = _keep_convolutions() if self.recomputation == "selective" else (nullcontext(), nullcontext())
        return first, _StatisticsAside(self, second)


class _StatisticsAside(AbstractContextManager[None]):
    """Lets BatchNorm write its statistics to tensors that nobody reads, inside another context.

    BatchNorm cannot be told to write none, because autograd saves these tensors too, and checks that both
    computations save alike. A class, because a generator could be entered only once: with retain_graph=True each
    backward pass computes the block again.
    """

    def __init__(self, block: Block, inside: AbstractContextManager[Any]) -> None:
        self.norms = [module for module in block.modules() if isinstance(module, nn.BatchNorm2d)]
        self.inside = inside
        self.kept: list[tuple[nn.Module, str, torch.Tensor]] = []

    def __enter__(self) -> None:
        self.kept = [(norm, name, buffer) for norm in self.norms for name, buffer in norm.named_buffers(recurse=False)]
        for norm, name, buffer in self.kept:
            setattr(norm, name, torch.empty_like(buffer))
        self.inside.__enter__()

    def __exit__(self, *error: Any) -> bool | None:
        try:
            return self.inside.__exit__(*error)
        finally:
            for norm, name, buffer in self.kept:
                setattr(norm, name, buffer)
            self.kept = []


def _keep_convolutions() -> Contexts:
    return create_selective_checkpoint_contexts(_choose)


def _choose(_: Any, operation: Callable[..., Any], *args: Any, **kwargs: Any) -> CheckpointPolicy:
    is_convolution = operation == torch.ops.aten.convolution.default
    return CheckpointPolicy.MUST_SAVE if is_convolution else CheckpointPolicy.PREFER_RECOMPUTE
