"""Saving and restoring the training state, in the background of the training."""

import logging
import shutil
import socket
import time
import zlib
from collections.abc import Callable, Sequence, Set
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from distrain.checkpoint.distribution import load_on_nodes
from distrain.checkpoint.files import (
    Snapshot,
    checkpoint_path,
    checksum_tensors,
    choose_kept,
    clear_tmp,
    commit,
    committed,
    read_best,
    remove,
    set_aside,
    set_aside_names,
    step_of,
    tmp_checkpoint_path,
    verify,
    write_best,
)
from distrain.checkpoint.metadata import DamagedCheckpointError
from distrain.checkpoint.writing import WrittenFile, write_metadata, write_share
from distrain.config import STATE_FORMAT, CheckpointConfig
from distrain.config.renamed import RENAMED_KEYS
from distrain.errors import StaleAttemptError, TemporaryError, UserError
from distrain.failpoints import failpoint
from distrain.files import translated_errors
from distrain.parallel.group import Group

log = logging.getLogger(__name__)

T = TypeVar("T")


class Checkpointer:
    """Saves and restores the training state of one run. Every rank has one and makes the same calls.

    A checkpoint that cannot be written is reported, training continues, and the next one is tried as usual.
    """

    def __init__(
        self,
        folder: Path,
        group: Group,
        config: CheckpointConfig,
        token: str = "",
        require_current: Callable[[], None] = lambda: None,
        sync_records: Callable[[], None] = lambda: None,
    ) -> None:
        """`token` identifies this attempt of the run, the same on all ranks. `require_current` is called on the main
        rank before checkpoints are committed or removed; what it raises, except an OSError, ends the attempt.
        `sync_records` flushes what is recorded of the steps before, which no later start repeats once the checkpoint is
        committed; if it raises OSError, the checkpoint is not.

        Raises UserError if `folder` cannot be written, TemporaryError if that may change.
        """
        self._token = token
        self._require_current = require_current
        self._sync_records = sync_records
        self._folder = folder
        self._group = group
        self._config = config
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._staged: dict[str, torch.Tensor] = {}
        self._copied: torch.cuda.Event | None = None  # recorded once the state is in host memory
        self._waiting: Callable[[], Future[None]] | None = None  # begins to write the state that was copied last
        self._writing: Future[None] | None = None
        self._is_committed = False  # whether the last save is committed
        self._last = 0  # step of the last save, or at which the run started
        self._time = time.monotonic()
        self.stall = 0.0
        """Seconds for which the last save blocked training."""
        group.on_main(self._prepare_folder)

    def is_due(self, step: int, overdue: bool) -> bool:
        """Whether to save at `step`: by the number of steps, or because all ranks know that a save is `overdue`."""
        if overdue and step > self._last + 2:  # the flag may date from before the last save
            return True
        return step > self._last and step % self._config.every_steps == 0

    def is_overdue(self) -> bool:
        """Whether `checkpoint.every_minutes` have passed by this rank's clock."""
        minutes = self._config.every_minutes
        return minutes > 0 and time.monotonic() - self._time > 60 * minutes

    def save(
        self,
        step: int,
        tensors: dict[str, torch.Tensor],
        extra: Callable[[], dict[str, Any]],
        best: float | None = None,
    ) -> None:
        """Copy the state to host memory, without waiting for the device; `start_write` or `wait` begins to write it.
        A step that is saved already is skipped. What is submitted to the device later may change the state.

        `extra`: called when the write begins, for what else to record.
        `best`: validation accuracy or mAP in [0, 1] to record, once it is committed, as that of the best checkpoint.
        """
        if step == self._last and self.wait():
            if best is not None and self._group.is_main:
                self._record_best(step, best)
            return
        began = time.monotonic()
        self.wait()
        failpoint("checkpoint.stage", step)
        for name, tensor in tensors.items():
            if name not in self._staged:
                self._staged[name] = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
            self._staged[name].copy_(tensor, non_blocking=True)
        if self._group.device.type == "cuda":
            self._copied = torch.cuda.Event()
            self._copied.record()
        self._is_committed, self._last, self._time = False, step, time.monotonic()
        self._waiting = lambda: self._thread.submit(self._write, Snapshot(step, dict(self._staged), extra()), best)
        self.stall = time.monotonic() - began

    def start_write(self) -> None:
        """Begin to write the last save in the background, if that has not begun. What is reported of the steps before
        it must have been recorded."""
        if self._waiting is not None:
            self._writing, self._waiting = self._waiting(), None

    def wait(self) -> bool:
        """Wait until the last save is committed or has failed; return whether it is, the same on every rank."""
        self.start_write()
        if self._writing is not None:
            writing, self._writing = self._writing, None
            try:
                writing.result()
                self._is_committed = True
            except _WriteError as error:
                if self._group.is_main:
                    log.error("%s; training continues, and the next one is tried as usual", error)
        return self._is_committed

    def wait_or_raise(self) -> None:
        """Wait until the last save is committed. Raises TemporaryError, on all ranks, if it could not be written."""
        if not self.wait():
            raise TemporaryError(
                f"{self._folder}: the last checkpoint, of step {self._last}, could not be written: "
                "free disk space or fix the folder, and run again to continue from the checkpoint before",
                scope="all",
            )

    def is_best(self, score: float) -> bool:
        """Whether a validation accuracy or mAP in [0, 1] is the best so far, so that its checkpoint is to be kept.

        Raises TemporaryError if the best one cannot be read just now.
        """
        if not self._config.keep_best:
            return False
        self.wait()
        best = self._group.on_main(self._read_best)
        return best is None or score > best[1]

    def close(self) -> None:
        """Finish the write in progress and stop the thread."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()

    def restore(self) -> Snapshot | None:
        """Load the newest intact checkpoint, the same on every rank; damaged ones are set aside with the reason.

        Raises UserError if all are damaged, TemporaryError if one cannot be read just now.
        """
        for path in self._group.on_main(self._candidates):
            try:
                failpoint("checkpoint.restore", step_of(path))
                snapshot = load_on_nodes(self._group, path)
            except DamagedCheckpointError as error:
                self._group.on_main(partial(self._set_aside, path, str(error)))
                continue
            self._last, self._is_committed = snapshot.step, True
            return snapshot
        self._group.on_main(self._require_none_damaged)
        return None

    def _prepare_folder(self) -> None:
        with translated_errors(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
            clear_tmp(self._folder)

    def _candidates(self) -> list[Path]:
        """The checkpoints to try, newest first."""
        with translated_errors(self._folder):
            return committed(self._folder)[::-1]

    def _set_aside(self, path: Path, reason: str) -> None:
        with translated_errors(self._folder):
            self._require_current()
            aside = set_aside(path, reason)
        log.error("checkpoint %s is damaged: %s; set aside as %s", path.name, reason, aside.name)

    def _require_none_damaged(self) -> None:
        if damaged := set_aside_names(self._folder):
            raise UserError(
                f"{self._folder}: every checkpoint of this run is damaged ({', '.join(damaged)}): restore one from a "
                "copy, or delete the folder to train from the beginning"
            )

    def _write(self, snapshot: Snapshot, best: float | None) -> None:
        if self._copied is not None:
            self._copied.synchronize()
        step = snapshot.step
        final = checkpoint_path(self._folder, step)
        tmp = tmp_checkpoint_path(final, self._token)
        try:
            self._agree(step, lambda: failpoint("checkpoint.write", step))
            self._require_equal_states(snapshot)
            rank, world = self._group.rank, self._group.world
            reports = self._agree(step, partial(write_share, tmp, rank, world, snapshot.tensors))
            written = [file for file in reports if file is not None]
            self._agree(step, partial(self._commit, tmp, final, snapshot, written))
            failpoint("checkpoint.commit", step)
        except _WriteError:
            if self._group.is_main:
                shutil.rmtree(tmp, ignore_errors=True)
            raise
        finally:
            failpoint("checkpoint.end", step)
        if self._group.is_main:
            if best is not None:
                self._record_best(step, best)
            self._prune(final)

    def _agree(self, step: int, work: Callable[[], T]) -> list[T]:
        """Do `work` on every rank and return what it returned on each.

        Every rank takes part in the exchange even if its work failed, so that none waits forever or considers an
        uncommitted checkpoint committed. Raises _WriteError on every rank if it failed on any.
        """
        result, reason, fatal = None, "", None
        try:
            result = work()
        except OSError as error:
            reason = " ".join(str(error).split())
        except TemporaryError as error:  # a newer attempt has started
            reason, fatal = str(error), error
        outcomes: list[Any] = [None] * self._group.world
        dist.all_gather_object(outcomes, (result, reason, fatal is not None), group=self._group.background)
        if fatal is not None:
            raise fatal
        for _, why, is_fatal in outcomes:
            if is_fatal:
                raise TemporaryError(why, scope="peer")
            if why:
                raise _WriteError(f"checkpoint of step {step} could not be written: {why}")
        return [value for value, _, _ in outcomes]

    def _require_equal_states(self, snapshot: Snapshot) -> None:
        """Raises TemporaryError, on every rank, unless all have the same state, bit for bit: each file of a checkpoint
        holds what one rank has."""
        if self._group.world == 1:
            return
        own = checksum_tensors(snapshot.tensors)
        reports = self._agree(snapshot.step, lambda: (socket.gethostname(), zlib.crc32(repr(own).encode())))
        different = [rank for rank, (_, checksum) in enumerate(reports) if checksum != reports[0][1]]
        if not different:
            return
        states = self._agree(snapshot.step, lambda: own)
        rank = different[0]
        name = next(name for name in states[0] if states[0][name] != states[rank].get(name))
        raise TemporaryError(
            f"rank {rank} on {reports[rank][0]} has another {name} than rank 0 on {reports[0][0]} at step "
            f"{snapshot.step}, which a fault of its memory may cause: it is not saved; this attempt ends, and the next "
            "continues from the last checkpoint",
            scope="all",
        )

    def _commit(self, tmp: Path, final: Path, snapshot: Snapshot, written: list[WrittenFile]) -> None:
        def before_commit() -> None:
            failpoint("checkpoint.rename", snapshot.step)
            self._require_current()

        if not self._group.is_main:
            return
        if final.exists():  # never overwritten
            shutil.rmtree(tmp)
            return
        self._sync_records()
        files = [*written, write_metadata(tmp, snapshot.tensors, written)]
        failpoint("checkpoint.manifest", snapshot.step)
        reports = {file.name: {"size": file.size, "crc32": file.crc32} for file in files}
        commit(tmp, final, snapshot, reports, before_commit)

    def _read_best(self) -> tuple[int, float] | None:
        with translated_errors(self._folder):
            return read_best(self._folder)

    def _record_best(self, step: int, score: float) -> None:
        try:
            write_best(self._folder, step, score)
        except OSError as error:
            log.error("%s: the best checkpoint cannot be recorded: %s", self._folder, error.strerror)

    def _prune(self, newest: Path) -> None:
        """Remove what need not be kept, once the newest is verified. What cannot be removed now is tried again."""
        try:
            self._require_current()
            verify(newest)
            best = read_best(self._folder)
            every = self._config.keep_every_steps
            saved = {step_of(path): path for path in committed(self._folder)}
            for step in saved.keys() - choose_kept(saved.keys(), self._config.keep, every, best and best[0]):
                remove(saved[step])
        except StaleAttemptError:
            raise
        except (OSError, DamagedCheckpointError, TemporaryError, UserError) as error:
            log.error("%s: older checkpoints are not removed: %s", self._folder, " ".join(str(error).split()))


class _WriteError(Exception):
    """A checkpoint could not be written by some rank."""


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
    if unknown := sorted(before.keys() - now.keys()):
        raise UserError(
            f"this run was started by distrain {saved['versions']['distrain']} with {unknown[0]}, which this release "
            "does not have: continue it with the release that started it, or start a new run with another run.name"
        )
    for key in sorted(before.keys() - set(changed)):  # a setting that is not in it came with a later release
        if before[key] != now[key]:
            purpose = f"name it in run.change=[{key}] if the change is intended, " if key in changeable else ""
            raise UserError(
                f"{key} was {before.get(key)!r} when this run began and is {now.get(key)!r} now: "
                f"set it back, {purpose}or start a new run with another run.name"
            )


def _renamed_settings(identity: dict[str, Any]) -> str:
    """The settings of an older run that have other names now."""
    renamed = [f"{key} is now {RENAMED_KEYS[key]}" for key in sorted(identity) if key in RENAMED_KEYS]
    return f" ({', '.join(renamed)})" if renamed else ""
