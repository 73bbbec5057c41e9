"""A node's rank in a job, and the environment variables of its processes."""

import fcntl
import os
import re
import socket
import struct
import zlib
from dataclasses import dataclass

_SIOCGIFADDR = 0x8915  # netdevice(7)
_FIRST_PORT, _PORTS = 20000, 12000  # below Linux's ephemeral ports


@dataclass(frozen=True)
class Node:
    """One node of a job."""

    rank: int
    """From 0 to `count` - 1."""
    count: int
    """Nodes of the job."""
    head: str
    """Host name or address of node 0, where the nodes rendezvous."""
    job: str
    """Identifies this start of the job, so that processes of an earlier start cannot join."""

    @property
    def launch(self) -> str:
        """The launcher's part of `job`, which is the same for all starts that it makes."""
        return re.split(r"[-.]", self.job)[0]

    def is_newer_than(self, job: str) -> bool:
        """Whether `job` is an earlier start by the same launcher, with ids LAUNCH-doctor, LAUNCH-0, LAUNCH-1 ..."""
        own, other = (re.fullmatch(r"(.+)-(\d+|doctor)", name) for name in (self.job, job))
        if own is None or other is None or own[1] != other[1]:
            return False
        own_start, other_start = (-1 if found[2] == "doctor" else int(found[2]) for found in (own, other))
        return own_start > other_start

    @property
    def port(self) -> int:
        """The port node 0 listens on: the same on all nodes, different for every start."""
        return _FIRST_PORT + zlib.crc32(self.job.encode()) % _PORTS


def count_ranks() -> int:
    """The default number of processes on this node: one per visible GPU, or 1."""
    return max(1, len(visible_gpus()))


def visible_gpus() -> list[str]:
    """The GPUs of this node that processes may use, as CUDA_VISIBLE_DEVICES names them."""
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        names = [device.strip() for device in visible.split(",")]
        return [name for name in names[: names.index("-1") if "-1" in names else None] if name]  # CUDA stops there
    import torch

    return [str(number) for number in range(torch.cuda.device_count())]


def rank_variables(node: Node, ranks: int) -> dict[str, str]:
    """Environment variables for the `ranks` processes of this node, except those the user has set."""
    found = {
        "OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // ranks)),
        "NCCL_DEBUG": "WARN",
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "10",
    }
    if node.count > 1 and (interface := find_interface(node)) is not None:
        found |= {"GLOO_SOCKET_IFNAME": interface, "NCCL_SOCKET_IFNAME": f"={interface}"}
    return {name: value for name, value in found.items() if name not in os.environ}


def find_interface(node: Node) -> str | None:
    """The network interface through which this node and the head reach each other; None if that is not clear.

    By default gloo uses the interface that the host's own name resolves to, which is often loopback.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((node.head, node.port))  # sends nothing, but makes the kernel choose a route
            address = probe.getsockname()[0]
        except OSError:
            return None
    by_address = {_address_of(name): name for _, name in socket.if_nameindex()}
    if address.startswith("127.") and not node.head.startswith(("127.", "localhost")):
        # Debian resolves the head's own name to loopback, where the other nodes cannot reach it.
        external = [name for found, name in by_address.items() if found and not found.startswith("127.")]
        return external[0] if len(external) == 1 else None
    return by_address.get(address)


def _address_of(interface: str) -> str | None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        request = struct.pack("256s", interface.encode()[:15])
        try:
            return socket.inet_ntoa(fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, request)[20:24])
        except OSError:
            return None
