"""CUDA graphs: the kernels of a micro-batch are captured once and then submitted in one call.

Launching them one by one takes longer than computing them where layers are many and small, as in a DenseNet.
"""

import logging
from collections.abc import Callable, Sequence

import torch

from distrain.config import Config
from distrain.data.loading.loader import Batch
from distrain.export.load import PROGRAMS
from distrain.parallel.group import Group

log = logging.getLogger(__name__)

Compute = Callable[[Batch], tuple[torch.Tensor, ...]]

_WARM_UP = 3  # runs before the capture, in which libraries allocate and choose algorithms


def uses_graphs(config: Config, group: Group, fused: bool, info: Callable[[str], None]) -> bool:
    """Whether to capture micro-batches, as train.graphs asks for. On a CPU there is nothing to capture, but gradients
    are kept and exchanged in the same way. `fused`: whether dense blocks are. `info` is told why if not."""
    setting = config.train.graphs
    if setting == "off" or (setting == "auto" and group.device.type == "cpu"):
        return False
    obstacles = {
        f"parallel.strategy={config.parallel.strategy} keeps the gradients": config.parallel.strategy != "ddp",
        "train.compile has its own kernels": config.train.compile and not fused,
        "parallel.batch_norm=sync exchanges statistics within a layer": config.parallel.batch_norm == "sync",
        "distill.teacher is an exported program": config.distill.teacher.endswith(PROGRAMS),
        "resilience.faults changes what is computed": bool(config.resilience.faults),
        "gradients of several nodes are exchanged during the backward pass": setting == "auto" and len(group.nodes) > 1,
    }
    reason = next((text for text, applies in obstacles.items() if applies), "")
    if reason:
        info(f"train.graphs={setting}: no CUDA graphs: {reason}")
    return not reason


class Graphed:
    """Computes micro-batches by replaying a CUDA graph, captured at the first one of each shape.

    What it returns is overwritten by the next call.
    """

    def __init__(self, images: int, state: Sequence[torch.Tensor]) -> None:
        """`images`: how many a full micro-batch has; others are computed without a graph. `state`: what computing one
        changes in place, such as gradients; a capture leaves it as it was."""
        self._images = images
        self._state = state
        self._pool = torch.cuda.graph_pool_handle()
        self._captured: dict[torch.Size, tuple[Batch, torch.cuda.CUDAGraph, tuple[torch.Tensor, ...]]] = {}
        self._failed = False

    def __call__(self, compute: Compute, batch: Batch) -> tuple[torch.Tensor, ...]:
        shape = batch.images.shape
        if self._failed or len(batch.images) != self._images:
            return compute(batch)
        if shape not in self._captured:
            try:
                self._captured[shape] = self._capture(compute, batch)
            except RuntimeError as error:
                self._failed = True
                log.warning("train.graphs: not captured: %s", str(error).split("\n", 1)[0])
                return compute(batch)
        inputs, graph, results = self._captured[shape]
        for ours, given in zip(inputs, batch, strict=True):
            ours.copy_(given)
        graph.replay()
        return results

    def _capture(self, compute: Compute, batch: Batch) -> tuple[Batch, torch.cuda.CUDAGraph, tuple[torch.Tensor, ...]]:
        before, random = [tensor.clone() for tensor in self._state], torch.cuda.get_rng_state()
        inputs = Batch(*(tensor.clone() for tensor in batch))
        graph = torch.cuda.CUDAGraph()
        try:
            aside = torch.cuda.Stream()
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):
                for _ in range(_WARM_UP):
                    compute(inputs)
            torch.cuda.current_stream().wait_stream(aside)
            with torch.cuda.graph(graph, pool=self._pool):
                results = compute(inputs)
        finally:
            for tensor, value in zip(self._state, before, strict=True):
                tensor.copy_(value)
            torch.cuda.set_rng_state(random)
        return inputs, graph, results
