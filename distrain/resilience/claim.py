"""Which start of a run may write: each claims a number, and the claim of a larger one fences off the smaller.

attempts/00000007.json records attempt 7. Creating it exclusively is the claim, so that two starts never share a number;
afterwards only its owner writes it. A start is refused while the attempt before it is alive, unless one launcher
started both, which then knows that the earlier one is lost. `beat` holds the step that the current attempt has reached.
"""

import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import get_type_hints

from distrain.errors import StaleAttemptError, UserError
from distrain.files import parse_json, read_regular, sync_folder, write_json
from distrain.processes import machine_id, process_ticks

LAUNCH_VARIABLE = "DISTRAIN_LAUNCH"  # the launcher's id, the same for every start that it makes
_BEAT_BYTES = 64
_BEAT_S = 1.0  # between the heartbeats of an attempt
_OBSERVE_S = 8.0  # without a heartbeat, after which an attempt on another machine is taken for lost
_EXIT_S = 3.0  # for a process that has been killed to disappear
_KEPT = 2  # records


@dataclass(frozen=True)
class AttemptRecord:
    """What attempts/NUMBER.json holds. The defaults are those of a record that a crash left unreadable."""

    number: int
    token: str = ""
    launch: str = ""
    """Id of the launcher, if one started the attempt."""
    host: str = "?"
    machine: str = ""
    """The boot and the namespace in which `pid` is valid."""
    pid: int = 0
    started: int = 0
    """When the process was created, in clock ticks since the boot."""
    ranks: int = 0
    end: str | None = None
    """Why it ended; None while it runs and after it was killed."""
    crashed: bool = True
    committed: int = -1
    """Step of the newest checkpoint when it began."""
    without_progress: int = 0
    """How many attempts in a row before it ended without a new checkpoint."""


def newest_attempt(folder: Path) -> AttemptRecord | None:
    """The record of the newest attempt at the run in `folder`, if any. Raises OSError."""
    try:
        numbers = [int(name[:-5]) for name in os.listdir(folder / "attempts") if name[:-5].isdecimal()]  # noqa: PTH208
    except FileNotFoundError:
        return None
    if not numbers:
        return None
    number = max(numbers)
    with suppress(FileNotFoundError, IsADirectoryError, ValueError, TypeError):
        content, checksum = parse_json(read_regular(_record_path(folder, number)))
        record = AttemptRecord(**content)
        kinds = get_type_hints(AttemptRecord)
        if (
            checksum is not False
            and record.number == number
            and all(isinstance(value, kinds[name]) for name, value in vars(record).items())
        ):
            return record
    return AttemptRecord(number)


