"""Whole runs that record the labels they train on."""

import os
from functools import partial
from pathlib import Path

from support.forking import Ranks
from support.processes import Result, environment, free_port


class ForkedResult(Result):
    """How a run ended: the exit code of the rank that failed first, or 0, and what all ranks printed."""

    @property
    def delivered(self) -> list[list[list[int]]]:
        """Labels of the training batches that each rank consumed, by rank and batch."""
        files = sorted(self.folder.parent.glob(f"{self.folder.name}-labels-*"))
        return [[[int(label) for label in line.split()] for line in file.read_text().splitlines()] for file in files]


def train_forked(folder: Path, *overrides: str, ranks: int = 1) -> ForkedResult:
    """Train to the end."""
    log = folder.with_suffix(".log")
    log.unlink(missing_ok=True)
    arguments = [f"run.name={folder.name}", f"run.dir={folder.parent}", *overrides]
    record = partial(_record_labels, folder.parent / f"{folder.name}-labels-")
    code = Ranks(arguments, environment(), ranks, free_port(), log, record).wait(120)
    return ForkedResult(code, log.read_text(), folder)


def _record_labels(prefix: Path) -> None:
    from distrain.data.loading import loaders

    labels = Path(f"{prefix}{os.environ.get('RANK', 0)}")
    open_loader = loaders.open_loader
    loaders.open_loader = lambda *options: _Recorder(open_loader(*options), labels)


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
