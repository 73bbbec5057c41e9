"""Successive halving (Jamieson and Talwalkar, AISTATS 2016): all members train for a while, the best ones longer.

Each trains by the schedule of the whole run and continues exactly from where it stopped, so that nothing is trained
twice, and the winner is the run that it would be alone.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Halving:
    """The rounds of a sweep: when members are compared, and how many continue."""

    epochs: tuple[float, ...] = ()
    """The end of each round but the last, which ends with the run."""
    fraction: float = 1.0
    """How many of a round's members are in the next one; at least one is."""

    @property
    def rounds(self) -> int:
        return len(self.epochs) + 1

    def stop_epoch(self, number: int) -> float:
        """The end of round `number`, from 0, as train.stop_epoch has it."""
        return self.epochs[number] if number < len(self.epochs) else 0


def wanted_rounds(reached: Mapping[str, Sequence[float | None]], halving: Halving) -> dict[str, int]:
    """How many rounds each member is to finish, as far as that is decided.

    `reached` are the errors of each member at the end of its rounds so far, None for the one in which it failed. Once
    all members of a round have finished it, those of the smallest errors are in the next one.
    """
    wanted: dict[str, int] = {}
    names = list(reached)
    for number in range(halving.rounds):
        wanted |= dict.fromkeys(names, number + 1)
        if any(len(reached[name]) <= number for name in names):
            break
        ranked = sorted((error, name) for name in names if (error := reached[name][number]) is not None)
        names = [name for _, name in ranked[: max(1, math.floor(len(names) * halving.fraction))]]
    return wanted
