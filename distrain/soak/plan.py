"""What happens to a run in a soak: a pure function of the seed."""

import random
from collections.abc import Sequence
from typing import NamedTuple

from distrain.resilience.faults import ANY_TIME, Fault

# Faults that must not change a run's numbers, with their weights: those that end an attempt take longer.
_RANDOM: dict[str, dict[str, int]] = {
    ANY_TIME: {
        "eio": 5, "estale": 5, "enospc": 4, "delay": 3, "clock": 3, "sigkill": 3, "exit": 1, "sigterm": 1, "sigstop": 1,
    },
    "train.step": {"sigkill": 1, "sigstop": 1, "exception": 1, "oom": 1, "exit": 1, "sigterm": 1, "hang": 1, "eio": 2},
    "data.request": {"hang": 1, "exception": 1},
    "evaluate.batch": {
        "sigkill": 1, "sigstop": 1, "exception": 1, "hang": 1, "exit": 1, "sigterm": 1, "estale": 2, "delay": 1,
    },
    "checkpoint.restore": {"eio": 2, "estale": 2, "sigkill": 1, "delay": 1},
    "checkpoint.stage": {"sigkill": 1, "exception": 1, "exit": 1, "enospc": 2, "delay": 1},
    "checkpoint.write": {
        "sigkill": 1, "exit": 1, "ioerror": 1, "diskfull": 2, "sigterm": 1, "eio": 2, "estale": 2, "enospc": 2,
    },
    "checkpoint.manifest": {"sigkill": 1, "exit": 1, "ioerror": 1, "eio": 2, "enospc": 2, "delay": 1},
    "checkpoint.rename": {"sigkill": 1, "exit": 1, "eio": 1, "estale": 1, "delay": 1},
    "checkpoint.commit": {"sigkill": 1, "flip": 1, "truncate": 1, "eio": 2, "estale": 2},
}  # fmt: skip
_AT_THE_END = ("train.step", "evaluate.batch")  # reached even if the last checkpoint has been saved
_END = 0.95  # of the run
_MAIN_RANK_ONLY = ("checkpoint.manifest", "checkpoint.rename")


# What is done beside the run, with the share of all faults that it has.
_BESIDE = {"second-start": 0.03, "other-settings": 0.03, "two-attempts": 0.03, "power-cut": 0.04}
_BESIDE_FROM, _BESIDE_TO = 0.05, 0.8  # of the run, which must still be training when it is done


class Action(NamedTuple):
    """Done beside the run, `seconds` after it has reached `step`."""

    kind: str
    step: int
    seconds: float

    def __str__(self) -> str:
        return f"{self.kind}@{ANY_TIME}:{self.step}+{self.seconds:g}"


def draw_plan(
    seed: int, count: int, steps: int, ranks: int, power_cuts: bool = True
) -> tuple[list[Fault], list[Action]]:
    """`count` random faults and actions, spread over the run, each in order of their steps."""
    draw = random.Random(seed)
    kinds = [kind for kind in _BESIDE if power_cuts or kind != "power-cut"]
    due = {kind: draw.random() for kind in kinds}
    faults: list[Fault] = []
    actions: list[Action] = []
    for number in range(count):
        first, last = number * steps // count, (number + 1) * steps // count - 1
        step, seconds = draw.randint(first, last), round(draw.uniform(0, 1), 2)
        if _BESIDE_FROM * steps <= step < _BESIDE_TO * steps:
            for kind in kinds:
                due[kind] += _BESIDE[kind] / (_BESIDE_TO - _BESIDE_FROM)
            kind = max(kinds, key=due.__getitem__)
            if due[kind] >= 1:
                due[kind] -= 1
                actions.append(Action(kind, step, seconds))
                continue
        if step < _END * steps:
            faults.append(_draw_fault(draw, tuple(_RANDOM), step, seconds, ranks))
        elif faults and faults[-1].step < _END * steps:
            faults.append(Fault("sigkill", "train.step", step, 0))  # for faults that wait for a restart
        else:
            faults.append(_draw_fault(draw, _AT_THE_END, step, seconds, ranks))
    return faults, actions


def _draw_fault(draw: random.Random, failpoints: Sequence[str], step: int, seconds: float, ranks: int) -> Fault:
    (failpoint,) = draw.choices(failpoints, [6 if name == ANY_TIME else 1 for name in failpoints])
    (kind,) = draw.choices(list(_RANDOM[failpoint]), list(_RANDOM[failpoint].values()))
    rank = 0 if failpoint in _MAIN_RANK_ONLY or kind in ("flip", "truncate") else draw.randrange(ranks)
    return Fault(kind, failpoint, step, rank, seconds if failpoint == ANY_TIME else 0.0)
