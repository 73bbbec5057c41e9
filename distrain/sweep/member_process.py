"""The process that trains one member: forked from a server that has imported everything, so that it starts at once."""

import multiprocessing
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from distrain.lifetime import end_with

FORKING = multiprocessing.get_context("forkserver")
FORKING.set_forkserver_preload(["distrain.train", "torchvision.transforms.v2.functional", "pyarrow.parquet"])


def start(
    arguments: Sequence[str], log: Path, cores: Sequence[int], variables: Mapping[str, str]
) -> "multiprocessing.process.BaseProcess":
    """Start `distrain ARGUMENTS` on some cores, its output appended to `log`; it is killed when this process ends."""
    process = FORKING.Process(target=_train, args=(list(arguments), log, list(cores), dict(variables), os.getpid()))
    process.start()
    return process


def _train(arguments: list[str], log: Path, cores: list[int], variables: dict[str, str], parent: int) -> None:
    try:
        end_with(parent)
    except ProcessLookupError:
        os._exit(1)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.update(variables)
    os.sched_setaffinity(0, cores)
    import torch

    torch.set_num_threads(max(1, int(variables["OMP_NUM_THREADS"])))
    sys.argv = ["distrain", *arguments]
    from distrain.__main__ import main

    sys.exit(main())
