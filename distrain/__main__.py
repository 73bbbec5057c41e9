"""Entry point of every process: runs the command line and turns the outcome into an exit code."""

import io
import os
import select
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress

from distrain import lifetime
from distrain.errors import EXIT_DONE, EXIT_STOPPED, EXIT_USER, Interrupted, TemporaryError, UserError
from distrain.masking import mask_reports
from distrain.parallel.environment import rank_or_zero

_GRACE_S = 10  # for another rank to print why it exits


def command_line() -> int:
    from distrain import cli

    return cli.run(sys.argv[1:])


def main(work: Callable[[], int] = command_line) -> int:
    """Call `work` and return its exit code, or that of the error which it raises; users' errors become one line."""
    open_closed_streams()
    try:
        try:
            return run(work)
        finally:  # also when argparse exits after --help
            sys.stdout.flush()
    except BrokenPipeError:
        if not stdout_closed():
            raise
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt as error:
        print_error(error if str(error) else Interrupted(signal.SIGINT, "run the same command again"))
        return error.code if isinstance(error, Interrupted) else 128 + signal.SIGINT


def entry(work: Callable[[], int] = command_line) -> None:
    """Call `work` as main() does, and exit the process."""
    lifetime.end_with_agent()
    mask_reports()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal that cannot show a name must not end a run
            stream.reconfigure(errors="backslashreplace")
    try:
        code = main(work)
    except KeyboardInterrupt:  # another Ctrl-C while the first one was handled
        code = 128 + signal.SIGINT
    except Exception:
        sys.excepthook(*sys.exc_info())
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    if code not in (EXIT_DONE, EXIT_STOPPED) or is_tool():
        # Libraries torn down while working may abort with another exit code, or wait for a rank that is gone.
        os._exit(code)
    sys.exit(code)


def run(work: Callable[[], int]) -> int:
    try:
        return work()
    except (UserError, TemporaryError) as error:
        if error.scope in ("main", "all"):
            yield_to_main_rank()
        elif error.scope == "peer":
            yield_to_failed_rank()
        if error.scope != "main" or rank_or_zero() == 0:
            print_error(error)
        return EXIT_USER if isinstance(error, UserError) else 1


def is_tool() -> bool:
    from distrain import cli

    return len(sys.argv) > 1 and sys.argv[1] in cli.TOOLS


def open_closed_streams() -> None:
    """Connect closed standard streams, as after `>&-`, to /dev/null, so that no data file gets their descriptors."""
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))  # noqa: PTH123, SIM115


def yield_to_main_rank() -> None:
    """Give rank 0 time to print what every rank would print. Once it exits, torchrun ends the ranks that wait here; a
    rank that is still alive after that prints the error itself."""
    if rank_or_zero() > 0:
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


def print_error(error: BaseException) -> None:
    rank = rank_or_zero()
    with suppress(OSError):  # the exit code still says it
        print(f"distrain: {f'rank {rank}: ' if rank else ''}{error}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    entry()
