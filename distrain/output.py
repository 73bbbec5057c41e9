"""The output of a process that must not end because its output cannot be written."""

import io
import sys
from contextlib import suppress
from typing import Any


class _Lenient(io.FileIO):
    """Discards what cannot be written, as to a log on a full disk or a terminal that is gone."""

    def write(self, data: "bytes | bytearray | memoryview") -> int:  # type: ignore[override]
        written = None
        with suppress(OSError):
            written = super().write(data)
        return memoryview(data).nbytes if written is None else written


def keep_writing() -> None:
    """Let writing to standard output and standard error never fail from now on."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if not isinstance(stream, io.TextIOWrapper):  # closed, or captured by a test
            continue
        with suppress(OSError):
            stream.flush()
        raw: Any = _Lenient(stream.fileno(), "wb", closefd=False)
        buffer = io.BufferedWriter(raw)
        lenient = io.TextIOWrapper(
            buffer,
            encoding=stream.encoding,
            errors="backslashreplace" if stream.errors == "strict" else stream.errors,
            line_buffering=stream.line_buffering or name == "stderr",
            write_through=stream.write_through,
        )
        setattr(sys, name, lenient)
        setattr(sys, f"__{name}__", lenient)
