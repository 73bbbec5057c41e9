"""Settings of torch that decide how operations are computed, and that have to be set before any is."""

import os

import torch

from distrain.config import TrainConfig


def configure_numerics(train: TrainConfig) -> None:
    """Set them as configured. Called before the process group is created, since NCCL chooses its algorithms then: in
    deterministic mode it leaves out those that are not."""
    if train.deterministic or torch.are_deterministic_algorithms_enabled():  # the call imports torch's compiler
        torch.use_deterministic_algorithms(train.deterministic)
    # It would cost a pass over every new tensor.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    if train.deterministic:  # cuBLAS reads it when its first handle is created
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # cuDNN times its algorithms for every new shape; which one wins varies, and they round differently.
    torch.backends.cudnn.benchmark = not train.deterministic
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = train.tf32
