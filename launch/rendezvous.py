"""Where the nodes of one start meet before their ranks start."""

from datetime import timedelta
from typing import TYPE_CHECKING

from distrain.errors import TemporaryError
from launch.node_env import Node

if TYPE_CHECKING:
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

_JOB, _COUNT, _COMPLETE = "distrain/job", "distrain/count", "distrain/complete"


def meet(node: Node, timeout: float) -> "TCPStore":
    """Wait, at most `timeout` seconds, until all nodes of this start are here.

    Returns the store that they share; on the head it serves the ranks too, and must be kept. Raises TemporaryError if
    the port on the head serves another job; RuntimeError if it is in use otherwise, or if not all nodes come in time.
    """
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    is_head = node.rank == 0
    store = TCPStore(
        node.head, node.port, is_master=is_head, timeout=timedelta(seconds=timeout), wait_for_workers=False,
        multi_tenant=True,
    )  # fmt: skip
    if is_head:
        store.set(_JOB, node.job)
    elif (job := store.get(_JOB).decode()) != node.job:
        raise TemporaryError(f"port {node.port} of {node.head} serves another job, {job[:80]!r}: not joined")
    if store.add(_COUNT, 1) == node.count:
        store.set(_COMPLETE, "")
    store.wait([_COMPLETE])
    return store