class Claim:
    """The right of this process, a main rank, to write to the folder of a run."""

    def __init__(self, folder: Path, ranks: int, committed: int, allowed: int) -> None:
        """Claim the next number. `committed` is the step of the newest checkpoint.

        Raises UserError if another attempt is alive, or if `allowed` attempts in a row (0: unlimited) ended without a
        new checkpoint; OSError if the folder cannot be written.
        """
        self._folder = folder
        (folder / "attempts").mkdir(parents=True, exist_ok=True)
        self.record = AttemptRecord(
            0, uuid.uuid4().hex, os.environ.get(LAUNCH_VARIABLE, ""), socket.gethostname(), machine_id(), os.getpid(),
            process_ticks(os.getpid()) or 0, ranks, committed=committed,
        )  # fmt: skip
        while not self._create(allowed):
            pass  # another start was faster: the next look finds it alive
        self.last_beat = _read_beat(folder)
        """Step and time, in seconds since 1970, of the last heartbeat of an earlier attempt; (0, 0.0) if unknown."""
        for number in range(max(1, self.record.number - 9), self.record.number - _KEPT + 1):
            with suppress(OSError):
                _record_path(folder, number).unlink()
        self._step = 0
        self._beat = os.open(folder / "beat", os.O_RDWR | os.O_CREAT, 0o644)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep_alive, name="claim", daemon=True)
        self._thread.start()

    def record_step(self, step: int) -> None:
        """Record that `step` updates are done. Raises OSError."""
        self._step = step
        os.pwrite(self._beat, f"{step} {time.time():.3f}".ljust(_BEAT_BYTES).encode(), 0)

    def require_current(self) -> None:
        """Raises StaleAttemptError if a newer attempt has started; OSError if that cannot be found out."""
        current = newest_attempt(self._folder)
        if current is not None and (current.number, current.token) != (self.record.number, self.record.token):
            raise StaleAttemptError(
                f"attempt {self.record.number} of the run in {self._folder} ends: attempt {current.number} on "
                f"{current.host} has taken over"
            )

    def end(self, cause: str, crashed: bool) -> None:
        """Record how the attempt ended, unless a newer one has started. Raises OSError."""
        self._ended.set()
        self._thread.join(timeout=5)
        os.close(self._beat)
        with suppress(StaleAttemptError):
            self.require_current()
            self.record = replace(self.record, end=cause, crashed=crashed)
            write_json(_record_path(self._folder, self.record.number), asdict(self.record))

    def _create(self, allowed: int) -> bool:
        """Try to create the record of the next attempt; return whether no other start did."""
        self.before = before = newest_attempt(self._folder)
        without_progress = 0
        if before is not None:
            if not (before.launch and before.launch == self.record.launch) and is_alive(before, self._folder):
                raise UserError(
                    f"{self._folder}: attempt {before.number} of this run is alive, as process {before.pid} on "
                    f"{before.host}: wait for it, stop it with touch {self._folder}/stop, or use another run.name"
                )
            if before.crashed and before.committed == self.record.committed:
                without_progress = before.without_progress + 1
        if allowed and without_progress >= allowed:
            raise UserError(
                f"{self._folder}/attempts: {without_progress} attempts in a row ended without a checkpoint after step "
                f"{self.record.committed}: fix the cause, which their logs show, delete that folder, and run again"
            )
        self.record = replace(self.record, number=before.number + 1 if before else 1, without_progress=without_progress)
        path = _record_path(self._folder, self.record.number)
        try:
            file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        except FileExistsError:
            return False
        try:
            os.write(file, json.dumps(asdict(self.record), indent=1).encode() + b"\n")
            os.fsync(file)
        finally:
            os.close(file)
        sync_folder(path.parent)
        return True

    def _keep_alive(self) -> None:
        """Renew the heartbeat, and exit at once if a newer attempt has started, wherever the other threads are."""
        while not self._ended.wait(_BEAT_S):
            with suppress(OSError):  # a file system that is temporarily unavailable is not a reason to exit
                self.record_step(self._step)
                os.fsync(self._beat)  # so that other hosts see it
                try:
                    self.require_current()
                except StaleAttemptError as error:
                    print(f"distrain: {error}", file=sys.stderr, flush=True)
                    os._exit(1)


def is_alive(attempt: AttemptRecord, folder: Path, wait: Callable[[float], None] = time.sleep) -> bool:
    """Whether an attempt's main rank still runs: by its process if it is on this machine, else by its heartbeats."""
    if attempt.end is not None:
        return False
    if attempt.machine == machine_id():
        for _ in range(30):
            if process_ticks(attempt.pid) != attempt.started:
                return False
            wait(_EXIT_S / 30)
        return True
    first = _read_beat(folder)
    for _ in range(8):
        wait(_OBSERVE_S / 8)
        if _read_beat(folder) != first:
            return True
    return False


def _record_path(folder: Path, number: int) -> Path:
    return folder / "attempts" / f"{number:08d}.json"


def _read_beat(folder: Path) -> tuple[int, float]:
    try:
        step, when = read_regular(folder / "beat").split()
        return int(step), float(when)
    except (FileNotFoundError, ValueError):
        return 0, 0.0
