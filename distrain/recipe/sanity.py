"""Warnings of what shows that a run is broken, though nothing has failed."""

import math
from collections.abc import Callable, Mapping

from distrain.evaluate import Quality

_LEARNED = 0.98  # of the loss of guessing: less has been learned from
_MIN_STEPS = 100  # before which nothing is concluded from the loss


class SanityCheck:
    """Warns of each kind once. `first`: the step after which the loss should have fallen below `guessing_loss`, that
    of equal probabilities for all classes; None if that is not known."""

    def __init__(self, classes: int, first: int, guessing_loss: float | None, warn: Callable[[str], None]) -> None:
        self._classes = classes
        self._first = max(first, _MIN_STEPS)
        self._guessing_loss = guessing_loss
        self._warn = warn
        self._warned: set[str] = set()
        self._train_top1 = 0.0

    def check_report(self, step: int, metrics: Mapping[str, float]) -> None:
        """Look at what is reported of the steps up to `step`."""
        self._train_top1 = metrics["train/top1"]
        guessing = self._guessing_loss
        if guessing is not None and step >= self._first and metrics["train/loss"] > _LEARNED * guessing:
            self._warn_once(
                f"the loss is still that of guessing, {guessing:.3f}, after {step} steps: is optimizer.lr right (see "
                "find-lr), and do labels belong to images (see shards show)? train.overfit_batches=2 tells whether the "
                "network can learn"
            )
        if metrics["train/grad_norm"] == 0:
            self._warn_once("the gradient is zero: no weight will change; a step that was too large may have ended it")

    def check_validation(self, quality: Quality) -> None:
        """Compare a validation with the training accuracy that was reported last."""
        accuracy, chance = quality.metrics().get("val/top1"), 1 / self._classes
        if accuracy is not None and accuracy < 1.5 * chance and self._train_top1 > max(3 * chance, 0.3):
            self._warn_once(
                f"validation is at chance, {accuracy:.1%}, and training is not, {self._train_top1:.1%}: do the labels "
                "of data.val belong to its images?"
            )

    def _warn_once(self, line: str) -> None:
        kind = line[:12]
        if kind not in self._warned:
            self._warned.add(kind)
            self._warn(f"warning: {line}")


def guessing_loss(name: str, classes: int) -> float | None:
    """The loss `name` of equal probabilities for all classes, with any label smoothing."""
    return math.log(classes) if name == "cross_entropy" else None
