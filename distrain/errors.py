"""What a process says when it ends: exit codes, and the user's mistakes as one line.

The launcher and the batch scripts decide by the exit codes alone whether to run again.
"""

import difflib
from collections.abc import Iterable

EXIT_DONE = 0
EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h: stopped on request, everything saved, run me again
EXIT_USER = 78  # EX_CONFIG of sysexits.h: the user's mistake, running again will not help


class UserError(Exception):
    """A mistake the user can mend. The message is one line: what is wrong, where, and the cure."""


class RankError(UserError):
    """A UserError that one rank comes upon while the others do not: it speaks for itself."""


class TemporaryError(Exception):
    """Something outside failed that may work later. The message is one line; running again may help."""


class SharedError(TemporaryError):
    """A TemporaryError that all ranks come upon alike: rank 0 speaks for all."""


class LostRankError(TemporaryError):
    """Another rank is gone. Why, it says itself, or the launcher does."""


class StaleAttemptError(TemporaryError):
    """Another attempt at the same run has begun, and this one may not change anything any more."""


def nearest(name: str, known: Iterable[str], shown: Iterable[str] | None = None) -> str:
    """A phrase that points from a misspelt name to the closest known one.

    Where nothing is close it lists what there is: `shown`, or else the first of `known`.
    """
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if close:
        return f"did you mean {close[0]}?"
    listed = known if shown is None else list(shown)
    return "known: " + ", ".join(listed[:12]) + (", ..." if len(listed) > 12 else "")
