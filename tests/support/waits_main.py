"""Trains as the command line asks and prints, as JSON, where the host would wait for the device in four steps.

    python waits_main.py SETTING ...

The third of the four saves a checkpoint. Each wait is printed as [module, function] of the innermost caller in
distrain or DeepSpeed, with how often it occurred. A CPU computes at once, so what counts is the call that would wait on
a GPU.
"""

import json
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from types import FrameType
from typing import Any
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from distrain import config
from distrain.run import Run
from distrain.train import train

FIRST, LAST = 3, 7
PACKAGES = ("distrain", "deepspeed")
_ops = torch.ops.aten
# Their result on the host, or its shape, depends on what the device has computed. The first one is what item(), bool(),
# float() and int() call.
WAITING_OPERATIONS = {
    _ops._local_scalar_dense.default, _ops.nonzero.default, _ops.masked_select.default, _ops.equal.default,
    _ops._unique2.default, _ops.is_nonzero.default, _ops.bincount.default,
}  # fmt: skip
WAITING_METHODS = ("cpu", "numpy", "tolist")


class Counting(TorchDispatchMode):
    """Counts the waits of the main thread in its context."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[tuple[str, str]] = Counter()
        self._patches = ExitStack()

    def __enter__(self) -> "Counting":
        for name in WAITING_METHODS:
            self._patches.enter_context(patch.object(torch.Tensor, name, self._counted(getattr(torch.Tensor, name))))
        self._patches.enter_context(patch.object(torch.Tensor, "to", self._counted(torch.Tensor.to, is_blocking_move)))
        for name in ("tensor", "as_tensor"):
            self._patches.enter_context(patch.object(torch, name, self._counted(getattr(torch, name), names_device)))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._patches.close()

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if operation in WAITING_OPERATIONS:
            self._count()
        return operation(*args, **(kwargs or {}))

    def _counted(self, function: Callable[..., Any], waits: Callable[..., bool] = lambda *a, **k: True) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            if waits(*args, **kwargs) and threading.current_thread() is threading.main_thread():
                self._count()
            return function(*args, **kwargs)

        return call

    def _count(self) -> None:
        frame: FrameType | None = sys._getframe(2)
        while frame is not None:
            package, _, rest = frame.f_globals.get("__name__", "").partition(".")
            if package in PACKAGES:
                self.waits[f"{package}.{rest}", frame.f_code.co_name] += 1
                return
            frame = frame.f_back
        self.waits["elsewhere", ""] += 1


def is_blocking_move(*args: Any, non_blocking: bool = False, **kwargs: Any) -> bool:
    """Whether distrain asks `Tensor.to` to move to a device and to wait for it. Torch's optimizers do so with what is
    there already."""
    places = [*args[1:], *kwargs.values()]
    is_ours = sys._getframe(2).f_globals.get("__name__", "").startswith("distrain.")
    return is_ours and not non_blocking and any(isinstance(place, (str, torch.device)) for place in places)


def names_device(*args: Any, device: Any = None, **kwargs: Any) -> bool:
    """Whether a tensor made of numbers is copied to a device."""
    return device is not None and torch.device(device).type != "meta"


def main() -> None:
    counting = Counting()
    steps = Run.steps

    def counted_steps(run: Run) -> Iterator[int]:
        for step in steps(run):
            if step == FIRST:
                counting.__enter__()
            if step == LAST:
                counting.__exit__(None, None, None)
            yield step

    with patch.object(Run, "steps", counted_steps):
        code = train(config.load(None, sys.argv[1:]))
    assert code == 0
    print(json.dumps([[*place, times] for place, times in sorted(counting.waits.items())]))


if __name__ == "__main__":
    main()
