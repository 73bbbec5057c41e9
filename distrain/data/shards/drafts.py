"""Drafts of shards: written under a name that no other process uses, and renamed once they are complete.

FILE.HOST-RANDOM.tmp is locked by the process that writes it. What killed processes have left is not locked, and only
another process on the same host can be sure of that.
"""

import os
import socket
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path
from typing import Any, BinaryIO

from distrain.data.storage.locks import is_still_at, remove_idle, try_lock
from distrain.files import sync_folder, write_json


@contextmanager
def draft(path: Path, index: Path) -> Iterator[BinaryIO]:
    """Yield a file that becomes the shard `path` if no exception is raised.

    If that replaces another shard, the `index` that describes it is removed first, so that a kill leaves no index of
    other shards. Raises OSError.
    """
    tmp, descriptor = _create(path)
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(descriptor)
            if path.exists() and index.exists():
                index.unlink(missing_ok=True)
                sync_folder(path.parent)
            tmp.replace(path)
    finally:
        tmp.unlink(missing_ok=True)
    sync_folder(path.parent)


def remove_abandoned(out: Path, split: str) -> None:
    """Remove the drafts of a split that killed processes on this host have left. Raises OSError."""
    for path in out.glob(f"{escape(split)}-*.tar.{escape(socket.gethostname())}-*.tmp"):
        with suppress(OSError):  # a file system without locks
            remove_idle(path)


def create_json(path: Path, content: Any) -> None:
    """Write a JSON file atomically unless it exists, by whichever process is first. Raises OSError."""
    tmp = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        write_json(tmp, content)
        path.hardlink_to(tmp)
    except FileExistsError:
        return
    except OSError:  # a file system without hard links
        if not tmp.exists():
            raise
        tmp.replace(path)
    finally:
        tmp.unlink(missing_ok=True)


def _create(path: Path) -> tuple[Path, int]:
    while True:
        tmp = path.with_name(f"{path.name}.{socket.gethostname()}-{uuid.uuid4().hex}.tmp")
        descriptor = os.open(tmp, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)
        try:
            locked = try_lock(descriptor)
        except OSError:  # a file system without locks, where nobody takes a draft for abandoned
            return tmp, descriptor
        if locked and is_still_at(descriptor, tmp):
            return tmp, descriptor
        os.close(descriptor)  # another process took it for abandoned before it was locked
