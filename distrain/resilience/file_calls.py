"""Calls to the file system that fail or take long, for injected faults.

While installed, it stands between this process and the files below one folder: the functions of `os`, and files that
are opened, whose reads and writes go through those functions. The calls of libraries in C are not affected.
"""

import _pyio  # type: ignore[import-not-found]  # unknown to typeshed
import builtins
import io
import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

_CALLS = {
    "open": ("open",),
    "read": ("read",),
    "write": ("write", "pwrite", "ftruncate", "truncate"),
    "sync": ("fsync",),
    "rename": ("rename", "replace"),
    "look": ("stat", "lstat", "listdir", "scandir"),
    "remove": ("unlink", "remove", "rmdir"),
    "make": ("mkdir",),
}
_EVERY = tuple(call for calls in _CALLS.values() for call in calls)
NEED_SPACE = ("write", "mkdir")  # calls that fail on a full disk; pwrite in place does not
_EXEMPT = "faults."  # names of the files of injected faults themselves begin so
_DELAY_S = 0.2


class Disturbance(NamedTuple):
    """For `seconds` the named calls fail with an error number, or are delayed if that is 0."""

    calls: tuple[str, ...]
    error: int
    seconds: float


def draw_disturbance(key: str, error: int, calls: tuple[str, ...] = ()) -> Disturbance:
    """A disturbance of half a second to two: of `calls`, or else of all calls or all of a kind. A function of `key`."""
    draw = random.Random(key)
    seconds = draw.uniform(0.5, 2.0)
    return Disturbance(calls or draw.choice([_EVERY, *_CALLS.values()]), error, seconds)


class FileCalls:
    """A context manager that stands between this process and the files below `folder`."""

    def __init__(self, folder: Path) -> None:
        self._folders = tuple(f"{path}{os.sep}" for path in {folder.absolute(), folder.resolve()})
        self._originals: dict[str, Callable[..., Any]] = {}
        self._open = io.open
        self._disturbances: list[tuple[float, Disturbance]] = []

    def __enter__(self) -> Self:
        self._originals = {name: getattr(os, name) for name in _EVERY}
        for name, original in self._originals.items():
            setattr(os, name, self._wrap(name, original))
        io.open = builtins.open = self._open_file
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for name, original in self._originals.items():
            setattr(os, name, original)
        io.open = builtins.open = self._open

    def disturb(self, disturbance: Disturbance) -> None:
        """Begin a disturbance; it ends by itself."""
        self._disturbances.append((time.monotonic() + disturbance.seconds, disturbance))

    def _wrap(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            if self._disturbances:
                self._disturb_call(name, args, options)
            return original(*args, **options)

        return call

    def _open_file(self, file: Any, *args: Any, **options: Any) -> Any:
        """Open a file below the folder so that it reads and writes with the functions of `os`."""
        if isinstance(file, int) or not self._is_inside(file):
            return self._open(file, *args, **options)
        return _pyio.open(file, *args, **options)

    def _disturb_call(self, name: str, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        now = time.monotonic()
        self._disturbances = [(until, disturbance) for until, disturbance in self._disturbances if until > now]
        for _, disturbance in self._disturbances:
            if name in disturbance.calls and self._concerns(name, args, options):
                if disturbance.error:
                    raise OSError(disturbance.error, f"{os.strerror(disturbance.error)} (injected)", str(args[0]))
                time.sleep(_DELAY_S)

    def _concerns(self, name: str, args: tuple[Any, ...], options: dict[str, Any]) -> bool:
        """Whether a call names a file below the folder, by path or by descriptor."""
        if (folder := options.get("dir_fd")) is not None:
            return self._is_inside(f"{_path_of(folder)}/{os.fspath(args[0])}")
        files = args[: 2 if name in _CALLS["rename"] else 1]
        return any(self._is_inside(_path_of(file) if isinstance(file, int) else file) for file in files)

    def _is_inside(self, path: str | bytes | os.PathLike[Any]) -> bool:
        name = os.path.abspath(os.fsdecode(path))  # noqa: PTH100, quicker, and called for every file
        if not f"{name}{os.sep}".startswith(self._folders):
            return False
        return not os.path.basename(name).startswith(_EXEMPT)  # noqa: PTH119


def _path_of(descriptor: int) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{descriptor}")  # noqa: PTH115
    except OSError:
        return ""
