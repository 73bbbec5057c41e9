"""Activation checkpointing: recompute activations in the backward pass instead of storing them."""

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
    """Set what the backward pass of `network` recomputes (Chen et al. 2016).

    none: nothing, all activations are stored. full: everything inside each residual block or dense layer.
    selective: BN, ReLU, concatenation and dropout; convolution outputs are stored. Outputs, gradients and
    running statistics are bit-identical in all modes. Raises UserError for an unknown mode.
    """
    if mode not in RECOMPUTATIONS:
        raise UserError(f"activation checkpointing {mode!r} is not known: {nearest(mode, RECOMPUTATIONS)}")
    for module in network.modules():
        if isinstance(module, Block):
            module.recomputation = mode


class Block(nn.Module):
    """The unit of activation checkpointing: a module with `compute` in place of `forward`.

    Only the first computation updates BatchNorm's running statistics; recomputation normalizes with the same batch
    and leaves them unchanged (otherwise they would be updated twice: pytorch/pytorch issue 96136).
    """

    recomputation: Recomputation = "none"

    @property
    def is_random(self) -> bool:
        """Whether `compute` draws random numbers in training."""
        return any(isinstance(module, nn.Dropout) and module.p > 0 for module in self.modules())

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        if self.recomputation == "none" or not (self.training and torch.is_grad_enabled()):
            return self.compute(*inputs)
        if not torch.compiler.is_compiling():
            return checkpoint(
                self.compute,
                *inputs,
                use_reentrant=False,
                context_fn=self._contexts,
                preserve_rng_state=self.is_random,  # which takes the host time for every input
            )
        # Compiled graphs write buffers back once, at their end, so running statistics need no protection.
        if self.recomputation == "full":
            return checkpoint(self.compute, *inputs, use_reentrant=False)
        return checkpoint(self.compute, *inputs, use_reentrant=False, context_fn=_save_convolutions)

    def compute(self, *inputs: torch.Tensor) -> torch.Tensor:
        """Return the output of the block."""
        raise NotImplementedError

    def _contexts(self) -> Contexts:
        first, second = _save_convolutions() if self.recomputation == "selective" else (nullcontext(), nullcontext())
        return first, _PreserveStatistics(self, second)


class _PreserveStatistics(AbstractContextManager[None]):
    """Redirects BatchNorm's running statistics to scratch tensors, inside another context.

    Turning the update off is not possible: autograd saves these tensors and checks that both computations save the
    same ones. A class rather than a generator, which could be entered only once: with retain_graph=True each backward
    pass recomputes the block.
    """

    def __init__(self, block: Block, inner: AbstractContextManager[Any]) -> None:
        # A frozen one, which is not in training mode, reads its running statistics.
        self.norms = [module for module in block.modules() if isinstance(module, nn.BatchNorm2d) and module.training]
        self.inner = inner
        self.saved: list[tuple[nn.Module, str, torch.Tensor]] = []

    def __enter__(self) -> None:
        self.saved = [(norm, name, buffer) for norm in self.norms for name, buffer in norm.named_buffers(recurse=False)]
        for norm, name, buffer in self.saved:
            setattr(norm, name, torch.empty_like(buffer))
        self.inner.__enter__()

    def __exit__(self, *error: Any) -> bool | None:
        try:
            return self.inner.__exit__(*error)
        finally:
            for norm, name, buffer in self.saved:
                setattr(norm, name, buffer)
            self.saved = []


def _save_convolutions() -> Contexts:
    return create_selective_checkpoint_contexts(_policy)


def _policy(_: Any, operation: Callable[..., Any], *args: Any, **kwargs: Any) -> CheckpointPolicy:
    is_convolution = operation == torch.ops.aten.convolution.default
    return CheckpointPolicy.MUST_SAVE if is_convolution else CheckpointPolicy.PREFER_RECOMPUTE
