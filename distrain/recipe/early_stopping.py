"""Early stopping: a run ends once validations have not improved for a while."""

import math
from functools import partial
from pathlib import Path

from distrain.config import EvaluateConfig
from distrain.evaluate import Quality
from distrain.files import read_json, translated_errors, write_json
from distrain.parallel.group import Group

_FILE = "early_stopping.json"


class EarlyStopping:
    """Compares validations. Every rank has one and makes the same calls.

    Which validations were a new best is kept in the run's `folder`, so that a resumed run decides as an uninterrupted
    one. `validated`: the numbers of updates after which the network is validated in every such run.
    """

    def __init__(self, config: EvaluateConfig, folder: Path, validated: set[int], group: Group) -> None:
        self._config = config
        self._path = folder / _FILE
        self._validated = validated
        self._group = group

    def observe(self, step: int, quality: Quality) -> bool:
        """Record a validation after `step` updates. Returns whether the run ends here, the same on every rank.

        Raises UserError if the record is damaged.
        """
        return self._config.patience > 0 and self._group.on_main(partial(self._observe, step, quality))

    def _observe(self, step: int, quality: Quality) -> bool:
        with translated_errors(self._path.parent):
            bests = read_json(self._path, "delete it, and early stopping starts over", {"bests": list}).get("bests", [])
            # Those after this step are of a time before a restart, and will recur. Others were at train.stop_epoch,
            # as in no uninterrupted run, or a rollback has undone them.
            bests = [[at, value] for at, value in bests if at < step and at in self._validated]
            last, best = bests[-1] if bests else (0, -math.inf)
            if (value := self._value(quality)) > best:  # NaN is not
                last = step
                bests.append([step, value])
            write_json(self._path, {"bests": bests})
        return sum(last < at <= step for at in self._validated) >= self._config.patience

    def _value(self, quality: Quality) -> float:
        """What is watched, larger if it is better."""
        if self._config.metric == "score":
            return quality.score
        value = quality.metrics()[f"val/{self._config.metric}"]
        return -value if self._config.metric == "loss" else value
