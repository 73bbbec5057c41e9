"""The GPU of a rank: which one it is, whether it works, and the CPU cores beside it."""

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from distrain.errors import TemporaryError, UserError

_PCI_DEVICES = Path("/sys/bus/pci/devices")
_DRIVER = Path("/proc/driver/nvidia/gpus")
_HIDE = "hide the GPUs with CUDA_VISIBLE_DEVICES= to train on the CPU"


def open_device(local_rank: int, local_world: int) -> torch.device:
    """The device of a rank: its GPU, which becomes the current one, or the CPU where no GPU is visible.

    Raises UserError if this host has GPUs that torch cannot use or fewer than ranks, TemporaryError if this rank's GPU
    does not work.
    """
    if not torch.cuda.is_available():
        if os.environ.get("CUDA_VISIBLE_DEVICES") is None and _DRIVER.is_dir() and any(_DRIVER.iterdir()):
            raise UserError(
                f"this host has NVIDIA GPUs that torch {torch.__version__} cannot use: install a build of torch for "
                f"the driver's CUDA version (see nvidia-smi), or {_HIDE}",
                scope="all",
            )
        return torch.device("cpu")
    gpus = torch.cuda.device_count()
    if max(local_world, local_rank + 1) > gpus:
        raise UserError(
            f"{max(local_world, local_rank + 1)} ranks on a host with {gpus} {'GPU' if gpus == 1 else 'GPUs'}: start "
            f"one rank per GPU, or {_HIDE}",
            scope="all",
        )
    device = torch.device("cuda", local_rank)
    try:
        torch.cuda.set_device(device)
        torch.zeros(1, device=device)
    except RuntimeError as error:
        reason = str(error).split("\n", 1)[0]
        raise TemporaryError(f"GPU {local_rank} of this host does not work: {reason}", scope="rank") from error
    bind_to_cores(_local_cores(_pci_address(device)))
    return device


def uuid_of(device: torch.device) -> str:
    """What tells a GPU from all others; "" for the CPU."""
    return str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else ""


def bind_to_cores(cores: set[int]) -> None:
    """Keep this process to those of `cores` that it may use, if any: those of a GPU's NUMA node reach its memory
    faster."""
    allowed = os.sched_getaffinity(0) & cores
    if allowed:
        with suppress(OSError):
            os.sched_setaffinity(0, allowed)


def _pci_address(device: torch.device) -> str:
    found: Any = torch.cuda.get_device_properties(device)  # its type does not list these
    return f"{found.pci_domain_id:04x}:{found.pci_bus_id:02x}:{found.pci_device_id:02x}.0"


def _local_cores(pci_address: str) -> set[int]:
    """The cores of the NUMA node to which a PCI device belongs; empty where the kernel does not tell."""
    try:
        ranges = (_PCI_DEVICES / pci_address / "local_cpulist").read_text().strip().split(",")
        bounds = [[int(number) for number in one.split("-")] for one in ranges if one]
    except (OSError, ValueError):
        return set()
    return {core for first, *last in bounds for core in range(first, (last or [first])[0] + 1)}
