"""A run on several hosts, controlled from one terminal: started on all, restarted after crashes, and stopped."""

import os
import re
import secrets
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType, TracebackType
from typing import Self

from distrain.errors import EXIT_DONE, EXIT_STOPPED, EXIT_USER, UserError
from distrain.files import resolve
from distrain.output import keep_writing
from launch.restart import EXIT_CRASH, Decision, begin_history, combine_exit_codes, decide, read_attempt
from launch.stopping import STOP_LINE

_EXIT_KILLED = 128 + signal.SIGINT
_EXIT_SSH = 255  # ssh lost the connection to the host or could not connect
_GRACE_S = 20.0  # for the other nodes to exit after one has failed
_GRACE_USER_S = 4.0  # the same after one has reported a mistake of the user, which the others need not repeat
_STOPPING = "stopping after saving; repeat the signal (Ctrl-C) to kill"
_POLL_S = 10.0  # between attempts to reach a lost host

# A shell reads lines NAME=VALUE byte by byte, up to an empty one, and leaves the rest to the program.
_READ_VARIABLES = 'while IFS= read -r line && [ -n "$line" ]; do export "$line"; done; exec "$@"'
_HOST = re.compile(r"([A-Za-z0-9_][A-Za-z0-9._+-]*@)?[A-Za-z0-9_\[:][A-Za-z0-9._:%\]-]*")

_EXIT_CODES = {
    Decision.DONE: EXIT_DONE,
    Decision.USER_ERROR: EXIT_USER,
    Decision.STOPPED: EXIT_STOPPED,
    Decision.REQUEUE: EXIT_STOPPED,  # by the user
    Decision.GIVE_UP: EXIT_CRASH,
}


@dataclass(frozen=True)
class Host:
    """A machine, real or simulated."""

    name: str
    address: str
    command: tuple[str, ...] = ()
    """Prefix of a shell command that runs there; empty for this machine."""
    variables: dict[str, str] = field(default_factory=dict)
    """Environment variables of its processes."""
    secrets: dict[str, str] = field(default_factory=dict)
    """The same, sent over the connection because a command line can be seen by all users of the host."""
    cores: tuple[int, ...] = ()
    """CPU cores of its processes; empty: all."""

    def start(self, arguments: Sequence[str]) -> "subprocess.Popen[bytes]":
        """Start `launch node` there, in the working directory. It stops at a line on its standard input or its end."""
        settings = [f"{name}={value}" for name, value in self.variables.items()]
        pin = ["taskset", "--cpu-list", ",".join(map(str, self.cores))] if self.cores else []
        words = [*pin, "env", *settings, sys.executable, "-m", "launch", "node", "--watch-stdin", *arguments]
        if self.command:
            words = ["sh", "-c", _READ_VARIABLES, "sh", *words]
            words = [*self.command, f"cd {shlex.quote(str(Path.cwd()))} && exec {shlex.join(words)}"]
        process = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
        )
        if self.command:
            assert process.stdin is not None
            lines = [f"{name}={value}\n".encode(errors="surrogateescape") for name, value in self.secrets.items()]
            with suppress(BrokenPipeError):  # the connection failed, which its exit code tells
                process.stdin.write(b"".join(lines) + b"\n")
                process.stdin.flush()
        return process

    def is_reachable(self) -> bool:
        if not self.command:
            return True
        done = subprocess.run([*self.command, "true"], stdin=subprocess.DEVNULL, capture_output=True)
        return done.returncode == 0


