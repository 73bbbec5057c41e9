"""What happens to a run in a soak: a pure function of the seed."""

import random

from distrain.resilience.faults import Fault

# Faults that must not change a run's numbers. Each is followed by a restart; damage to a checkpoint by a kill first.
_RANDOM = {
    "train.step": ("sigkill", "sigstop", "exception", "oom", "exit", "sigterm", "hang"),
    "data.request": ("hang", "exception"),
    "evaluate.batch": ("sigkill", "sigstop", "exception", "hang", "exit", "sigterm"),
    "checkpoint.stage": ("sigkill", "exception", "exit"),
    "checkpoint.write": ("sigkill", "exit", "ioerror", "diskfull", "sigterm"),
    "checkpoint.manifest": ("sigkill", "exit", "ioerror"),
    "checkpoint.rename": ("sigkill", "exit"),
    "checkpoint.commit": ("sigkill", "flip", "truncate"),
}
_MAIN_RANK_ONLY = ("checkpoint.manifest", "checkpoint.rename")


def draw_faults(seed: int, count: int, steps: int, ranks: int) -> list[Fault]:
    """`count` random faults, spread over the run, in order of their steps."""
    draw = random.Random(seed)
    faults: list[Fault] = []
    for number in range(count):
        first, last = number * steps // count, (number + 1) * steps // count - 1
        failpoint = draw.choice(list(_RANDOM))
        kind = draw.choice(_RANDOM[failpoint])
        rank = 0 if failpoint in _MAIN_RANK_ONLY or kind in ("flip", "truncate") else draw.randrange(ranks)
        faults.append(Fault(kind, failpoint, draw.randint(first, last), rank))
    return faults
