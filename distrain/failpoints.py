"""Named points in the code at which tests inject faults. No-ops unless armed.

    failpoint("checkpoint.rename", step)

`distrain.resilience.faults` arms them from `resilience.faults`; nothing else does.
"""

from collections.abc import Callable

FAILPOINTS = {
    "train.step": "when a step begins",
    "data.request": "when the images of a step are requested",
    "evaluate.batch": "before a batch of validation",
    "checkpoint.restore": "before a checkpoint is read to resume from it",
    "checkpoint.stage": "when the state is copied to host memory for a checkpoint",
    "checkpoint.write": "before the files of a checkpoint are written",
    "checkpoint.manifest": "before the manifest of a checkpoint is written",
    "checkpoint.rename": "before a checkpoint is renamed to its final name",
    "checkpoint.commit": "after a checkpoint is committed",
    "checkpoint.end": "when the write of a checkpoint has ended, successful or not",
}

Hook = Callable[[str, int], None]

_armed: list[Hook] = []


def failpoint(name: str, step: int) -> None:
    """Call the armed hook, if any."""
    for hook in _armed:
        hook(name, step)


def arm(hook: Hook) -> None:
    """Call `hook(name, step)` at every failpoint."""
    assert not _armed, "failpoints are already armed"
    _armed.append(hook)


def disarm() -> None:
    """Make every failpoint a no-op again."""
    _armed.clear()