class Job:
    """One run on some hosts until it is done. A context manager that leaves no process running on them."""

    def __init__(
        self, folder: Path, hosts: Sequence[Host], ranks: int | None, arguments: Sequence[str], min_hosts: int
    ) -> None:
        """`ranks` per host (None: one per GPU, or 1); at least `min_hosts` are needed after losing hosts.

        `arguments` are those of `python -m distrain`, and `folder` is that of its run.
        """
        self._folder = folder
        self._hosts = list(hosts)
        self._ranks = ranks
        self._arguments = list(arguments)
        self._min_hosts = min_hosts
        self._id = f"{int(time.time())}_{secrets.token_hex(4)}"  # no other launch has it, and theirs sort by time
        self._stop_signals = 0
        self._nodes: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Self:
        keep_writing()
        self._previous = {number: signal.signal(number, self._handle) for number in stop_signals()}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self._nodes.values():
            process.kill()
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def check_hosts(self) -> int:
        """Check the health of the hosts. Returns 0 if all are healthy, 78 if one is not, 1 if the check failed."""
        return combine_exit_codes(self._start(self._hosts, f"{self._id}-doctor", "--doctor").values())

    def run(self) -> int:
        """Start the run, and again after every crash, until it is done.

        Returns 0, 75, 78, 1 for giving up, or 130 if a second stop signal killed it.
        """
        number, hosts, history = 0, self._hosts, begin_history(self._folder)
        while True:
            code = combine_exit_codes(self._start(hosts, f"{self._id}-{number}").values())
            decision, history = decide(code, self._stop_signals > 0, history, read_attempt(self._folder))
            if decision == Decision.REQUEUE and code != EXIT_STOPPED and self._stop_signals > 1:
                return _EXIT_KILLED
            if decision == Decision.GIVE_UP:
                info(f"giving up: {history.without_progress} starts in a row crashed before training began")
            if decision != Decision.START_AGAIN:
                return _EXIT_CODES[decision]
            self._sleep(history.pause)
            if (hosts := self._wait_for_hosts()) == []:
                return EXIT_STOPPED
            number += 1
            info(f"starting again on {', '.join(host.name for host in hosts)}")

    def _start(self, hosts: Sequence[Host], job: str, *options: str) -> dict[str, int]:
        """Start all nodes and wait until they exit. Returns each host's exit code."""
        logs = self._folder / "logs"
        ranks = ["--ranks", str(self._ranks)] if self._ranks else []
        for rank, host in enumerate(hosts):
            self._nodes[host.name] = host.start(
                [
                    "--nodes", str(len(hosts)), "--node-rank", str(rank), "--head", hosts[0].address, "--job", job,
                    "--name", host.name, "--logs", str(resolve(logs)), *ranks, *options, "--", *self._arguments,
                ]
            )  # fmt: skip
        if self._stop_signals:  # it came while they were being started
            for process in self._nodes.values():
                write_stop_line(process)
        readers = [threading.Thread(target=copy_output, args=(process,)) for process in self._nodes.values()]
        for reader in readers:
            reader.start()
        codes = self._wait()
        for reader in readers:
            reader.join(timeout=5)
        self._nodes.clear()
        if (text := first_failure(logs / job)) is not None:
            print(text, file=sys.stderr, flush=True)
        return codes

    def _wait(self) -> dict[str, int]:
        """Wait until all nodes have exited; after one has failed, kill the others once the grace period is over."""
        codes: dict[str, int] = {}
        deadline = float("inf")
        while len(codes) < len(self._nodes):
            for name, process in self._nodes.items():
                if name not in codes and (code := process.poll()) is not None:
                    codes[name] = code
                    if code == _EXIT_SSH:
                        info(f"lost {name}")
                    if code != 0:
                        grace = _GRACE_USER_S if code == EXIT_USER else _GRACE_S
                        deadline = min(deadline, time.monotonic() + grace)
            if time.monotonic() > deadline:
                for name, process in self._nodes.items():
                    if name not in codes:
                        if EXIT_USER not in codes.values():
                            info(f"{name} is still running {_GRACE_S:.0f} s after another node failed: killed")
                        kill(process)
                deadline = float("inf")
            time.sleep(0.05)
        return codes

    def _wait_for_hosts(self) -> list[Host]:
        """The hosts to continue on: all that are reachable, once there are enough. Empty if asked to stop."""
        reported = False
        while not self._stop_signals:
            reachable = [host for host in self._hosts if host.is_reachable()]
            if len(reachable) >= self._min_hosts:
                return reachable
            if not reported:
                lost = ", ".join(host.name for host in self._hosts if host not in reachable)
                info(f"waiting for {lost}; use --min-nodes {len(reachable)} to continue without")
                reported = True
            self._sleep(_POLL_S)
        return []

    def _sleep(self, seconds: float) -> None:
        """Wait, but not after a stop signal."""
        until = time.monotonic() + seconds
        while time.monotonic() < until and not self._stop_signals:
            time.sleep(0.05)

    @property
    def is_first_request(self) -> bool:
        """Whether the nodes were asked to stop once, and are not killed yet."""
        return self._stop_signals == 1

    def request_stop(self) -> None:
        """Have the nodes save and exit; at the second request kill them."""
        self._stop_signals += 1
        for process in self._nodes.values():
            if self._stop_signals == 1:
                write_stop_line(process)
            else:
                kill(process)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.request_stop()
        if self.is_first_request:
            info(_STOPPING)


