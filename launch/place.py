"""Where a node stands among the nodes of a job, and what its processes have to know of the machine."""

import fcntl
import os
import socket
import struct
import zlib
from dataclasses import dataclass

_SIOCGIFADDR = 0x8915  # netdevice(7)
_FIRST_PORT, _PORTS = 20000, 12000  # below those that Linux gives to clients


@dataclass(frozen=True)
class Place:
    """One node of a job."""

    node: int
    nodes: int
    head: str
    """Host name or address of node 0, where all meet."""
    job: str
    """Names this start of the job, so that processes of an earlier one are not met."""

    @property
    def port(self) -> int:
        """Where node 0 listens: the same on all nodes, another for every start."""
        return _FIRST_PORT + zlib.crc32(self.job.encode()) % _PORTS


def count_ranks() -> int:
    """Processes that this node should run: one for each GPU that it may use; 1 without any."""
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return max(1, len([device for device in visible.split(",") if device.strip()]))
    import torch

    return max(1, torch.cuda.device_count())


def variables(place: Place, ranks: int) -> dict[str, str]:
    """Environment for this node's processes. What the user has set is not touched."""
    found = {
        "OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // ranks)),
        "NCCL_DEBUG": "WARN",
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "10",
    }
    if place.nodes > 1 and (interface := interface_towards(place)) is not None:
        found |= {"GLOO_SOCKET_IFNAME": interface, "NCCL_SOCKET_IFNAME": f"={interface}"}
    return {name: value for name, value in found.items() if name not in os.environ}


def interface_towards(place: Place) -> str | None:
    """The network interface over which this node and the head reach each other.

    Left alone, gloo takes the one its own host name stands for, and that is often loopback.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((place.head, place.port))  # sends nothing: asks the kernel for the route
            address = probe.getsockname()[0]
        except OSError:
            return None
    by_address = {_address_of(name): name for _, name in socket.if_nameindex()}
    if address.startswith("127.") and not place.head.startswith(("127.", "localhost")):
        # The head's own name stands for loopback, as Debian sets it up; the others cannot reach it there.
        outward = [name for found, name in by_address.items() if found and not found.startswith("127.")]
        return outward[0] if len(outward) == 1 else None
    return by_address.get(address)


def _address_of(interface: str) -> str | None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        request = struct.pack("256s", interface.encode()[:15])
        try:
            return socket.inet_ntoa(fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, request)[20:24])
        except OSError:
            return None
