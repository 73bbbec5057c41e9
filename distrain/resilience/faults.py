"""Faults made on purpose, for tests and soaks: off unless `resilience.faults` asks for them.

A fault is KIND@PLACE:STEP or KIND@PLACE:STEP/RANK, on rank 0 unless it is said: `sigkill@step:12/1` kills rank 1 as
it begins step 12. Each strikes once in the life of a run: faults.jsonl in its folder says so before it does.
"""

import errno
import json
import os
import re
import resource
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from torch import nn

from distrain.checkpoint import committed
from distrain.errors import UserError, nearest

T = TypeVar("T")

PLACES = {
    "step": "as a step begins",
    "load": "as the images of a step are asked for",
    "evaluate": "before a batch of validation",
    "stage": "as a state is copied for a checkpoint",
    "write": "as it is written",
    "manifest": "before its manifest is",
    "rename": "before it gets its name",
    "commit": "after that",
}
_LATE = PLACES.keys() - {"step", "load"}  # where a fault strikes at the first chance from its step on
_NEXT_TO_NOTHING = 1000  # bytes that a file may have on a full disk

_FAULT = re.compile(r"(?P<kind>[a-z]+)@(?P<place>[a-z]+):(?P<step>\d+)(?:/(?P<rank>\d+))?")


class InjectedError(Exception):
    """What the fault `exception` raises."""


class Fault(NamedTuple):
    kind: str
    place: str
    step: int
    rank: int

    def __str__(self) -> str:
        return f"{self.kind}@{self.place}:{self.step}/{self.rank}"


def parse_fault(text: str) -> Fault:
    """Raises UserError saying what is wrong with it."""
    match = _FAULT.fullmatch(text)
    if match is None:
        raise UserError(f"resilience.faults: {text!r} is not KIND@PLACE:STEP or KIND@PLACE:STEP/RANK")
    for part, known in (("kind", KINDS), ("place", PLACES)):
        if match[part] not in known:
            raise UserError(
                f"resilience.faults: {text!r}: {part} {match[part]} is not known: {nearest(match[part], known)}"
            )
    return Fault(match["kind"], match["place"], int(match["step"]), int(match["rank"] or 0))


class Faults:
    """Those of one rank that have not struck yet."""

    def __init__(self, texts: Sequence[str], folder: Path, rank: int) -> None:
        """Raises UserError for one that is not understood."""
        self._folder = folder
        self._record = folder / "faults.jsonl"
        mine = [fault for fault in map(parse_fault, texts) if fault.rank == rank]
        self._planned = [fault for fault in mine if str(fault) not in self._struck()] if mine else []

    def strike(self, place: str, step: int) -> None:
        """Do what is planned for this place and step."""
        for fault in self._take(step, place, _STRIKES):
            _STRIKES[fault.kind](self._folder)

    def poison(self, network: nn.Module, step: int) -> None:
        """Let what `network` returns next be no numbers, if that is planned for this step."""
        if not self._take(step, "step", ("nan",)):
            return

        def spoil(module: nn.Module, inputs: object, output: torch.Tensor) -> torch.Tensor:
            hook.remove()
            return output * torch.nan

        hook = network.register_forward_hook(spoil)

    def watch(self, requests: Iterable[T], start: int, per_step: int) -> Iterator[T]:
        """Pass on what is asked of a loader, so many requests for each step from `start` on."""
        for number, request in enumerate(requests):
            self.strike("load", start + number // per_step)
            yield request

    @contextmanager
    def full_disk(self, step: int) -> Iterator[None]:
        """While a checkpoint is written: with next to no room for it, if that is planned."""
        if not self._take(step, "write", ("diskfull",)):
            yield
            return
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (_NEXT_TO_NOTHING, limits[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    def _take(self, step: int, place: str, kinds: Iterable[str]) -> list[Fault]:
        if not self._planned:
            return []
        found = [
            fault
            for fault in self._planned
            if fault.kind in kinds
            and fault.place == place
            and (fault.step <= step if place in _LATE else fault.step == step)
        ][:1]
        for fault in found:
            self._planned.remove(fault)
            with self._record.open("a") as record:
                record.write(json.dumps({"fault": str(fault), "at_step": step, "time": time.time()}) + "\n")
                record.flush()
                os.fsync(record.fileno())
        return found

    def _struck(self) -> set[str]:
        lines = self._record.read_text().splitlines() if self._record.exists() else []
        return {json.loads(line)["fault"] for line in lines if line.endswith("}")}


def _signal(number: signal.Signals) -> Callable[[Path], None]:
    return lambda folder: os.kill(os.getpid(), number)


def _raise(error: BaseException) -> Callable[[Path], None]:
    def strike(folder: Path) -> None:
        raise error

    return strike


def _newest_data(folder: Path) -> Path:
    """The largest file of the newest checkpoint."""
    return max(committed(folder / "checkpoints")[-1].glob("*.distcp"), key=lambda path: path.stat().st_size)


def _flip(folder: Path) -> None:
    with _newest_data(folder).open("r+b") as file:
        file.seek(file.seek(0, os.SEEK_END) // 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))


_STRIKES: dict[str, Callable[[Path], None]] = {
    "sigkill": _signal(signal.SIGKILL),
    "sigstop": _signal(signal.SIGSTOP),
    "sigterm": _signal(signal.SIGTERM),
    "exception": _raise(InjectedError("made on purpose")),
    "oom": _raise(torch.OutOfMemoryError("made on purpose")),
    "ioerror": _raise(OSError(errno.EIO, "made on purpose")),
    "hang": lambda folder: time.sleep(1e6),
    "exit": lambda folder: os._exit(3),
    "flip": _flip,
    "truncate": lambda folder: os.truncate(_newest_data(folder), 100),
}
KINDS = (*_STRIKES, "nan", "diskfull")