def run_together(jobs: Sequence[Job]) -> int:
    """Run jobs with a common purpose, such as one on each host that trains members of a sweep: done once one is.

    Returns an exit code as `Job.run` does.
    """
    with ExitStack() as stack, ThreadPoolExecutor(len(jobs)) as pool:
        for job in jobs:
            stack.enter_context(job)

        def handle(number: int, frame: FrameType | None) -> None:
            for job in jobs:
                job.request_stop()
            if jobs[0].is_first_request:
                info(_STOPPING)

        for number in stop_signals():
            signal.signal(number, handle)
        codes = []
        for future in as_completed([pool.submit(job.run) for job in jobs]):
            codes.append(future.result())
            if codes[-1] == EXIT_DONE:  # nothing is left for hosts that are waited for
                for job in jobs:
                    job.request_stop()
    return EXIT_DONE if EXIT_DONE in codes else combine_exit_codes(codes)


def stop_signals() -> list[signal.Signals]:
    """The signals that stop a job."""
    numbers = [signal.SIGINT, signal.SIGTERM]
    return numbers if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else [*numbers, signal.SIGHUP]  # as under nohup


def write_stop_line(process: "subprocess.Popen[bytes]") -> None:
    """Ask a node to save and exit."""
    assert process.stdin is not None
    with suppress(OSError):  # it has exited; os.write, as this may interrupt itself
        os.write(process.stdin.fileno(), STOP_LINE)


def kill(process: "subprocess.Popen[bytes]") -> None:
    """Kill a node and its ranks. One on another host kills its ranks when its standard input ends after a line."""
    write_stop_line(process)
    process.kill()


def first_failure(logs: Path) -> str | None:
    """The report of the rank that failed first in one start of a job; None if none crashed."""
    reports = sorted(logs.glob("failed-*.txt"))
    return reports[0].read_text().rstrip() if reports else None


def copy_output(process: "subprocess.Popen[bytes]") -> None:
    """Print a node's output line by line; each line already has its rank as a prefix."""
    assert process.stdout is not None
    for line in process.stdout:
        sys.stdout.buffer.write(line)
        sys.stdout.buffer.flush()


def info(text: str) -> None:
    print(f"launch: {text}", file=sys.stderr, flush=True)


def read_hosts(hosts: str | None, file: Path | None) -> list[str]:
    """Host names from `a,b,c`, or from a file with one per line; like MPI's, it may have slots and # comments.

    Raises UserError if there are none, duplicates, or names that are none.
    """
    if file is not None:
        try:
            lines = [line.partition("#")[0].split() for line in file.read_text().splitlines()]
        except OSError as error:
            raise UserError(f"--hostfile {file}: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise UserError(f"--hostfile {file}: not a text file") from error
        names = [words[0] for words in lines if words]
    else:
        names = [name.strip() for name in (hosts or "").split(",") if name.strip()]
    if not names:
        raise UserError("no hosts: set --hosts a,b or --hostfile FILE")
    if invalid := [name for name in names if not _HOST.fullmatch(name)]:
        raise UserError(f"{invalid[0]!r} is not a host name: write HOST or USER@HOST")
    if duplicates := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"duplicate hosts: {', '.join(duplicates)}")
    return names
