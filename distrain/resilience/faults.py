"""Injected faults, for tests and soaks: off unless `resilience.faults` asks for them.

A fault is KIND@FAILPOINT:STEP or KIND@FAILPOINT:STEP/RANK, by default on rank 0: `sigkill@train.step:12/1` kills rank 1
when it begins step 12. KIND@time:STEP+SECONDS/RANK is at no named point, but that long after the step began:
`eio@time:12+0.35/1`. Each fires once in the life of a run, at the first opportunity from its step on: faults.jsonl in
the run's folder records it before it does. While there is a file faults.hold, steps are slow and nothing fires.
"""

import errno
import json
import os
import random
import re
import resource
import signal
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from distrain.checkpoint import committed
from distrain.errors import UserError, nearest
from distrain.execution.precision import Autocast
from distrain.failpoints import FAILPOINTS, arm, disarm
from distrain.files import sync_folder
from distrain.resilience.claim import newest_attempt
from distrain.resilience.file_calls import NEED_SPACE, FileCalls, draw_disturbance

ANY_TIME = "time"
RECORD = "faults.jsonl"
HOLD = "faults.hold"
_HELD_STEP_S = 0.5
_DAMAGE = ("flip", "truncate")
_FULL_DISK_BYTES = 1000  # max size of a file on the simulated full disk

_CLOCK_STEPS_S = (-86400.0, -3600.0, -5.0, 5.0, 3600.0, 86400.0)
_FILE_ERRORS = {"eio": errno.EIO, "estale": errno.ESTALE, "enospc": errno.ENOSPC, "delay": 0}
_AT_ANY_TIME = ("sigkill", "sigstop", "sigterm", "exit", "clock", *_FILE_ERRORS)

_FAULT = re.compile(
    r"(?P<kind>[a-z]+)@(?P<failpoint>[a-z.]+):(?P<step>\d+)(?:\+(?P<seconds>\d+(?:\.\d+)?))?(?:/(?P<rank>\d+))?"
)


class InjectedError(Exception):
    """Raised by the fault `exception`."""


class Fault(NamedTuple):
    kind: str
    failpoint: str
    step: int
    rank: int
    seconds: float = 0.0
    """After the step began, of a fault at any time."""

    def __str__(self) -> str:
        after = f"+{self.seconds:g}" if self.failpoint == ANY_TIME else ""
        return f"{self.kind}@{self.failpoint}:{self.step}{after}/{self.rank}"


def parse_fault(text: str) -> Fault:
    """Raises UserError if `text` is not a fault."""
    match = _FAULT.fullmatch(text)
    if match is None:
        raise UserError(f"resilience.faults: {text!r} is not KIND@FAILPOINT:STEP or KIND@FAILPOINT:STEP/RANK")
    for field, known in (("kind", KINDS), ("failpoint", (*FAILPOINTS, ANY_TIME))):
        if match[field] not in known:
            raise UserError(
                f"resilience.faults: {text!r}: {field} {match[field]} is not known: {nearest(match[field], known)}"
            )
    is_timed = match["failpoint"] == ANY_TIME
    if is_timed != (match["seconds"] is not None):
        raise UserError(f"resilience.faults: {text!r}: +SECONDS follows the step of {ANY_TIME}, and only of that")
    if is_timed and match["kind"] not in _AT_ANY_TIME:
        raise UserError(f"resilience.faults: {text!r}: at any time only {', '.join(_AT_ANY_TIME)} can be injected")
    return Fault(
        match["kind"], match["failpoint"], int(match["step"]), int(match["rank"] or 0), float(match["seconds"] or 0)
    )


