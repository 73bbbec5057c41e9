"""One attempt of a run: watched by the other ranks, recorded by the main rank."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Self

from distrain.checkpoint import newest_step
from distrain.config import Config
from distrain.errors import Stopped, UserError
from distrain.files import translated_errors
from distrain.masking import mask_secrets
from distrain.parallel.group import Group
from distrain.resilience.claim import Claim
from distrain.resilience.faults import Faults
from distrain.resilience.ledger import Ledger
from distrain.resilience.watchdog import Watchdog

_MAX_CAUSE = 300  # characters


class Attempt:
    """A context manager around everything that writes to the run's folder. Every rank has one.

    Raises UserError, before anything is written, if another attempt is alive or if too many attempts in a row ended
    without a new checkpoint.
    """

    def __init__(self, config: Config, group: Group, watchdog: Watchdog) -> None:
        self._config = config
        self._group = group
        self._watchdog = watchdog
        self._ledger: Ledger | None = None
        self._claim: Claim | None = None
        self._began = time.monotonic()

    def __enter__(self) -> Self:
        self.token: str = self._group.on_main(self._begin)
        """Unique to this attempt, the same on every rank."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._ledger is not None:
            cause = f"stopped by {error}" if isinstance(error, Stopped) else f"{type(error).__name__}: {error}"
            crashed = error is not None and not isinstance(error, (Stopped, UserError))
            self._ledger.end("done" if error is None else " ".join(mask_secrets(cause).split())[:_MAX_CAUSE], crashed)

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Expect progress of this rank for as long as it trains, and arm the faults that the configuration asks for."""
        self.heartbeat("start", 0)
        try:
            with Faults(self._config.resilience.faults, self._config.run.folder, self._group.rank):
                yield
        finally:
            self._watchdog.finish()

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

    def require_current(self) -> None:
        """Raises StaleAttemptError, on the main rank, if a newer attempt has started: this one must not write any more.

        Raises OSError if that cannot be found out.
        """
        if self._claim is not None:
            self._claim.require_current()

    def _begin(self) -> str:
        folder, allowed = self._config.run.folder, self._config.resilience.attempts
        with translated_errors(folder):
            self._claim = Claim(folder, self._group.world, newest_step(folder / "checkpoints"), allowed)
        self._ledger = Ledger(folder, self._claim)
        return self._claim.record.token
