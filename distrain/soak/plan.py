"""What happens to a run in a soak: a pure function of the seed."""

import random

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
    "checkpoint.stage": {"sigkill": 1, "exception": 1, "exit": 1, "enospc": 2, "delay": 1},
    "checkpoint.write": {
        "sigkill": 1, "exit": 1, "ioerror": 1, "diskfull": 2, "sigterm": 1, "eio": 2, "estale": 2, "enospc": 2,
    },
    "checkpoint.manifest": {"sigkill": 1, "exit": 1, "ioerror": 1, "eio": 2, "enospc": 2, "delay": 1},
    "checkpoint.rename": {"sigkill": 1, "exit": 1, "eio": 1, "estale": 1, "delay": 1},
    "checkpoint.commit": {"sigkill": 1, "flip": 1, "truncate": 1, "eio": 2, "estale": 2},
}  # fmt: skip
_MAIN_RANK_ONLY = ("checkpoint.manifest", "checkpoint.rename")


def draw_faults(seed: int, count: int, steps: int, ranks: int) -> list[Fault]:
    """`count` random faults, spread over the run, in order of their steps."""
    draw = random.Random(seed)
    faults: list[Fault] = []
    for number in range(count):
        first, last = number * steps // count, (number + 1) * steps // count - 1
        (failpoint,) = draw.choices(list(_RANDOM), [3 if name == ANY_TIME else 1 for name in _RANDOM])
        (kind,) = draw.choices(list(_RANDOM[failpoint]), list(_RANDOM[failpoint].values()))
        rank = 0 if failpoint in _MAIN_RANK_ONLY or kind in ("flip", "truncate") else draw.randrange(ranks)
        seconds = round(draw.uniform(0, 1), 2) if failpoint == ANY_TIME else 0.0
        faults.append(Fault(kind, failpoint, draw.randint(first, last), rank, seconds))
    return faults