class Faults:
    """The faults of one rank that have not fired yet. A context manager that arms the failpoints."""

    def __init__(self, texts: Sequence[str], folder: Path, rank: int) -> None:
        """Raises UserError if one cannot be parsed."""
        self._folder = folder
        self._record = folder / RECORD
        self._is_asked_for = bool(texts)
        planned = [fault for fault in map(parse_fault, texts) if fault.rank == rank]
        fired = read_fired(folder) if planned else {}
        self._planned = [fault for fault in planned if str(fault) not in fired]
        self._lock = threading.Lock()
        self._timers: list[threading.Timer] = []
        self._stack = ExitStack()
        self._files = FileCalls(folder)
        self._attempt = 0

    def __enter__(self) -> Self:
        if self._is_asked_for:
            attempt = newest_attempt(self._folder)
            self._attempt = attempt.number if attempt else 0
            if any(fault.kind in _FILE_ERRORS for fault in self._planned):
                self._stack.enter_context(self._files)
            if any(fault.kind == "clock" for fault in self._planned):
                self._stack.callback(setattr, time, "time", time.time)
                self._stack.callback(setattr, time, "time_ns", time.time_ns)
            arm(self._fire)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        disarm()
        for timer in self._timers:
            timer.cancel()
        self._stack.close()

    def _fire(self, failpoint: str, step: int) -> None:
        """Inject what is planned for this failpoint and step."""
        if failpoint == "checkpoint.end":
            _free_disk()
        if os.path.exists(self._folder / HOLD):  # noqa: PTH110, which is False where pathlib would raise
            if failpoint == "train.step":
                time.sleep(_HELD_STEP_S)
            return
        if failpoint == "train.step":
            while (timed := self._take(ANY_TIME, step)) is not None:
                self._timers.append(threading.Timer(timed.seconds, self._inject, (timed, step)))
                self._timers[-1].daemon = True
                self._timers[-1].start()
        if (due := self._take(failpoint, step)) is not None:
            self._inject(due, step)

    def _take(self, failpoint: str, step: int) -> Fault | None:
        """The next fault that is due; every thread of the rank passes failpoints."""
        with self._lock:
            due = next((fault for fault in self._planned if _is_due(fault, failpoint, step, self._folder)), None)
            if due is not None:
                self._planned.remove(due)
        return due

    def _inject(self, fault: Fault, step: int) -> None:
        entry = {"fault": str(fault), "at_step": step, "attempt": self._attempt, "time": time.time()}
        if fault.kind in _DAMAGE:
            entry["checkpoint"] = committed(self._folder / "checkpoints")[-1].name
        is_first = not self._record.exists()
        with self._record.open("a") as record:
            record.write(json.dumps(entry) + "\n")
            record.flush()
            os.fsync(record.fileno())
        if is_first:
            sync_folder(self._folder)
        if (error := _FILE_ERRORS.get(fault.kind)) is not None:
            calls = NEED_SPACE if fault.kind == "enospc" else ()
            self._files.disturb(draw_disturbance(str(fault), error, calls))
        elif fault.kind == "clock":
            _step_clock(random.Random(str(fault)).choice(_CLOCK_STEPS_S))
        else:
            _INJECT[fault.kind](self._folder)


def read_fired(folder: Path) -> dict[str, dict[str, Any]]:
    """What faults.jsonl in a run's folder records of each fault that has fired, by its text."""
    record = folder / RECORD
    lines = record.read_text().splitlines() if record.exists() else []
    entries = [json.loads(line) for line in lines if line.endswith("}")]
    return {entry["fault"]: entry for entry in entries}


def _is_due(fault: Fault, failpoint: str, step: int, folder: Path) -> bool:
    if fault.failpoint != failpoint or fault.step > step:
        return False
    if fault.kind not in _DAMAGE:
        return True
    with suppress(OSError):  # another fault may be at work
        return len(committed(folder / "checkpoints")) > 1  # a run whose every checkpoint is damaged cannot resume
    return False


def _step_clock(seconds: float) -> None:
    """Shift what this process takes for the time of day; the machine's clock is everybody's."""
    now, now_ns = time.time, time.time_ns
    time.time = lambda: now() + seconds
    time.time_ns = lambda: now_ns() + int(seconds * 1e9)


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
KINDS = (*_INJECT, *_FILE_ERRORS, "clock")
