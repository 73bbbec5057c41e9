"""Successive halving (Jamieson and Talwalkar, AISTATS 2016): all members train for a while, the best ones longer.

Each trains by the schedule of the whole run and continues exactly from where it stopped, so that nothing is trained
twice, and the winner is the run that it would be alone.
"""

import math
from collections.abc import Mapping, Sequence


def goals(reached: Mapping[str, Sequence[float | None]], rungs: int, fraction: float) -> dict[str, int]:
    """To how many rungs each member is to come, as far as that is decided.

    `reached` are the errors of each member at the rungs it has come to, None at the one at which it failed. Once all
    have come to a rung, `fraction` of them, those of the smallest errors, go on to the next one; at least one does.
    """
    found: dict[str, int] = {}
    field = list(reached)
    for rung in range(rungs):
        found |= dict.fromkeys(field, rung + 1)
        if any(len(reached[name]) <= rung for name in field):
            break
        ranked = sorted((error, name) for name in field if (error := reached[name][rung]) is not None)
        field = [name for _, name in ranked[: max(1, math.floor(len(field) * fraction))]]
    return found
