"""What follows the end of a start of a run: the one restart policy of `launch local`, `launch ssh` and batch.sh.

For batch.sh, `python -m launch.restart RUN` prints the run's attempt number, and with `--code N` how to continue.
"""

import argparse
import json
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from distrain.errors import EXIT_DONE, EXIT_STOPPED, EXIT_USER

EXIT_CRASH = 1
MAX_WITHOUT_PROGRESS = 3  # starts in a row that crash before any rank begins an attempt


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
    """What attempt.json records of the newest attempt at a run; the defaults if there is none."""

    number: int = 0
    end: str = ""
    """Why it ended; empty while it runs and after it was killed."""


def read_attempt(folder: Path) -> Attempt:
    """The newest attempt at the run in `folder`. A missing, empty or damaged attempt.json is no attempt."""
    try:
        content: dict[str, Any] = json.loads((folder / "attempt.json").read_bytes())
        return Attempt(int(content["attempt"]), str(content.get("end") or ""))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return Attempt()


def combine_exit_codes(codes: Iterable[int]) -> int:
    """The exit code of a start from those of its nodes: 78 if any is 78, 0 or 75 if all agree, else 1, a crash."""
    found = set(codes)
    if EXIT_USER in found:
        return EXIT_USER
    if found == {EXIT_DONE}:
        return EXIT_DONE
    return EXIT_STOPPED if found <= {EXIT_DONE, EXIT_STOPPED} else EXIT_CRASH


def decide(code: int, stop_requested: bool, before: int, after: Attempt, without_progress: int) -> tuple[Decision, int]:
    """How to continue after a start that ended with exit code `code`, and the new count of starts without progress.

    `before` is the attempt number before the start, `after` the newest attempt after it. `stop_requested` says that
    the launcher or the cluster wants the run to end, whatever the exit code of ranks that were killed for it.
    """
    if code == EXIT_DONE:
        return Decision.DONE, without_progress
    if code == EXIT_USER:
        return Decision.USER_ERROR, without_progress
    if code == EXIT_STOPPED or stop_requested:
        by_file = after.end.startswith("stopped by file")
        return (Decision.STOPPED if by_file else Decision.REQUEUE), without_progress
    without_progress = without_progress + 1 if after.number == before else 0
    return (Decision.GIVE_UP if without_progress >= MAX_WITHOUT_PROGRESS else Decision.START_AGAIN), without_progress


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m launch.restart", description="The restart policy, for batch.sh.")
    parser.add_argument("folder", type=Path, metavar="RUN", help="folder of the run")
    parser.add_argument("--code", type=int, help="exit code of the start that ended; without it nothing is decided")
    parser.add_argument("--stop-requested", action="store_true", help="the job was asked to stop or lost its nodes")
    parser.add_argument("--before", type=int, default=0, help="attempt number before that start")
    parser.add_argument("--without-progress", type=int, default=0, help="earlier starts in a row without progress")
    args = parser.parse_args()
    attempt = read_attempt(args.folder)
    if args.code is None:
        print(attempt.number)
        return
    decision, without_progress = decide(args.code, args.stop_requested, args.before, attempt, args.without_progress)
    print(decision, attempt.number, without_progress)


if __name__ == "__main__":
    main()
