"""The entry of every process: runs the command line and turns what happened into an exit code."""

import os
import select
import signal
import sys
import time

from distrain.errors import EXIT_USER, LostRankError, RankError, SharedError, TemporaryError, UserError

_LAST_WORDS_S = 5  # that another rank has to say why it ends


def main() -> int:
    try:
        try:
            return run()
        finally:  # also where argparse leaves, after --help
            sys.stdout.flush()
    except BrokenPipeError:
        if not stdout_closed():
            raise
        return 128 + signal.SIGPIPE


def entry() -> None:
    """main() as the whole of a process."""
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    if code == EXIT_USER:
        os._exit(code)  # libraries that are taken down in the middle of their work may abort, with another code
    sys.exit(code)


def run() -> int:
    from distrain import cli

    try:
        return cli.run(sys.argv[1:])
    except UserError as error:
        if not isinstance(error, RankError):
            yield_to_main_rank()
        info(error)
        return EXIT_USER
    except TemporaryError as error:
        if isinstance(error, SharedError):
            yield_to_main_rank()
        if isinstance(error, LostRankError):
            yield_to_lost_rank()
        info(error)
        return 1


def yield_to_main_rank() -> None:
    """Give rank 0 time to say what all would say alike. Once it has ended, torchrun ends those that wait here; one
    that is still there after some seconds has to speak itself."""
    if int(os.environ.get("RANK", 0)) > 0:
        time.sleep(_LAST_WORDS_S)


def yield_to_lost_rank() -> None:
    """The same for a rank that is gone. torchrun may have seen that first: then this one was told to end already."""
    from distrain.resilience.stopping import StopRequest

    if StopRequest.sigterm_came:
        signal.raise_signal(signal.SIGTERM)
    time.sleep(_LAST_WORDS_S)


def stdout_closed() -> bool:
    """Whether what is printed has nowhere to go, as behind `| head`. It then goes to /dev/null, so that Python does not
    complain at exit."""
    watch = select.poll()
    watch.register(sys.stdout, 0)
    if not any(event & select.POLLERR for _, event in watch.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return True


def info(error: Exception) -> None:
    rank = int(os.environ.get("RANK", 0))
    print(f"distrain: {f'rank {rank}: ' if rank else ''}{error}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    entry()
