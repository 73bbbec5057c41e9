"""flock locks on files, which the kernel releases when their owner dies for any reason."""

import fcntl
import os
from pathlib import Path


def try_lock(file: int) -> bool:
    """Lock an open file for this process alone, unless it is locked. Returns whether it was not. Raises OSError."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def is_still_at(file: int, path: Path) -> bool:
    """Whether a path still names this open file."""
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False


def remove_idle(path: Path) -> bool:
    """Remove a file unless it is locked. Returns whether it was removed. Raises OSError."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    except FileNotFoundError:
        return False
    try:
        idle = try_lock(file) and is_still_at(file, path)
        if idle:
            path.unlink()
        return idle
    finally:
        os.close(file)
