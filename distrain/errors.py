"""How a process ends: exit codes, and errors that are reported in one line.

The launcher and the batch scripts decide whether to start again by the exit code only.
"""

import difflib
from collections.abc import Iterable
from typing import Literal

from distrain.masking import mask_secrets

EXIT_DONE = 0
EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h: stopped on request, everything saved, run again
EXIT_USER = 78  # EX_CONFIG of sysexits.h: the user's mistake, running again will not help

Scope = Literal["main", "all", "rank", "peer"]
"""Who reports an error. main: the main rank has it, the others learned it from there. all: every rank has it, the main
rank reports for them, unless it does not end. rank: this rank has it and reports it itself. peer: another rank failed,
and that one or the launcher reports the cause."""


class UserError(Exception):
    """A mistake the user can fix. The message is one line: what is wrong, where, and the cure. Secrets are masked."""

    def __init__(self, message: str, scope: Scope = "all") -> None:
        super().__init__(mask_secrets(message))
        self.scope = scope


class TemporaryError(Exception):
    """An external failure that may not happen again. The message is one line; running again may help. Secrets are
    masked."""

    def __init__(self, message: str, scope: Scope = "rank") -> None:
        super().__init__(mask_secrets(message))
        self.scope = scope


class StaleAttemptError(TemporaryError):
    """A newer attempt of the same run has started; this one must stop writing."""


class Stopped(Exception):  # noqa: N818, it is not an error
    """The run was asked to stop, and everything is saved."""


class Interrupted(KeyboardInterrupt):
    """A tool was interrupted by a signal, SIGINT or SIGTERM; the message says what is kept and how to continue."""

    def __init__(self, number: int, kept: str) -> None:
        super().__init__(f"interrupted; {kept}")
        self.code = 128 + number


class Diverged(Exception):  # noqa: N818, the run continues from a checkpoint
    """Training has to roll back to the last checkpoint and skip the steps up to `step`."""

    def __init__(self, step: int, reason: str) -> None:
        super().__init__(f"{reason} up to step {step}")
        self.step = step


def printable(text: str) -> str:
    """Return text in one line that any UTF-8 terminal can print: line breaks, control characters and bytes of a file
    name that are not UTF-8 become escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


def nearest(name: str, known: Iterable[str], shown: Iterable[str] | None = None) -> str:
    """A phrase that suggests the closest known name for a misspelled one.

    If none is close it lists `shown`, or else the first of `known`.
    """
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if close:
        return f"did you mean {close[0]}?"
    listed = known if shown is None else list(shown)
    return "known: " + ", ".join(listed[:12]) + (", ..." if len(listed) > 12 else "")
