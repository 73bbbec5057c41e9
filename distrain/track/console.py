"""Progress on the console: a bar on a terminal, plain lines in a log."""

from collections.abc import Mapping

import rich.console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from distrain.masking import mask_secrets

_FORMATS = {
    "train/loss": "loss {:.4f}",
    "train/top1": "top-1 {:.1%}",
    "train/lr": "lr {:.4g}",
    "train/images_per_second": "{:,.0f} images/s",
    "val/loss": "val loss {:.4f}",
    "val/top1": "val top-1 {:.2%}",
    "val/top5": "val top-5 {:.2%}",
    "val/mAP": "val mAP {:.2%}",
}


class Console:
    """Writes to standard output."""

    def __init__(self, steps: int) -> None:
        self._steps = steps
        self._out = rich.console.Console(highlight=False, soft_wrap=True, emoji=False)
        self._bar: Progress | None = None
        if self._out.is_terminal:
            columns = (
                BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
                TextColumn("{task.description}"),
            )  # fmt: skip
            self._bar = Progress(*columns, console=self._out)
            self._task = self._bar.add_task("", total=steps)
            self._bar.start()

    def info(self, line: str) -> None:
        """Print a line, without the secrets in it."""
        self._out.print(mask_secrets(line), markup=False)

    def report(self, step: int, metrics: Mapping[str, float]) -> None:
        text = "  ".join(_FORMATS[name].format(value) for name, value in metrics.items() if name in _FORMATS)
        if not text:
            return
        if self._bar is not None and "val/loss" not in metrics:
            self._bar.update(self._task, description=text)
        else:
            self.info(f"step {step}/{self._steps}  {text}")

    def advance(self, step: int) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=step)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
