"""Which ranks share a node, and memory that they share."""

import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from distrain.processes import machine_id, process_ticks


@dataclass(frozen=True)
class Peer:
    """What every rank knows of a rank."""

    local_rank: int
    host: str
    machine: str
    """Where `pid` is valid."""
    pid: int
    ticks: int
    """When its process was created, in clock ticks since the boot."""

    @classmethod
    def own(cls, local_rank: int) -> Self:
        """This process."""
        pid = os.getpid()
        return cls(local_rank, socket.gethostname(), machine_id(), pid, process_ticks(pid) or 0)


def find_nodes(peers: Sequence[Peer]) -> list[range]:
    """The ranks of each node, in order. Launchers number the ranks of a node one after the other; where they are not
    numbered so, each rank is a node of its own."""
    starts = [
        rank
        for rank, peer in enumerate(peers)
        if rank == 0 or peer.local_rank != peers[rank - 1].local_rank + 1 or peer.machine != peers[rank - 1].machine
    ]
    return [range(start, end) for start, end in zip(starts, [*starts[1:], len(peers)], strict=True)]
