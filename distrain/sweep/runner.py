"""Train the members of a sweep, several at a time, each on its share of the machine."""

import json
import os
import random
import signal
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType

from distrain.errors import EXIT_DONE, EXIT_STOPPED, EXIT_USER
from distrain.files import read_regular
from distrain.parallel.environment import RANK_VARIABLES
from distrain.resilience.claim import LAUNCH_VARIABLE, Claim, newest_attempt
from distrain.sweep import member_process
from distrain.sweep.population import Member
from distrain.sweep.sweep import Sweep
from distrain.track.spool import read_entries

_MAX_CRASHES = 5  # of a member in this process
_LOOK_S = 3.0  # between looks at members that other processes train
_CHOICES = 8  # members that a process chooses from, so that several do not always want the same one
_TAIL_BYTES = 4096


@dataclass(frozen=True)
class Slot:
    """A share of the machine that trains one member at a time."""

    cores: tuple[int, ...]
    gpu: str | None = None
    """For CUDA_VISIBLE_DEVICES."""


@dataclass
class _Training:
    member: Member
    slot: Slot
    claim: Claim
    process: BaseProcess


class Runner:
    """Trains members until all are finished, by this process or by others."""

    def __init__(
        self,
        sweep: Sweep,
        members: Sequence[Member] | None,
        arguments: Sequence[str],
        batch: Mapping[str, int],
        slots: Sequence[Slot],
        report: Callable[[str], None],
        propose: Callable[[], int] = lambda: 0,
    ) -> None:
        """`members` are trained; None: all, also those that the sweep is extended by. `arguments` are those of a run
        that all share, and `batch` its batch.lanes and batch.per_lane. `propose`, called before members are claimed,
        may extend the sweep, and returns how many members it will still be extended by.
        """
        self._sweep = sweep
        self._names = None if members is None else {member.name for member in members}
        self._arguments = list(arguments)
        self._batch = dict(batch)
        self._propose = propose
        self._coming = 0
        self._free = list(slots)
        self._report = report
        self._running: list[_Training] = []
        self._crashes: Counter[str] = Counter()
        self._stop = False
        self._began = time.monotonic()
        self._recorded = 0
        for name in (LAUNCH_VARIABLE, *RANK_VARIABLES):  # a launcher's nodes work on different members
            os.environ.pop(name, None)

    def run(self) -> int:
        """Returns 0 once all are finished and none failed, 78 if some failed, 75 after SIGTERM or SIGINT."""
        with self._signals():
            while True:
                is_waiting = not self._stop and self._start()
                if not self._running and not is_waiting:
                    break
                sentinels = [training.process.sentinel for training in self._running]
                wait(sentinels, timeout=_LOOK_S) if sentinels else time.sleep(_LOOK_S)
                for training in [one for one in self._running if one.process.exitcode is not None]:
                    self._end(training)
        if self._stop:
            return EXIT_STOPPED
        failed = sum(result.has_failed for name, result in self._sweep.results().items() if self._is_chosen(name))
        if failed:
            self._report(f"{failed} failed: see python -m distrain sweep status {self._sweep.folder}")
        return EXIT_USER if failed else EXIT_DONE

    def _is_chosen(self, name: str) -> bool:
        return self._names is None or name in self._names

    def _due(self) -> list[tuple[Member, int]]:
        return [(member, number) for member, number in self._sweep.due() if self._is_chosen(member.name)]

    def _start(self) -> bool:
        """Start members in the free slots. Returns whether any is to train further, here or elsewhere."""
        self._coming = self._propose()
        left = self._due()
        if not self._free:
            return True
        own = {training.member.name for training in self._running}
        others = [one for one in left if one[0].name not in own]
        claimed = [one for one in others if self._sweep.is_claimed(one[0])]
        fresh = [one for one in others if one not in claimed]
        while self._free and fresh:
            self._claim(*fresh.pop(random.randrange(min(_CHOICES, len(fresh)))))
        if self._free and claimed:  # one at a time, as it takes seconds to find out whether its process lives
            self._claim(*random.choice(claimed))
        return bool(left)

    def _claim(self, member: Member, number: int) -> None:
        if (claim := self._sweep.claim(member, number)) is None:
            return
        slot = self._free.pop()
        variables = {"OMP_NUM_THREADS": str(len(slot.cores))}
        if slot.gpu is not None:
            variables["CUDA_VISIBLE_DEVICES"] = slot.gpu
        stop = self._sweep.halving.stop_epoch(number)
        own = [f"run.name={member.name}", f"run.dir={self._sweep.folder / 'runs'}", f"train.stop_epoch={stop:g}"]
        track = [f"track.parent={self._sweep.name}", f"track.params={json.dumps(member.parameters)}"]
        arguments = [*self._arguments, *member.arguments, *own, *track]
        log = self._sweep.claim_folder(member) / "log.txt"
        process = member_process.start(arguments, log, slot.cores, variables)
        self._running.append(_Training(member, slot, claim, process))

    def _end(self, training: _Training) -> None:
        self._running.remove(training)
        self._free.append(training.slot)
        member, code = training.member, training.process.exitcode
        run = self._sweep.run_folder(member)
        reason = last_line(self._sweep.claim_folder(member) / "log.txt")
        self._crashes[member.name] += code not in (EXIT_DONE, EXIT_STOPPED, EXIT_USER)
        if code == EXIT_DONE or (code == EXIT_STOPPED and has_ended_round(run)):
            sizes = {**self._batch, **member.settings}
            self._record(member, *read_outcome(run, sizes["batch.lanes"] * sizes["batch.per_lane"]))
        elif code == EXIT_USER:
            self._record(member, None, reason=reason)
        elif self._crashes[member.name] >= _MAX_CRASHES:
            text = f"crashed {_MAX_CRASHES} times, the last time with exit code {code}: {reason}"
            self._record(member, None, reason=text)
        training.claim.end(f"exit code {code}", False)

    def _record(self, member: Member, error: float | None, seconds: float | None = None, reason: str = "") -> None:
        if error is None and not reason:
            reason = "the run has no accuracy in its metrics"
        self._sweep.record(member, error, seconds, reason)
        self._recorded += 1
        left = len(self._due()) + self._coming
        minutes = (time.monotonic() - self._began) / self._recorded * left / 60
        outcome = f"failed: {reason}" if error is None else f"error {error:.2%}"
        self._report(f"{member.name}: {outcome}  {left} left, about {minutes:.0f} min")

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """At SIGTERM and SIGINT have every member save and stop."""

        def handle(number: int, frame: FrameType | None) -> None:
            self._stop = True
            for training in self._running:
                if training.process.pid is not None and training.process.is_alive():
                    os.kill(training.process.pid, signal.SIGTERM)

        before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def share_machine(workers: int | None, gpus: int) -> list[Slot]:
    """A slot for each GPU, or of equally many cores for each of `workers`; None: one for each GPU or core."""
    cores = sorted(os.sched_getaffinity(0))
    count = workers or gpus or len(cores)
    share = max(1, len(cores) // count)
    groups = [tuple(cores[(number * share) % len(cores) :][:share]) for number in range(count)]
    return [Slot(group, str(number % gpus) if gpus else None) for number, group in enumerate(groups)]


def has_ended_round(run: Path) -> bool:
    """Whether a run that stopped did so where train.stop_epoch says."""
    attempt = newest_attempt(run)
    return attempt is not None and (attempt.end or "").startswith("stopped by train.stop_epoch")


def read_outcome(run: Path, batch: int) -> tuple[float | None, float | None]:
    """The error of a run's last validation (multi-label: 1 - mAP), and its seconds per step of `batch` images."""
    error, rates = None, []
    for entry in read_entries(run / "metrics.jsonl"):
        quality = entry.metrics.get("val/top1", entry.metrics.get("val/mAP"))
        error = error if quality is None else 1 - quality
        rates.append(entry.metrics.get("train/images_per_second", 0.0))
    rates = [rate for rate in rates if rate]
    return error, batch / statistics.median(rates) if rates else None


def last_line(log: Path) -> str:
    """The last line that a run printed."""
    lines = read_regular(log)[-_TAIL_BYTES:].decode(errors="replace").split("\n") if log.exists() else []
    return next((line.removeprefix("distrain: ").strip() for line in reversed(lines) if line.strip()), "no output")
