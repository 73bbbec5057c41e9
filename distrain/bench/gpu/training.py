"""Stages that train twice and compare the weights: resume, digests."""

import os
import re
import subprocess
import sys
from pathlib import Path

from distrain.bench.gpu.images import build_shards
from distrain.bench.gpu.setup import FIXED_CHOICES, NEEDS_GPU, Setup
from distrain.bench.rounds import free
from distrain.bench.step import distrain_candidate
from distrain.checkpoint import weights_digest
from distrain.data.storage.index_file import load_index
from distrain.errors import EXIT_DONE, EXIT_STOPPED
from distrain.learner import Learner, build_network
from distrain.lifetime import tied
from distrain.parallel.group import Group

_DIGEST = re.compile(r"^done: .* weights (\w+)$", re.MULTILINE)


class Training:
    """A run in a process of its own, on a data set of `build_shards`. `folder` is its run.dir."""

    def __init__(self, folder: Path, *words: str) -> None:
        self._log = (folder / f"{len(list(folder.glob('*.log')))}.log").open("w+")
        self._process = subprocess.Popen(
            tied([sys.executable, "-m", "distrain", f"run.dir={folder}", *words]),
            stdout=self._log,
            stderr=subprocess.STDOUT,
        )

    def wait(self, expected: int) -> str:
        """Wait for its end. Returns the digest of the final weights; empty if it was stopped.

        Raises RuntimeError unless it exits with the expected code.
        """
        code = self._process.wait()
        self._log.seek(0)
        output = self._log.read()
        self._log.close()
        print(output)
        if code != expected:
            last = " ".join(output.strip().splitlines()[-2:])
            raise RuntimeError(f"training exited with code {code}, not {expected}: {last}")
        found = _DIGEST.search(output)
        return found[1] if found else ""


def measure_resume(setup: Setup) -> None:
    """Train on real JPEG files, stop by SIGTERM in the middle, resume, and compare with a run without a stop."""
    setup.allow_deterministic()
    scale = setup.scale
    words = [*build_shards(setup.folder, scale), f"model.name={scale.small.network}", *_settings(setup)]
    folders = [setup.folder / name for name in ("uninterrupted", "stopped")]
    for folder in folders:
        folder.mkdir()
    middle = scale.train_steps // 2
    fault = f"resilience.faults=[sigterm@train.step:{middle}]"
    uninterrupted, stopped = Training(folders[0], *words), Training(folders[1], *words, fault)
    stopped.wait(EXIT_STOPPED)
    digest = Training(folders[1], *words).wait(EXIT_DONE)
    expected = uninterrupted.wait(EXIT_DONE)
    equal = digest == expected
    setup.record.add(
        "resume",
        {"steps": scale.train_steps, "stopped_at": middle, "digests": [expected, digest], "equal": equal},
        f"{scale.train_steps} steps, stopped by SIGTERM at step {middle}: digests {'equal' if equal else 'differ'}",
    )
    if not equal:
        setup.record.fail(f"the resumed run ends with weights {digest}, the uninterrupted one with {expected}")


def _settings(setup: Setup) -> list[str]:
    """Settings of a short training of `train_steps` steps on the shards."""
    scale = setup.scale
    per_lane = max(2, scale.small.batch // 2)
    epochs = scale.train_steps * 2 * per_lane / len(load_index(str(setup.folder / "shards" / "train.parquet")))
    return [
        "batch.lanes=2", f"batch.per_lane={per_lane}", f"train.epochs={epochs}", "schedule.warmup_epochs=0",
        "train.deterministic=true", *FIXED_CHOICES, f"evaluate.batch={scale.small.batch}",
        "evaluate.every_epochs=1000", f"data.threads={min(8, os.cpu_count() or 1)}", "optimizer.lr=0.01",
        *setup.overrides,
    ]  # fmt: skip


def measure_digests(setup: Setup) -> None:
    """Train twice with train.deterministic, which must give the same weights, and twice without."""
    setup.allow_deterministic()
    with Group() as group:
        if not setup.has_gpu:
            setup.record.skip("whether runs differ without train.deterministic", f"{NEEDS_GPU}: CPUs always repeat")
        for point in (setup.scale.small, setup.scale.large):
            for mode in ("true", "false"):
                name = f"{point}, train.deterministic={mode}"
                with setup.record.attempt(name):
                    settings = setup.settings(point, *FIXED_CHOICES, f"train.deterministic={mode}")
                    digests = []
                    for _ in range(2):
                        learner = Learner(settings, group, build_network(settings, group.device), None, print)
                        step = distrain_candidate(learner, group.device)
                        for _ in range(max(1, setup.scale.train_steps // 3)):
                            step()
                        digests.append(weights_digest(learner.state()))
                        del learner, step
                        free(group.device)
                    equal = digests[0] == digests[1]
                    found = {"digests": digests, "equal": equal}
                    setup.record.add(name, found, f"{name}: digests {'equal' if equal else 'differ'}")
                    if mode == "true" and not equal:
                        setup.record.fail(f"{name}: two trainings end with different weights")
