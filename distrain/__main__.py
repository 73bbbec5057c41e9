"""The entry of every process: runs the command line and turns what happened into an exit code."""

import os
import sys
import time

from distrain.errors import EXIT_USER, RankError, TemporaryError, UserError


def main() -> int:
    from distrain import cli

    try:
        return cli.run(sys.argv[1:])
    except UserError as error:
        if not isinstance(error, RankError):
            leave_it_to_the_leader()
        say(error)
        return EXIT_USER
    except TemporaryError as error:
        say(error)
        return 1


def leave_it_to_the_leader() -> None:
    """Most mistakes are found by all ranks alike. Rank 0 tells them at once, and torchrun ends the others while
    they wait here; a rank that is still there after some seconds was the only one."""
    if int(os.environ.get("RANK", 0)) > 0:
        time.sleep(5)


def say(error: Exception) -> None:
    rank = int(os.environ.get("RANK", 0))
    print(f"distrain: {f'rank {rank}: ' if rank else ''}{error}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
