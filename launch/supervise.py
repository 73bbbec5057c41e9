"""A job on several nodes, from one terminal: started everywhere, followed, started again after a crash, and ended."""

import json
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType, TracebackType
from typing import Self

from distrain.config import Config
from distrain.errors import EXIT_DONE, EXIT_STOPPED, EXIT_USER, UserError

EXIT_LOST = 255  # ssh's own, where it has lost the host or never reached it
_GRACE_S = 20.0  # for the other nodes to end by themselves, once one has ended badly
_STARTS_WITHOUT_PROGRESS = 3  # in a row, in which no rank came so far as to begin an attempt
_WAIT_S = 10.0  # between looks whether a lost host is back


@dataclass(frozen=True)
class Host:
    """A machine, or what stands for one. `command` runs what follows it there."""

    name: str
    address: str
    command: tuple[str, ...] = ()
    variables: dict[str, str] = field(default_factory=dict)

    def start(self, arguments: Sequence[str]) -> "subprocess.Popen[bytes]":
        """Run `python -m launch node` there, in this folder. It ends when what it is asked to follow lets go."""
        settings = [f"{name}={value}" for name, value in self.variables.items()]
        words = ["env", *settings, sys.executable, "-m", "launch", "node", "--attended", *arguments]
        if self.command:
            words = [*self.command, f"cd {shlex.quote(str(Path.cwd()))} && exec {shlex.join(words)}"]
        return subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
        )

    def answers(self) -> bool:
        """Whether it can be reached now."""
        if not self.command:
            return True
        done = subprocess.run([*self.command, "true"], stdin=subprocess.DEVNULL, capture_output=True)
        return done.returncode == 0


class Job:
    """One run, on some hosts, until it is done. A context manager that leaves nothing running on them."""

    def __init__(
        self, settings: Config, hosts: Sequence[Host], ranks: int | None, arguments: Sequence[str], fewest: int
    ) -> None:
        """`ranks` on each host; `fewest` hosts suffice to go on after others are lost."""
        self._folder = settings.run.folder
        self._hosts = list(hosts)
        self._ranks = ranks
        self._arguments = list(arguments)
        self._fewest = fewest
        self._name = str(int(time.time()))
        self._stopping = 0
        self._nodes: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Self:
        self._before = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self._nodes.values():
            process.kill()
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def examine(self) -> int:
        """Examine the hosts. Returns 0 if all are fit, 78 if one is not, 1 if that cannot be told."""
        return outcome(self._start(self._hosts, f"{self._name}-probe", "--probe").values())

    def run(self) -> int:
        """Start it again and again until it is done, stopped or hopeless. Returns 0, 75, 78 or 1."""
        number, without_progress = 0, 0
        hosts = self._hosts
        while True:
            attempt = self._attempt()
            code = outcome(self._start(hosts, f"{self._name}-{number}").values())
            if code != 1 or self._stopping:
                return EXIT_STOPPED if code == 1 else code
            without_progress = without_progress + 1 if self._attempt() == attempt else 0
            if without_progress == _STARTS_WITHOUT_PROGRESS:
                info(f"{without_progress} starts in a row ended before training began: giving up")
                return 1
            if (hosts := self._gather()) == []:
                return EXIT_STOPPED
            number += 1
            info(f"starting again on {', '.join(host.name for host in hosts)}")

    def _start(self, hosts: Sequence[Host], job: str, *options: str) -> dict[str, int]:
        """Start it once and wait for its end. Returns each host's exit code."""
        logs = self._folder / "logs"
        for node, host in enumerate(hosts):
            ranks = ["--ranks", str(self._ranks)] if self._ranks else []
            self._nodes[host.name] = host.start(
                [
                    "--nodes", str(len(hosts)), "--node", str(node), "--head", hosts[0].address, "--job", job,
                    "--name", host.name, "--logs", str(logs.resolve()), *ranks, *options, "--", *self._arguments,
                ]
            )  # fmt: skip
        readers = [threading.Thread(target=copy, args=(process,)) for process in self._nodes.values()]
        for reader in readers:
            reader.start()
        codes: dict[str, int] = {}
        deadline = float("inf")
        while len(codes) < len(hosts):
            for name, process in self._nodes.items():
                if name not in codes and (code := process.poll()) is not None:
                    codes[name] = code
                    if code == EXIT_LOST:
                        info(f"lost {name}")
                    if code != 0:
                        deadline = min(deadline, time.monotonic() + _GRACE_S)
            if time.monotonic() > deadline:
                for name, process in self._nodes.items():
                    if name not in codes:
                        info(f"{name} does not end by itself: killed")
                        process.kill()
                deadline = float("inf")
            time.sleep(0.05)
        for reader in readers:
            reader.join(timeout=5)
        self._nodes.clear()
        if (text := first_failure(logs / job)) is not None:
            print(text, file=sys.stderr, flush=True)
        return codes

    def _gather(self) -> list[Host]:
        """The hosts to go on with: all, or those left if they are enough, or all once they are back."""
        told = False
        while not self._stopping:
            alive = [host for host in self._hosts if host.answers()]
            if len(alive) >= self._fewest:
                return alive
            if not told:
                lost = ", ".join(host.name for host in self._hosts if host not in alive)
                info(f"waiting for {lost} to come back; --min-nodes {len(alive)} would go on without")
                told = True
            time.sleep(_WAIT_S)
        return []

    def _attempt(self) -> int:
        """The number of the newest attempt at the run."""
        path = self._folder / "attempt.json"
        return int(json.loads(path.read_text())["attempt"]) if path.exists() else 0

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._stopping += 1
        for process in self._nodes.values():
            if self._stopping > 1:
                process.kill()
            elif process.stdin is not None:
                process.stdin.close()
        if self._stopping == 1:
            print("launch: stopping: saving first; once more to end now", file=sys.stderr, flush=True)


def outcome(codes: Iterable[int]) -> int:
    """What a job came to whose nodes ended so: 78 if any says so, 0 or 75 if they agree, 1 for a crash."""
    found = set(codes)
    if EXIT_USER in found:
        return EXIT_USER
    if found == {EXIT_DONE}:
        return EXIT_DONE
    return EXIT_STOPPED if found <= {EXIT_DONE, EXIT_STOPPED} else 1


def first_failure(logs: Path) -> str | None:
    """What the rank that failed first said last, of those that crashed in one start of a job."""
    reports = sorted(logs.glob("failed-*.txt"))
    return reports[0].read_text().rstrip() if reports else None


def copy(process: "subprocess.Popen[bytes]") -> None:
    """Print what a node says, line by line. Its ranks have put their names in front."""
    assert process.stdout is not None
    for line in process.stdout:
        sys.stdout.buffer.write(line)
        sys.stdout.buffer.flush()


def info(text: str) -> None:
    print(f"launch: {text}", file=sys.stderr, flush=True)


def read_hosts(hosts: str | None, file: Path | None) -> list[str]:
    """Names from `a,b,c` or from a file with one a line, as MPI's: what follows a name is left alone, # is a comment.

    Raises UserError if there are none, or one twice.
    """
    if file is not None:
        try:
            lines = [line.partition("#")[0].split() for line in file.read_text().splitlines()]
        except OSError as error:
            raise UserError(f"--hostfile {file}: {error.strerror}") from error
        names = [words[0] for words in lines if words]
    else:
        names = [name.strip() for name in (hosts or "").split(",") if name.strip()]
    if not names:
        raise UserError("no hosts: name them with --hosts a,b or --hostfile FILE")
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"{', '.join(twice)} is named twice among the hosts")
    return names
