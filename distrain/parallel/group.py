"""The process group: who takes part in a run, and what they agree on."""

import ctypes
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self, TypeVar, cast

import torch
import torch.distributed as dist

from distrain.errors import TemporaryError, UserError

# For torchrun: without it ranks that are started again may meet addresses of those before them, and wait in vain.
RELIABLE_RESTARTS = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}

T = TypeVar("T")

_PR_SET_PDEATHSIG = 1  # prctl(2)

# What gloo and NCCL say when the other side is gone; they have no exception of its own for it.
_LOST_RANK = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process exited")


@dataclass
class Group:
    """This process's place among the ranks. A context manager that sets up and tears down torch.distributed.

    Started by torchrun it joins the ranks that torchrun made; started alone it is a world of one.
    """

    rank: int = 0
    world: int = 1
    device: torch.device = torch.device("cpu")

    def __enter__(self) -> Self:
        die_with_parent()
        self.rank = int(os.environ.get("RANK", 0))
        self.world = int(os.environ.get("WORLD_SIZE", 1))
        backend = "gloo"
        if torch.cuda.is_available():
            self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
            torch.cuda.set_device(self.device)
            backend = "cpu:gloo,cuda:nccl"
        store = None if "RANK" in os.environ else dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=store, rank=self.rank, world_size=self.world)
        self.control = new_gloo_group()  # small messages between CPUs, apart from the gradients
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        dist.destroy_process_group()
        if isinstance(error, RuntimeError) and any(sign in str(error) for sign in _LOST_RANK):
            raise TemporaryError(
                "lost the connection to another rank, which ended before its time", scope="peer"
            ) from error

    @property
    def is_main(self) -> bool:
        """Whether this rank speaks for all."""
        return self.rank == 0

    def lanes(self, lanes: int) -> range:
        """The lanes this rank executes: a contiguous range; the first ranks take one more if they do not divide."""
        share, extra = divmod(lanes, self.world)
        first = self.rank * share + min(self.rank, extra)
        return range(first, first + share + (self.rank < extra))

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Sum over all ranks, in place."""
        dist.all_reduce(values)
        return values

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.control)
        return box[0]

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
                error.scope = "all"
        result, error = self.broadcast((result, error))
        if error is not None:
            raise error
        return cast(T, result)

    def any(self, flag: bool) -> bool:
        """Whether `flag` is true on any rank, on every rank."""
        return self.most(float(flag)) > 0

    def most(self, value: float) -> float:
        """The largest of all ranks' values, on every rank."""
        largest = torch.tensor(value, dtype=torch.float64)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=self.control)
        return largest.item()

    def barrier(self) -> None:
        dist.barrier(group=self.control)


def die_with_parent() -> None:
    """Have the kernel end this process when torchrun, which started it, dies, so that none is left to hold a GPU."""
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        parent = os.getppid()
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))
        if os.getppid() != parent:  # it died before the kernel was told
            os.kill(os.getpid(), signal.SIGKILL)


def new_gloo_group() -> dist.ProcessGroup:
    """A group of all ranks that talks between CPUs. Every rank has to call this at the same place."""
    group = dist.new_group(backend="gloo")
    assert isinstance(group, dist.ProcessGroup)
    return group


class AsyncFlags:
    """Flags that all ranks see rise at the same step, without waiting for one another within a step.

    Each step posts this rank's wishes and reads the outcome of the step before, which has had a whole step's
    time to travel.
    """

    def __init__(self, group: Group) -> None:
        self._group = group
        self._pending: tuple[dist.Work, torch.Tensor] | None = None

    def exchange(self, *wishes: bool) -> tuple[bool, ...]:
        """Post this rank's wishes; return for each whether any rank had it at the previous call."""
        agreed = self.wait() or (False,) * len(wishes)
        flags = torch.tensor([float(wish) for wish in wishes])
        work = dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=self._group.control, async_op=True)
        assert work is not None
        self._pending = work, flags
        return agreed

    def wait(self) -> tuple[bool, ...]:
        """Wait for what was posted last; return for each wish whether any rank had it then. Empty if nothing was."""
        if self._pending is None:
            return ()
        work, flags = self._pending
        self._pending = None
        work.wait()
        return tuple(bool(flag) for flag in flags.tolist())
