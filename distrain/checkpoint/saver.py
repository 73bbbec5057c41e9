"""Saving and restoring the training state, in the background of the training."""

import logging
import shutil
import time
from collections.abc import Callable, Sequence, Set
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_saver import save

from distrain.checkpoint.files import (
    DamagedCheckpointError,
    Snapshot,
    checkpoint_path,
    choose_kept,
    clear_tmp,
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
from distrain.config import STATE_FORMAT, CheckpointConfig
from distrain.config.renamed import RENAMED_KEYS
from distrain.errors import TemporaryError, UserError
from distrain.failpoints import failpoint
from distrain.parallel.group import Group, new_gloo_group

log = logging.getLogger(__name__)


class Checkpointer:
    """Saves and restores the training state of one run. Every rank has one and makes the same calls.

    A checkpoint that cannot be written is reported, training continues, and the next one is tried as usual.
    """

    def __init__(
        self,
        folder: Path,
        group: Group,
        config: CheckpointConfig,
        before_commit: Callable[[], None] = lambda: None,
    ) -> None:
        """`before_commit` is called on the main rank; what it raises, but for an OSError, ends the attempt."""
        self._before_commit = before_commit
        self._folder = folder
        self._group = group
        self._config = config
        self._writers = new_gloo_group()  # of its own, because it communicates while training does
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._staged: dict[str, torch.Tensor] = {}
        self._writing: Future[None] | None = None
        self._is_committed = False  # whether the last save is committed
        self._last = 0  # step of the last save, or at which the run started
        self._time = time.monotonic()
        self.stall = 0.0
        """Seconds for which the last save blocked training."""
        if group.is_main:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                clear_tmp(folder)
            except OSError as error:
                raise UserError(
                    f"{folder}: checkpoints cannot be written: {error.strerror}; set run.dir to another folder"
                ) from error
        group.barrier()

    def is_due(self, step: int, overdue: bool) -> bool:
        """Whether to save at `step`: by the number of steps, or because all ranks know that a save is `overdue`."""
        if overdue and step > self._last + 2:  # the flag may date from before the last save
            return True
        return step > self._last and step % self._config.every_steps == 0

    def is_overdue(self) -> bool:
        """Whether `checkpoint.every_minutes` have passed by this rank's clock."""
        minutes = self._config.every_minutes
        return minutes > 0 and time.monotonic() - self._time > 60 * minutes

    def save(self, step: int, tensors: dict[str, torch.Tensor], extra: dict[str, Any]) -> None:
        """Copy the state to host memory and write it in the background. A step that is saved already is skipped."""
        if step == self._last and self.wait():
            return
        began = time.monotonic()
        self.wait()
        failpoint("checkpoint.stage", step)
        for name, tensor in tensors.items():
            if name not in self._staged:
                self._staged[name] = torch.empty_like(tensor, device="cpu")
            self._staged[name].copy_(tensor)
        self._is_committed, self._last, self._time = False, step, time.monotonic()
        self._writing = self._thread.submit(self._write, Snapshot(step, dict(self._staged), extra))
        self.stall = time.monotonic() - began

    def wait(self) -> bool:
        """Wait until the last save is committed or has failed; return whether it is committed."""
        if self._writing is not None:
            writing, self._writing = self._writing, None
            try:
                writing.result()
                self._is_committed = True
            except OSError as error:
                if self._group.is_main:
                    log.error("%s; training continues, and the next one is tried as usual", error)
        return self._is_committed

    def wait_or_raise(self) -> None:
        """Wait until the last save is committed. Raises TemporaryError, on all ranks, if it could not be written."""
        if self._group.any(not self.wait()):
            raise TemporaryError(
                f"{self._folder}: the last checkpoint, of step {self._last}, could not be written: "
                "free disk space or fix the folder, and run again to continue from the checkpoint before",
                scope="all",
            )

    def note_best(self, step: int, top1: float) -> bool:
        """Record a validation accuracy in [0, 1]; return whether it is the best so far.

        If so the caller has to save the checkpoint of `step`, which is kept.
        """
        best = self._group.broadcast(read_best(self._folder) if self._group.is_main else None)
        if not self._config.keep_best or (best is not None and top1 <= best[1]):
            return False
        if self._group.is_main:
            with suppress(OSError):
                write_best(self._folder, step, top1)
        return True

    def close(self) -> None:
        """Finish the write in progress and stop the thread."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()

    def restore(self) -> Snapshot | None:
        """Load the newest intact checkpoint, the same on every rank; damaged ones are set aside with the reason."""
        chosen = self._group.broadcast(self._newest_intact() if self._group.is_main else None)
        if chosen is None:
            return None
        snapshot = read(chosen)
        self._last, self._is_committed = snapshot.step, True
        return snapshot

    def _newest_intact(self) -> Path | None:
        for path in reversed(committed(self._folder)):
            try:
                verify(path)
                return path
            except DamagedCheckpointError as error:
                aside = set_aside(path, str(error))
                log.error("checkpoint %s is damaged: %s; set aside as %s", path.name, error, aside.name)
        return None

    def _write(self, snapshot: Snapshot) -> None:
        step = snapshot.step
        final = checkpoint_path(self._folder, step)
        tmp = tmp_checkpoint_path(final)
        try:
            failpoint("checkpoint.write", step)
            # CheckpointException is a BaseException and would end the thread without a message.
            save(snapshot.tensors, checkpoint_id=tmp, process_group=self._writers)
            if self._group.is_main:
                self._commit(tmp, final, snapshot)
                self._prune(final)
            failpoint("checkpoint.commit", step)
        except (OSError, DamagedCheckpointError, CheckpointException) as error:
            if self._group.is_main:
                shutil.rmtree(tmp, ignore_errors=True)
            reason = " ".join(str(_cause(error)).split())
            raise OSError(f"checkpoint of step {step} could not be written: {reason}") from error
        finally:
            failpoint("checkpoint.end", step)

    def _commit(self, tmp: Path, final: Path, snapshot: Snapshot) -> None:
        def before_commit() -> None:
            failpoint("checkpoint.rename", snapshot.step)
            self._before_commit()

        failpoint("checkpoint.manifest", snapshot.step)
        if final.exists():  # never overwritten
            shutil.rmtree(tmp)
        else:
            commit(tmp, final, snapshot, before_commit)

    def _prune(self, newest: Path) -> None:
        """Remove what need not be kept, once the newest is verified."""
        verify(newest)
        best = read_best(self._folder)
        every = self._config.keep_every_steps
        saved = {step_of(path): path for path in committed(self._folder)}
        for step in saved.keys() - choose_kept(saved.keys(), self._config.keep, every, best and best[0]):
            remove(saved[step])


def check_identity(
    saved: dict[str, Any], current: dict[str, Any], changeable: Set[str] = frozenset(), changed: Sequence[str] = ()
) -> None:
    """Refuse to resume a run of another state format, or with other settings unless they are in `changed`.

    Both arguments are what a checkpoint's manifest holds. Raises UserError naming the setting, both values and the
    cure.
    """
    if (number := saved.get("format", 1)) != STATE_FORMAT:
        cure = "upgrade distrain" if number > STATE_FORMAT else "continue it with the release that started it"
        raise UserError(
            f"this run was saved in state format {number}, and this release reads format {STATE_FORMAT}: {cure}, or "
            f"start a new run with another run.name{_renamed_settings(saved['identity'])}"
        )
    before, now = saved["identity"], current["identity"]
    for key in sorted((before.keys() | now.keys()) - set(changed)):
        if before.get(key) != now.get(key):
            purpose = f"name it in run.change=[{key}] if the change is intended, " if key in changeable else ""
            raise UserError(
                f"{key} was {before.get(key)!r} when this run began and is {now.get(key)!r} now: "
                f"set it back, {purpose}or start a new run with another run.name"
            )


def _renamed_settings(identity: dict[str, Any]) -> str:
    """The settings of an older run that have other names now."""
    renamed = [f"{key} is now {RENAMED_KEYS[key]}" for key in sorted(identity) if key in RENAMED_KEYS]
    return f" ({', '.join(renamed)})" if renamed else ""


def _cause(error: BaseException) -> BaseException:
    """The failure inside torch's report of which rank failed."""
    failures = getattr(error, "failures", None)
    return next(iter(failures.values()))[0] if failures else error
