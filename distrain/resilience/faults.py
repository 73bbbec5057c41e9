"""Injected faults, for tests and soaks: off unless `resilience.faults` asks for them.

A fault is KIND@FAILPOINT:STEP or KIND@FAILPOINT:STEP/RANK, by default on rank 0: `sigkill@train.step:12/1` kills rank 1
when it begins step 12. Each fires once in the life of a run: faults.jsonl in its folder records it before it does.
"""

import errno
import json
import os
import re
import resource
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from distrain.checkpoint import committed
from distrain.errors import UserError, nearest
from distrain.execution.precision import Autocast
from distrain.failpoints import FAILPOINTS, arm, disarm

_EXACT = ("train.step", "data.request")  # elsewhere a fault fires at the first opportunity from its step on
_DAMAGE = ("flip", "truncate")
_FULL_DISK_BYTES = 1000  # max size of a file on the simulated full disk

_FAULT = re.compile(r"(?P<kind>[a-z]+)@(?P<failpoint>[a-z.]+):(?P<step>\d+)(?:/(?P<rank>\d+))?")


class InjectedError(Exception):
    """Raised by the fault `exception`."""


class Fault(NamedTuple):
    kind: str
    failpoint: str
    step: int
    rank: int

    def __str__(self) -> str:
        return f"{self.kind}@{self.failpoint}:{self.step}/{self.rank}"


def parse_fault(text: str) -> Fault:
    """Raises UserError if `text` is not a fault."""
    match = _FAULT.fullmatch(text)
    if match is None:
        raise UserError(f"resilience.faults: {text!r} is not KIND@FAILPOINT:STEP or KIND@FAILPOINT:STEP/RANK")
    for field, known in (("kind", KINDS), ("failpoint", FAILPOINTS)):
        if match[field] not in known:
            raise UserError(
                f"resilience.faults: {text!r}: {field} {match[field]} is not known: {nearest(match[field], known)}"
            )
    return Fault(match["kind"], match["failpoint"], int(match["step"]), int(match["rank"] or 0))


class Faults:
    """The faults of one rank that have not fired yet. A context manager that arms the failpoints."""

    def __init__(self, texts: Sequence[str], folder: Path, rank: int) -> None:
        """Raises UserError if one cannot be parsed."""
        self._folder = folder
        self._record = folder / "faults.jsonl"
        planned = [fault for fault in map(parse_fault, texts) if fault.rank == rank]
        fired = self._read_fired() if planned else set()
        self._planned = [fault for fault in planned if str(fault) not in fired]

    def __enter__(self) -> Self:
        if self._planned:
            arm(self._fire)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        disarm()

    def _fire(self, failpoint: str, step: int) -> None:
        """Inject what is planned for this failpoint and step."""
        if failpoint == "checkpoint.end":
            _free_disk()
        due = next((fault for fault in self._planned if _is_due(fault, failpoint, step, self._folder)), None)
        if due is None:
            return
        self._planned.remove(due)
        with self._record.open("a") as record:
            record.write(json.dumps({"fault": str(due), "at_step": step, "time": time.time()}) + "\n")
            record.flush()
            os.fsync(record.fileno())
        _INJECT[due.kind](self._folder)

    def _read_fired(self) -> set[str]:
        lines = self._record.read_text().splitlines() if self._record.exists() else []
        return {json.loads(line)["fault"] for line in lines if line.endswith("}")}


def _is_due(fault: Fault, failpoint: str, step: int, folder: Path) -> bool:
    if fault.failpoint != failpoint:
        return False
    if fault.kind in _DAMAGE and len(committed(folder / "checkpoints")) < 2:
        return False  # a run whose every checkpoint is damaged cannot resume
    return fault.step == step if failpoint in _EXACT else fault.step <= step


def _signal(number: signal.Signals) -> Callable[[Path], None]:
    return lambda folder: os.kill(os.getpid(), number)


def _raise(error: BaseException) -> Callable[[Path], None]:
    def inject(folder: Path) -> None:
        raise error

    return inject


def _poison(folder: Path) -> None:
    """Make the next output of the network NaN."""

    def make_nan(module: nn.Module, inputs: object, output: torch.Tensor) -> torch.Tensor | None:
        if not isinstance(module, Autocast):
            return None
        hook.remove()
        return output * torch.nan

    hook = register_module_forward_hook(make_nan)  # type: ignore[arg-type]  # it may return the output, as in nn.Module


def _flip_weight(folder: Path) -> None:
    """Flip a bit of a weight in memory at the next use of the network."""

    def flip(module: nn.Module, inputs: object) -> None:
        if isinstance(module, Autocast):
            hook.remove()
            bias = [*module.parameters()][-1].data
            bias[:1].view(torch.int32).bitwise_xor_(1 << 22)

    hook = register_module_forward_pre_hook(flip)


def _fill_disk(folder: Path) -> None:
    """Leave almost no space for the files of a checkpoint until its write has ended."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (_FULL_DISK_BYTES, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def _free_disk() -> None:
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))


def _newest_data(folder: Path) -> Path:
    """The largest file of the newest checkpoint."""
    return max(committed(folder / "checkpoints")[-1].glob("*.distcp"), key=lambda path: path.stat().st_size)


def _flip_bit(folder: Path) -> None:
    with _newest_data(folder).open("r+b") as file:
        file.seek(file.seek(0, os.SEEK_END) // 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))


_INJECT: dict[str, Callable[[Path], None]] = {
    "sigkill": _signal(signal.SIGKILL),
    "sigstop": _signal(signal.SIGSTOP),
    "sigterm": _signal(signal.SIGTERM),
    "exception": _raise(InjectedError("injected")),
    "oom": _raise(torch.OutOfMemoryError("injected")),
    "ioerror": _raise(OSError(errno.EIO, "injected")),
    "hang": lambda folder: time.sleep(1e6),
    "exit": lambda folder: os._exit(3),
    "flip": _flip_bit,
    "truncate": lambda folder: os.truncate(_newest_data(folder), 100),
    "nan": _poison,
    "memory": _flip_weight,
    "diskfull": _fill_disk,
}
KINDS = tuple(_INJECT)
