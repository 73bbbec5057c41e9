"""Saving and restoring the state of a run, beside the training."""

import logging
import shutil
import time
from collections.abc import Sequence, Set
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_saver import save

from distrain.checkpoint.files import (
    DamagedCheckpointError,
    Snapshot,
    checkpoint_path,
    choose_kept,
    clear_debris,
    commit,
    committed,
    read,
    read_best,
    remove,
    set_aside,
    step_of,
    tmp_checkpoint_path,
    verify,
    write_best,
)
from distrain.config import CheckpointConfig
from distrain.errors import TemporaryError, UserError
from distrain.parallel.group import Group, new_gloo_group

log = logging.getLogger(__name__)


class Events(Protocol):
    """Who is told of what happens to a checkpoint. Whatever it raises ends the attempt, but for an OSError."""

    def before_commit(self) -> None:
        """On the leading rank, when all of it is written: it gets its name unless this raises."""
        ...

    def strike(self, place: str, step: int) -> None:
        """At each of the places of resilience.faults."""
        ...

    def full_disk(self, step: int) -> AbstractContextManager[None]:
        """Around all writing."""
        ...


class Checkpointer:
    """Saves and restores the training state of one run. Every rank has one, and all call it alike.

    A checkpoint that cannot be written is told of, and training goes on; the next one is another try.
    """

    def __init__(self, folder: Path, group: Group, config: CheckpointConfig, events: Events) -> None:
        self._events = events
        self._folder = folder
        self._group = group
        self._config = config
        self._writers = new_gloo_group()  # its own, as it talks beside the training
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._staged: dict[str, torch.Tensor] = {}
        self._writing: Future[None] | None = None
        self._whole = False  # whether the last one is there
        self._last = 0  # step at which the last one was begun, or the run
        self._time = time.monotonic()
        self.stall = 0.0
        """Seconds that the last save has held up training."""
        if group.is_main:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                clear_debris(folder)
            except OSError as error:
                raise UserError(
                    f"{folder}: cannot hold checkpoints: {error.strerror}; set run.dir elsewhere"
                ) from error
        group.barrier()

    def is_due(self, step: int, overdue: bool) -> bool:
        """Whether one is to be saved here, by the number of steps or because all ranks know that it is `overdue`."""
        if overdue and step > self._last + 2:  # what was said before the last one may still be on its way
            return True
        return step > self._last and step % self._config.every_steps == 0

    def is_overdue(self) -> bool:
        """Whether `checkpoint.every_minutes` asks for one by this rank's clock."""
        minutes = self._config.every_minutes
        return minutes > 0 and time.monotonic() - self._time > 60 * minutes

    def save(self, step: int, tensors: dict[str, torch.Tensor], extra: dict[str, Any]) -> None:
        """Copy the state and write it in the background. A step that is already saved is left alone."""
        if step == self._last and self.wait():
            return
        began = time.monotonic()
        self.wait()
        self._events.strike("stage", step)
        for name, tensor in tensors.items():
            if name not in self._staged:
                self._staged[name] = torch.empty_like(tensor, device="cpu")
            self._staged[name].copy_(tensor)
        self._whole, self._last, self._time = False, step, time.monotonic()
        self._writing = self._thread.submit(self._write, Snapshot(step, dict(self._staged), extra))
        self.stall = time.monotonic() - began

    def wait(self) -> bool:
        """Return when the last save is on disk or has failed: whether it is there."""
        if self._writing is not None:
            writing, self._writing = self._writing, None
            try:
                writing.result()
                self._whole = True
            except OSError as error:
                if self._group.is_main:
                    log.error("%s; training goes on, and the next one is tried as usual", error)
        return self._whole

    def require(self) -> None:
        """Return once the last save is there. Raises TemporaryError, on all ranks, if it could not be written."""
        if self._group.any(not self.wait()):
            raise TemporaryError(
                f"{self._folder}: the last checkpoint, of step {self._last}, could not be written: "
                "make room or mend the folder and run again, from the checkpoint before",
                scope="all",
            )

    def note_best(self, step: int, top1: float) -> bool:
        """Whether this is the best validation accuracy so far. If so the checkpoint of `step`, which has to be saved
        then, is kept."""
        best = self._group.broadcast(read_best(self._folder) if self._group.is_main else None)
        if not self._config.keep_best or (best is not None and top1 <= best[1]):
            return False
        if self._group.is_main:
            with suppress(OSError):
                write_best(self._folder, step, top1)
        return True

    def close(self) -> None:
        """Finish what is being written and release the thread."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()

    def restore(self) -> Snapshot | None:
        """The newest whole checkpoint, the same on every rank; damaged ones are set aside with their reason."""
        chosen = self._group.broadcast(self._newest_whole() if self._group.is_main else None)
        if chosen is None:
            return None
        snapshot = read(chosen)
        self._last, self._whole = snapshot.step, True
        return snapshot

    def _newest_whole(self) -> Path | None:
        for path in reversed(committed(self._folder)):
            try:
                verify(path)
                return path
            except DamagedCheckpointError as error:
                aside = set_aside(path, str(error))
                log.error("checkpoint %s is damaged: %s; set aside as %s", path.name, error, aside.name)
        return None

    def _write(self, snapshot: Snapshot) -> None:
        final = checkpoint_path(self._folder, snapshot.step)
        draft = tmp_checkpoint_path(final)
        try:
            with self._events.full_disk(snapshot.step):
                self._events.strike("write", snapshot.step)
                # CheckpointException is a BaseException and would end the thread without a word.
                save(snapshot.tensors, checkpoint_id=draft, process_group=self._writers)
                if self._group.is_main:
                    self._commit(draft, final, snapshot)
                    self._prune(final)
            self._events.strike("commit", snapshot.step)
        except (OSError, DamagedCheckpointError, CheckpointException) as error:
            if self._group.is_main:
                shutil.rmtree(draft, ignore_errors=True)
            reason = " ".join(str(_cause(error)).split())
            raise OSError(f"checkpoint of step {snapshot.step} could not be written: {reason}") from error

    def _commit(self, draft: Path, final: Path, snapshot: Snapshot) -> None:
        def before_commit() -> None:
            self._events.strike("rename", snapshot.step)
            self._events.before_commit()

        self._events.strike("manifest", snapshot.step)
        if final.exists():  # never overwritten
            shutil.rmtree(draft)
        else:
            commit(draft, final, snapshot, before_commit)

    def _prune(self, newest: Path) -> None:
        """Remove what need not be kept, once the newest is known to be good."""
        verify(newest)
        best = read_best(self._folder)
        every = self._config.keep_every_steps
        there = {step_of(path): path for path in committed(self._folder)}
        for step in there.keys() - choose_kept(there.keys(), self._config.keep, every, best and best[0]):
            remove(there[step])


def check_identity(
    saved: dict[str, Any], current: dict[str, Any], changeable: Set[str] = frozenset(), changed: Sequence[str] = ()
) -> None:
    """Refuse to go on with a run under other settings, unless they are among those `changed` on purpose.

    Raises UserError naming the key, both values and the cure.
    """
    for key in sorted((saved.keys() | current.keys()) - set(changed)):
        before, now = saved.get(key), current.get(key)
        if before != now:
            purpose = f"name it in run.change=[{key}] if it is to change from here on, " if key in changeable else ""
            raise UserError(
                f"{key} was {before!r} when this run began and is {now!r} now: "
                f"set it back, {purpose}or start a new run with another run.name"
            )


def _cause(error: BaseException) -> BaseException:
    """The failure inside torch's report of which rank failed."""
    failures = getattr(error, "failures", None)
    return next(iter(failures.values()))[0] if failures else error
