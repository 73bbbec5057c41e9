"""Which ranks share a node, and memory that they share."""

import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from distrain.errors import UserError
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
    gpu: str = ""
    """What tells its GPU from all others; empty: it trains on the CPU."""

    @classmethod
    def own(cls, local_rank: int, gpu: str = "") -> Self:
        """This process."""
        pid = os.getpid()
        return cls(local_rank, socket.gethostname(), machine_id(), pid, process_ticks(pid) or 0, gpu)


def find_nodes(peers: Sequence[Peer]) -> list[range]:
    """The ranks of each node, in order. Launchers number the ranks of a node one after the other; where they are not
    numbered so, each rank is a node of its own."""
    starts = [
        rank
        for rank, peer in enumerate(peers)
        if rank == 0 or peer.local_rank != peers[rank - 1].local_rank + 1 or peer.machine != peers[rank - 1].machine
    ]
    return [range(start, end) for start, end in zip(starts, [*starts[1:], len(peers)], strict=True)]


def require_own_gpus(peers: Sequence[Peer]) -> None:
    """Raises UserError, on every rank, unless every rank has a GPU of its own, or none has one."""
    without = [rank for rank, peer in enumerate(peers) if not peer.gpu]
    if 0 < len(without) < len(peers):
        rank = without[0]
        raise UserError(
            f"rank {rank} on {peers[rank].host} has no GPU and others have one: exclude that host, or hide the GPUs of "
            "all hosts with CUDA_VISIBLE_DEVICES=",
            scope="all",
        )
    if without or os.environ.get("NCCL_MULTI_RANK_GPU_ENABLE") == "1":
        return
    users: dict[str, int] = {}
    for rank, peer in enumerate(peers):
        other = users.setdefault(peer.gpu, rank)
        if other != rank:
            raise UserError(
                f"ranks {other} and {rank} use the same GPU of {peer.host}, which NCCL refuses: start one rank per GPU "
                "and host",
                scope="all",
            )
