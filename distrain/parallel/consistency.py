"""All ranks of a run must have been started alike."""

import os
import socket
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from distrain import __version__
from distrain.errors import UserError
from distrain.parallel.group import Group


def require_same_start(group: Group, settings: Mapping[str, Any]) -> None:
    """Compare every rank's settings, code, versions and number of threads with the main rank's. All ranks call this.

    Raises UserError, on every rank, that names the difference: such ranks would train a mixture.
    """
    own = {**settings, "versions": f"distrain {__version__}, torch {torch.__version__}"}
    if group.device.type == "cpu":  # the order of its sums depends on it
        own["OMP_NUM_THREADS"] = torch.get_num_threads()
    if os.environ.get("LOCAL_RANK", "0") == "0":  # once per node: it reads all source files
        own["the code's digest"] = digest_code()
    expected, main_host = group.broadcast((own, socket.gethostname()))
    difference = next(((key, value) for key, value in own.items() if value != expected.get(key, value)), None)
    reports = group.gather(difference and (socket.gethostname(), *difference))
    for rank, report in enumerate(reports):
        if report is not None:
            host, key, value = report
            raise UserError(
                f"rank {rank} on {host} was started with {key}={value} and rank 0 on {main_host} with "
                f"{key}={expected[key]}: start all ranks with the same command, code and environment"
            )


def digest_code() -> str:
    """A digest of the Python files of distrain and launch."""
    digest = sha256()
    root = Path(__file__).parents[2]
    for path in sorted([*(root / "distrain").rglob("*.py"), *(root / "launch").glob("*.py")]):
        digest.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:12]
