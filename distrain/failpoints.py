"""Named points in the code at which tests inject faults. No-ops unless armed.

    failpoint("checkpoint.rename", step)

`distrain.resilience.faults` arms them from `resilience.faults`; nothing else does.
"""

from collections.abc import Callable

FAILPOINTS = {
    "train.step": "when a step begins",
    "data.request": "when the images of a step are requested",
    "evaluate.batch": "before a batch of validation",
    "checkpoint.stage": "when the state is copied for a checkpoint",
    "checkpoint.write": "when it is written",
    "checkpoint.manifest": "before its manifest is written",
    "checkpoint.rename": "before it is renamed to its final name",
    "checkpoint.commit": "after that",
    "checkpoint.end": "when the write has ended, successful or not",
}

Hook = Callable[[str, int], None]

_armed: list[Hook] = []


def failpoint(name: str, step: int) -> None:
    """Let armed hooks act at `name` in `step`."""
    for hook in _armed:
        hook(name, step)


def arm(hook: Hook) -> None:
    """Call `hook(name, step)` at every failpoint."""
    assert not _armed, "failpoints are armed already"
    _armed.append(hook)


def disarm() -> None:
    """Make every failpoint a no-op again."""
    _armed.clear()
