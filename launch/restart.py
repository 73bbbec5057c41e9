"""What follows the end of a start of a run: the one restart policy of `launch local`, `launch ssh` and batch.sh.

For batch.sh, `python -m launch.restart RUN` prints the history of its starts, and with `--code N` how to continue.
"""

import argparse
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import astuple, dataclass
from enum import StrEnum
from pathlib import Path

from distrain.errors import EXIT_DONE, EXIT_STOPPED, EXIT_USER
from distrain.resilience.claim import newest_attempt

EXIT_CRASH = 1
MAX_WITHOUT_PROGRESS = 3  # starts in a row that crash before any rank begins an attempt
_MAX_PAUSE_S = 60


class Decision(StrEnum):
    """How to continue after a start has ended."""

    DONE = "done"
    USER_ERROR = "user-error"
    STOPPED = "stopped"
    """Stopped by the user's `stop` file: do not requeue."""
    REQUEUE = "requeue"
    """Stopped by a signal or the cluster: continue later."""
    START_AGAIN = "start-again"
    GIVE_UP = "give-up"


@dataclass(frozen=True)
class Attempt:
    """The newest attempt at a run; the defaults if there is none."""

    number: int = 0
    end: str = ""
    """Why it ended; empty while it runs and after it was killed."""
    committed: int = -1
    """Step of the newest checkpoint when it began."""


@dataclass(frozen=True)
class History:
    """What the policy knows of the starts before the next one."""

    attempt: int = 0
    """Number of the newest attempt."""
    committed: int = -1
    """Step of the newest checkpoint when that began."""
    without_progress: int = 0
    """Starts in a row that crashed before any rank began an attempt."""
    crashes: int = 0
    """Crashes in a row since a start that began with a newer checkpoint than the start before it."""

    @property
    def pause(self) -> int:
        """Seconds to wait before the next start: 1, 2, 4, ... 60, so that a fault that lasts is not met in a loop."""
        return min(_MAX_PAUSE_S, 2 ** min(self.crashes - 1, 10)) if self.crashes else 0


def begin_history(folder: Path) -> History:
    """The history of a launcher that has not started the run in `folder` yet."""
    newest = read_attempt(folder)
    return History(newest.number, newest.committed)


def read_attempt(folder: Path) -> Attempt:
    """The newest attempt at the run in `folder`; none if that cannot be read.

    Of a sweep: how many attempts there were at its members, and how many of these are over.
    """
    with suppress(OSError):
        if (members := folder / "claims").is_dir():
            records = [record for path in members.iterdir() if (record := newest_attempt(path)) is not None]
            return Attempt(
                sum(record.number for record in records), "", sum(record.end is not None for record in records)
            )
        if (record := newest_attempt(folder)) is not None:
            return Attempt(record.number, record.end or "", record.committed)
    return Attempt()


def combine_exit_codes(codes: Iterable[int]) -> int:
    """The exit code of a start from those of its nodes: 78 if any is 78, 0 or 75 if all agree, else 1, a crash."""
    found = set(codes)
    if EXIT_USER in found:
        return EXIT_USER
    if found == {EXIT_DONE}:
        return EXIT_DONE
    return EXIT_STOPPED if found <= {EXIT_DONE, EXIT_STOPPED} else EXIT_CRASH


def decide(code: int, stop_requested: bool, history: History, newest: Attempt) -> tuple[Decision, History]:
    """How to continue after a start that ended with exit code `code`, and the new history.

    `newest` is the newest attempt after that start. `stop_requested` says that the launcher or the cluster wants the
    run to end, whatever the exit code of ranks that were killed for it.
    """
    began = newest.number != history.attempt
    after = History(newest.number, newest.committed)
    if code == EXIT_DONE:
        return Decision.DONE, after
    if code == EXIT_USER:
        return Decision.USER_ERROR, after
    if code == EXIT_STOPPED or stop_requested:
        on_purpose = began and newest.end.startswith(("stopped by file", "stopped by train.stop_epoch"))
        return (Decision.STOPPED if on_purpose else Decision.REQUEUE), after
    crashed = History(
        newest.number,
        newest.committed,
        without_progress=0 if began else history.without_progress + 1,
        crashes=1 if newest.committed > history.committed else history.crashes + 1,
    )
    gives_up = crashed.without_progress >= MAX_WITHOUT_PROGRESS
    return (Decision.GIVE_UP if gives_up else Decision.START_AGAIN), crashed


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m launch.restart", description="The restart policy, for batch.sh.")
    parser.add_argument("folder", type=Path, metavar="RUN", help="folder of the run")
    parser.add_argument("--code", type=int, help="exit code of the start that ended; without it nothing is decided")
    parser.add_argument("--stop-requested", action="store_true", help="the job was asked to stop or lost its nodes")
    parser.add_argument("--history", type=int, nargs=4, default=(), metavar="N", help="what this printed before")
    args = parser.parse_args()
    if args.code is None:
        print(*astuple(begin_history(args.folder)))
        return
    decision, history = decide(args.code, args.stop_requested, History(*args.history), read_attempt(args.folder))
    print(decision, history.pause, *astuple(history))


if __name__ == "__main__":
    main()
