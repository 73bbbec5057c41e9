"""Rolling back: after a divergence a run continues from its last checkpoint without the steps that led there."""

from collections.abc import Callable

from distrain.checkpoint import newest_step
from distrain.config import Config
from distrain.decisions import RunDecisions
from distrain.errors import Diverged, UserError
from distrain.parallel.group import Group

_SKIPPED = "skipped_steps"  # among the decisions of a run: skipped ranges of steps, [first, end)


def record_rollback(config: Config, group: Group, diverged: Diverged, info: Callable[[str], None]) -> None:
    """Record that the steps from the last checkpoint up to the divergence are to be skipped. All ranks call this.

    Raises UserError if the run has rolled back resilience.rollbacks times already.
    """
    decisions = RunDecisions(config.run.folder)
    skipped = _skipped_ranges(config, group)
    if len(skipped) >= config.resilience.rollbacks:
        raise UserError(
            f"training diverged {len(skipped) + 1} times, more than resilience.rollbacks="
            f"{config.resilience.rollbacks} allows: {diverged}; try a lower optimizer.lr or optimizer.clip_norm=1"
        )
    if group.is_main:
        start = newest_step(config.run.folder / "checkpoints")
        decisions.set(_SKIPPED, [*skipped, [start, diverged.step + 1]])
        info(f"{diverged}: rolling back to step {start} and continuing from there at step {diverged.step + 1}")
    group.barrier()


def load_skipped_steps(config: Config, group: Group) -> set[int]:
    """The steps that earlier rollbacks excluded. All ranks call this."""
    return {step for first, end in _skipped_ranges(config, group) for step in range(first, end)}


def _skipped_ranges(config: Config, group: Group) -> list[list[int]]:
    decisions = RunDecisions(config.run.folder)
    ranges: list[list[int]] = group.on_main(lambda: decisions.get(_SKIPPED, list))
    return ranges
