"""One attempt of a run: watched by the other ranks, recorded by the main rank."""

import time
from contextlib import ExitStack
from types import TracebackType
from typing import Self

from distrain.checkpoint import newest_step
from distrain.config import Config
from distrain.errors import Stopped, UserError
from distrain.parallel.group import Group
from distrain.resilience.faults import Faults
from distrain.resilience.ledger import Ledger
from distrain.resilience.watchdog import Watchdog

_MAX_CAUSE = 300  # characters


class Attempt:
    """A context manager from before the state is restored until the end. Every rank has one.

    Raises UserError if too many attempts in a row ended without a new checkpoint.
    """

    def __init__(self, config: Config, group: Group) -> None:
        folder = config.run.folder
        self._watchdog = Watchdog(group, folder, config.resilience.patience)
        self._ledger: Ledger | None = None
        if group.is_main:
            step = newest_step(folder / "checkpoints")
            self._ledger = Ledger(folder, group.world, step, config.resilience.attempts)
        self._faults = Faults(config.resilience.faults, folder, group.rank)
        self._began = time.monotonic()
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        self._stack.enter_context(self._watchdog)
        self._stack.enter_context(self._faults)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()
        if self._ledger is not None:
            cause = f"stopped by {error}" if isinstance(error, Stopped) else f"{type(error).__name__}: {error}"
            crashed = error is not None and not isinstance(error, (Stopped, UserError))
            self._ledger.end("done" if error is None else " ".join(cause.split())[:_MAX_CAUSE], crashed)

    def restored(self, step: int) -> None:
        """Record that the state after `step` updates is loaded and training begins."""
        self.heartbeat("restored", step)
        if self._ledger is not None:
            self._ledger.restored(step, time.monotonic() - self._began)

    def heartbeat(self, phase: str, step: int) -> None:
        """Show that this rank makes progress."""
        self._watchdog.heartbeat(phase, step)

    def record_step(self, step: int) -> None:
        """Record that `step` updates are done."""
        if self._ledger is not None:
            self._ledger.record_step(step)

    def before_commit(self) -> None:
        """Raises StaleAttemptError, on the main rank, if a newer attempt has started: it must not commit any more."""
        if self._ledger is not None:
            self._ledger.require_current()
