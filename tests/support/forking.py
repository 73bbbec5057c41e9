"""Ranks that start in tenths of a second, because they fork from a process that has imported everything."""

import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import wait
from pathlib import Path

import psutil

FORKING = multiprocessing.get_context("forkserver")
FORKING.set_forkserver_preload(
    [
        "distrain.train", "torchvision.transforms.v2.functional", "pyarrow.parquet", "torch._dynamo",
        "matplotlib.backends.backend_agg", "matplotlib.figure", "fsspec.implementations.local", "support.forking",
    ]
)  # fmt: skip
_GRACE_S = 20  # for the other ranks to exit after one has failed


class Ranks:
    """The ranks of one start of a run, with the interface of the Popen of their torchrun.

    Once one fails, the others get SIGTERM and later SIGKILL. The exit code is that of the rank that failed first, or 0.
    """

    def __init__(
        self,
        arguments: list[str],
        variables: dict[str, str],
        ranks: int,
        port: int,
        log: Path,
        prepare: Callable[[], object] | None = None,
    ) -> None:
        """Each rank calls `prepare` before it starts."""
        rendezvous = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_WORLD_SIZE": str(ranks)}
        self._processes = []
        self._code = 0
        self._kill_at = float("inf")
        for rank in range(ranks):
            identity = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
            own = variables | (identity | rendezvous if ranks > 1 else {})
            process = FORKING.Process(target=_run, args=(arguments, own, str(Path.cwd()), log, prepare))
            process.start()
            self._processes.append(process)

    @property
    def pids(self) -> list[int]:
        """The process ids of all ranks."""
        return [process.pid for process in self._processes if process.pid is not None]

    def poll(self) -> int | None:
        """The exit code if all ranks have exited."""
        failed = [process.exitcode for process in self._processes if process.exitcode]
        running = [process for process in self._processes if process.exitcode is None]
        if failed and not self._code:
            self._code = failed[0]
            self._kill_at = time.monotonic() + _GRACE_S
            for process in running:
                process.terminate()
        if time.monotonic() > self._kill_at:
            for process in running:
                process.kill()
        return None if running else self._code

    def wait(self, timeout: float | None = None) -> int:
        """Wait until all ranks have exited and return the exit code. Raises subprocess.TimeoutExpired."""
        deadline = float("inf") if timeout is None else time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("distrain", timeout or 0)
            wait([process.sentinel for process in self._processes if process.exitcode is None], timeout=0.5)
        return code

    def kill(self) -> None:
        """Send SIGKILL to all ranks at once, as if the machine lost power."""
        alive = []
        for process in self._processes:
            with suppress(psutil.NoSuchProcess):  # it has just ended
                alive += [psutil.Process(process.pid)] if process.exitcode is None else []
        kill_at_once(alive)
        for process in self._processes:
            process.join()


def kill_at_once(processes: list[psutil.Process]) -> None:
    """Send SIGKILL to processes none of which may notice that another one is gone."""
    for act in (psutil.Process.suspend, psutil.Process.kill):
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                act(process)


def _run(
    arguments: list[str],
    variables: dict[str, str],
    folder: str,
    log: Path,
    prepare: Callable[[], object] | None,
) -> None:
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(variables)
    sys.argv = ["distrain", *arguments]
    from distrain.__main__ import main

    if prepare is not None:
        prepare()
    sys.exit(main())
