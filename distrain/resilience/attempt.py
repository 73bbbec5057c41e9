"""An attempt at a run: watched by the other ranks, written down by the leading one."""

import time
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Self

from distrain.checkpoint import newest_step
from distrain.config import Config
from distrain.errors import UserError
from distrain.parallel.group import Group
from distrain.resilience.faults import Faults
from distrain.resilience.ledger import Ledger
from distrain.resilience.stopping import Stopped
from distrain.resilience.watchdog import Watchdog

_LONGEST_CAUSE = 300


class Attempt:
    """A context manager from before anything is restored until the end. Every rank has one.

    Raises UserError if too many attempts in a row came to nothing.
    """

    def __init__(self, config: Config, group: Group) -> None:
        self._group = group
        folder = config.run.folder
        self._watchdog = Watchdog(group, folder, config.resilience.patience)
        self._ledger: Ledger | None = None
        if group.is_main:
            step = newest_step(folder / "checkpoints")
            self._ledger = Ledger(folder, group.world, step, config.resilience.attempts)
        self.faults = Faults(config.resilience.faults, folder, group.rank)
        self._began = time.monotonic()

    def __enter__(self) -> Self:
        self._watchdog.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._watchdog.__exit__(kind, error, trace)
        if self._ledger is not None:
            cause = f"stopped by {error}" if isinstance(error, Stopped) else f"{type(error).__name__}: {error}"
            crashed = error is not None and not isinstance(error, (Stopped, UserError))
            self._ledger.end("done" if error is None else " ".join(cause.split())[:_LONGEST_CAUSE], crashed)

    def restored(self, step: int) -> None:
        """The state of `step` is loaded, and training begins."""
        self.moves("restored", step)
        if self._ledger is not None:
            self._ledger.restored(step, time.monotonic() - self._began)

    def moves(self, phase: str, step: int) -> None:
        """This rank does something, and is not stuck."""
        self._watchdog.beat(phase, step)

    def has_done(self, step: int) -> None:
        """So many updates are done."""
        if self._ledger is not None:
            self._ledger.beat(step)

    def strike(self, place: str, step: int) -> None:
        """See Faults."""
        self.faults.strike(place, step)

    def full_disk(self, step: int) -> AbstractContextManager[None]:
        """See Faults."""
        return self.faults.full_disk(step)

    def before_commit(self) -> None:
        """A checkpoint is about to get its name. Raises StaleAttemptError if another attempt has begun."""
        if self._ledger is not None:
            self._ledger.require_current()
