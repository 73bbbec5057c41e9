"""Entry point of every process: runs the command line and turns the outcome into an exit code."""

import os
import select
import signal
import sys
import time

from distrain.errors import EXIT_USER, TemporaryError, UserError

_GRACE_S = 10  # for another rank to print why it exits


def main() -> int:
    try:
        try:
            return run()
        finally:  # also when argparse exits after --help
            sys.stdout.flush()
    except BrokenPipeError:
        if not stdout_closed():
            raise
        return 128 + signal.SIGPIPE


def entry() -> None:
    """Run main() and exit the process."""
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    if code == EXIT_USER:
        os._exit(code)  # libraries torn down while working may abort with another exit code
    sys.exit(code)


def run() -> int:
    from distrain import cli

    try:
        return cli.run(sys.argv[1:])
    except (UserError, TemporaryError) as error:
        if error.scope == "all":
            yield_to_main_rank()
        elif error.scope == "peer":
            yield_to_failed_rank()
        print_error(error)
        return EXIT_USER if isinstance(error, UserError) else 1


def yield_to_main_rank() -> None:
    """Give rank 0 time to print what every rank would print. Once it exits, torchrun ends the ranks that wait here; a
    rank that is still alive after that prints the error itself."""
    if int(os.environ.get("RANK", 0)) > 0:
        time.sleep(_GRACE_S)


def yield_to_failed_rank() -> None:
    """Give a failed rank time to print its error. torchrun may have noticed first and sent SIGTERM to this rank."""
    from distrain.resilience.stopping import StopRequest

    if StopRequest.sigterm_came:
        signal.raise_signal(signal.SIGTERM)
    time.sleep(_GRACE_S)


def stdout_closed() -> bool:
    """Whether the reader of standard output is gone, as after `| head`. Output then goes to /dev/null, so that Python
    does not complain at exit."""
    poll = select.poll()
    poll.register(sys.stdout, 0)
    if not any(event & select.POLLERR for _, event in poll.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return True


def print_error(error: Exception) -> None:
    rank = int(os.environ.get("RANK", 0))
    print(f"distrain: {f'rank {rank}: ' if rank else ''}{error}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    entry()
