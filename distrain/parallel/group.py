"""The process group of a run: its ranks, their lanes, and what they exchange."""

import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from types import TracebackType
from typing import Any, Self, TypeVar, cast

import torch
import torch.distributed as dist

from distrain.errors import TemporaryError, UserError
from distrain.parallel.environment import read_environment, report_waiting
from distrain.parallel.gpu import open_device, uuid_of
from distrain.parallel.nodes import Peer, find_nodes, require_own_gpus

# For torchrun: without it restarted ranks may connect to addresses of the previous attempt and hang.
RELIABLE_RESTARTS = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}

log = logging.getLogger(__name__)

T = TypeVar("T")

# Messages of gloo and NCCL for a lost peer; they raise no exception type for it.
_LOST_RANK = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process exited")


@dataclass
class Group:
    """This process's rank. A context manager that sets up and tears down torch.distributed.

    Under torchrun it joins torchrun's ranks; otherwise it is a world of one. With `patience`, in seconds, entering it
    raises TemporaryError if a rank does not start within that time.
    """

    rank: int = 0
    world: int = 1
    device: torch.device = torch.device("cpu")
    patience: float = 0.0

    def __enter__(self) -> Self:
        environment = read_environment()
        self.rank, self.world = environment.rank, environment.world
        if environment.ignored and self.is_main:
            log.warning("empty in the environment, and ignored: %s", ", ".join(environment.ignored))
        self.device = open_device(environment.local_rank, environment.local_world)
        backend = "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo"
        store = None if environment.launched else dist.HashStore()  # type: ignore[attr-defined]
        # Longer than the watchdog's patience, so that the watchdog is the one to name a rank that hangs.
        timeout = timedelta(seconds=max(60.0, 2 * self.patience)) if self.patience else None
        try:
            with report_waiting(environment):
                dist.init_process_group(backend, timeout=timeout, store=store, rank=self.rank, world_size=self.world)
        except dist.DistError as error:
            reason = str(error).split("\n", 1)[0]
            raise TemporaryError(f"rank {self.rank} could not reach all other ranks: {reason}") from error
        self.control = _new_gloo_group()  # small messages between CPUs, apart from the gradients
        self.background = _new_gloo_group()  # those of a thread that saves while the others train
        if self.patience and self.world > 1:
            self._await_all_ranks()
        self.peers: list[Peer] = self.gather(Peer.own(environment.local_rank, uuid_of(self.device)))
        """By rank."""
        require_own_gpus(self.peers)
        self.nodes = find_nodes(self.peers)
        """The ranks of each node."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None or self.device.type == "cpu":
            dist.destroy_process_group()
        # Otherwise it would wait for the kernels of NCCL, which may wait for another rank: the process exits instead.
        if isinstance(error, RuntimeError) and any(sign in str(error) for sign in _LOST_RANK):
            raise TemporaryError("lost the connection to another rank, which exited early", scope="peer") from error

    def _await_all_ranks(self) -> None:
        try:
            dist.monitored_barrier(self.control, timedelta(seconds=self.patience), wait_all_ranks=True)
        except RuntimeError as error:  # it lists the missing ranks, on rank 0
            missing = re.search(r"Ranks? ([\d, ]*\d) failed", str(error)) if self.is_main else None
            raise TemporaryError(
                f"rank {missing[1] if missing else 0} did not start within {self.patience:g} s: this attempt ends"
            ) from error

    @property
    def is_main(self) -> bool:
        """Whether this is the main rank, which reports, decides and writes for all."""
        return self.rank == 0

    @property
    def node(self) -> range:
        """The ranks of this rank's node. The first one does what is needed once per node."""
        return next(node for node in self.nodes if self.rank in node)

    @property
    def is_node_main(self) -> bool:
        """Whether this rank is the first one of its node."""
        return self.rank == self.node[0]

    def lanes(self, lanes: int) -> range:
        """The lanes of this rank, a contiguous range. If `lanes` is not divisible, the first ranks take one more."""
        share, extra = divmod(lanes, self.world)
        first = self.rank * share + min(self.rank, extra)
        return range(first, first + share + (self.rank < extra))

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Sum `values` over all ranks, in place."""
        dist.all_reduce(values)
        return values

    def broadcast(self, value: Any) -> Any:
        """Return the main rank's value on every rank. It must be picklable."""
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.control)
        return box[0]

    def broadcast_tensor(self, tensor: torch.Tensor) -> None:
        """Copy the main rank's tensor into that of every rank, which has the same shape."""
        dist.broadcast(tensor, src=0)

    def gather(self, value: T) -> list[T]:
        """Return every rank's value, by rank, on every rank. They must be picklable."""
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value, group=self.control)
        return values

    def gather_on_main(self, value: T) -> list[T]:
        """Return every rank's value, by rank, on the main rank, and nothing on the others. They must be picklable."""
        values: list[Any] = [None] * self.world if self.is_main else []
        dist.gather_object(value, values if self.is_main else None, dst=0, group=self.control)
        return values

    def on_main(self, work: Callable[[], T]) -> T:
        """Do `work` on the main rank and return its result on every rank.

        A UserError or TemporaryError that it raises is raised on every rank.
        """
        result, error = None, None
        if self.is_main:
            try:
                result = work()
            except (UserError, TemporaryError) as raised:
                error = raised
                error.scope = "main"
        result, error = self.broadcast((result, error))
        if error is not None:
            raise error
        return cast(T, result)

    def on_node_mains(self, work: Callable[[], None]) -> None:
        """Do `work` on the first rank of each node.

        A UserError or TemporaryError that it raises on any of them is raised on every rank.
        """
        error = None
        if self.is_node_main:
            try:
                work()
            except (UserError, TemporaryError) as raised:
                error = raised
                error.scope = "all"
        for rank, found in enumerate(self.gather(error)):
            if found is not None:
                raise found if rank == 0 else type(found)(f"{self.peers[rank].host}: {found}", scope="all")

    def any(self, flag: bool) -> bool:
        """Return on every rank whether `flag` is true on any."""
        return self.max(float(flag)) > 0

    def max(self, value: float) -> float:
        """Return the largest of all ranks' values on every rank."""
        largest = torch.tensor(value, dtype=torch.float64)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=self.control)
        return largest.item()

    def barrier(self) -> None:
        """Wait until every rank has called this."""
        dist.barrier(group=self.control)


def _new_gloo_group() -> dist.ProcessGroup:
    group = dist.new_group(backend="gloo")
    assert isinstance(group, dist.ProcessGroup)
    return group


class AsyncFlags:
    """Flags that every rank sees set at the same step, without a wait within a step.

    Each step starts the all-reduce of this rank's flags and reads that of the previous step, which had a whole
    step's time to complete.
    """

    def __init__(self, group: Group) -> None:
        self._group = group
        self._pending: tuple[dist.Work, torch.Tensor] | None = None

    def exchange(self, *flags: bool) -> tuple[bool, ...]:
        """Send this rank's flags; return for each whether any rank had set it at the previous call."""
        previous = self.wait() or (False,) * len(flags)
        values = torch.tensor([float(flag) for flag in flags])
        work = dist.all_reduce(values, op=dist.ReduceOp.MAX, group=self._group.control, async_op=True)
        assert work is not None
        self._pending = work, values
        return previous

    def wait(self) -> tuple[bool, ...]:
        """Wait for the pending exchange; return for each flag whether any rank set it. Empty if none is pending."""
        if self._pending is None:
            return ()
        work, values = self._pending
        self._pending = None
        work.wait()
        return tuple(bool(value) for value in values.tolist())
