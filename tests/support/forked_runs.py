"""Whole runs in processes that start quickly, because they fork from one that has imported everything. They exit as a
user's run does; processes.py also starts them as a user does."""

import multiprocessing
import os
import sys
from multiprocessing.connection import wait
from pathlib import Path

from support.processes import Result, environment, free_port

FORKING = multiprocessing.get_context("forkserver")
FORKING.set_forkserver_preload(
    ["distrain.train", "torchvision.transforms.v2.functional", "pyarrow.parquet", "support.forked_runs"]
)


class ForkedResult(Result):
    """How a run ended: the exit code of the rank that failed first, or 0, and what all ranks printed."""

    @property
    def delivered(self) -> list[list[list[int]]]:
        """Labels of the training batches that each rank consumed, by rank and batch."""
        files = sorted(self.folder.parent.glob(f"{self.folder.name}-labels-*"))
        return [[[int(label) for label in line.split()] for line in file.read_text().splitlines()] for file in files]


def train_forked(folder: Path, *overrides: str, ranks: int = 1) -> ForkedResult:
    """Train to the end. If one rank fails the others are killed, as by torchrun."""
    arguments = [f"run.name={folder.name}", f"run.dir={folder.parent}", *overrides]
    rendezvous = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    logs = [folder.parent / f"{folder.name}-{rank}.log" for rank in range(ranks)]
    processes = []
    for rank in range(ranks):
        identity = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
        variables = environment() | (identity | rendezvous if ranks > 1 else {})
        labels = folder.parent / f"{folder.name}-labels-{rank}"
        processes.append(FORKING.Process(target=_run, args=(arguments, variables, logs[rank], labels)))
        processes[-1].start()
    code, running = 0, list(processes)
    while running and wait([process.sentinel for process in running], timeout=120):
        code = code or next((process.exitcode for process in running if process.exitcode), 0)
        running = [process for process in running if process.is_alive()]
        for process in running if code else []:
            process.kill()
    for process in running:
        process.kill()
        code = code or -1
    return ForkedResult(code, "".join(log.read_text() for log in logs), folder)


def _run(arguments: list[str], variables: dict[str, str], log: Path, labels: Path) -> None:
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.clear()
    os.environ.update(variables)
    sys.argv = ["distrain", *arguments]
    from distrain.__main__ import main
    from distrain.data.loading import setup

    open_loader = setup.open_loader
    setup.open_loader = lambda *options: _Recorder(open_loader(*options), labels)
    sys.exit(main())


class _Recorder:
    """A loader that records the labels of the training batches it yields, a line for each."""

    def __init__(self, loader, path: Path):
        self._loader = loader
        self._path = path
        self.close = loader.close

    def stream(self, requests):
        is_training = []

        def recorded():
            for request in requests:
                is_training.append(request.augmented)
                yield request

        with self._path.open("a") as record:
            for number, batch in enumerate(self._loader.stream(recorded())):
                if is_training[number]:
                    record.write(" ".join(map(str, batch.labels.tolist())) + "\n")
                yield batch
