"""torch.compile for parts of a network."""

import torch

_MAX_GRAPHS = 64  # of one function: in training and validation, for every dtype, layout and image size


def allow_many_graphs() -> None:
    """Raise torch's limit of graphs per function. What exceeds it runs without being compiled, which torch only logs,
    or fails. The limit is one of the calling thread, and a GPU's backward pass has its own."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _MAX_GRAPHS)
