"""Small files that a restart reads: written atomically and durably, read with one-line errors."""

import errno
import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from distrain.errors import TemporaryError, UserError

# Error numbers of mistakes in a path or its permissions; all others, as of a full disk or a lost server, may pass.
_PERMANENT = {
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOENT, errno.ENAMETOOLONG,
    errno.ELOOP, errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EFBIG, errno.ENXIO, errno.ENODEV,
}  # fmt: skip


def may_pass(error: OSError) -> bool:
    """Whether the file system, the disk or the machine may recover from an error, so that trying later can help."""
    return error.errno is not None and error.errno not in _PERMANENT


def write_atomically(path: Path, content: str | bytes, durable: bool = True, private: bool = False) -> None:
    """Replace `path` by `content`: after a crash or power loss it holds the old content or the new one.

    Without `durable` nothing is flushed to disk, which is enough for a file that only running processes read. Only its
    owner can read a `private` file. Raises OSError.
    """
    tmp = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")  # process ids repeat on other hosts
    try:
        with tmp.open("wb") as file:
            if private:
                os.fchmod(file.fileno(), 0o600)
            file.write(content.encode() if isinstance(content, str) else content)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        tmp.replace(path)
    except BaseException:
        with suppress(OSError):
            tmp.unlink(missing_ok=True)
        raise
    if durable:
        sync_folder(path.parent)


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file with `write_atomically`. Raises OSError."""
    write_atomically(path, json.dumps(content, indent=1) + "\n")


def read_json(path: Path, cure: str) -> dict[str, Any]:
    """Return the JSON object in a file, {} if there is no file.

    Raises UserError, which names the file and the `cure`, if it holds anything else, as an interrupted write by an
    older release or a damaged disk may leave it. Raises OSError if the file cannot be read.
    """
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except ValueError as error:  # not JSON, or not UTF-8
        raise UserError(f"{path}: not readable as JSON: {cure}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a JSON object: {cure}")
    return content


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries to disk, so that a rename in it survives a power loss. Raises OSError."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def translated_errors(folder: Path) -> Iterator[None]:
    """Turn an OSError on a run's folder into one line."""
    try:
        yield
    except OSError as error:
        text = f"{folder}: the run's folder cannot be used: {error.strerror}"
        if may_pass(error):
            raise TemporaryError(f"{text}; free space or check its file system, and run again") from error
        raise UserError(f"{text}; set run.dir to a folder that you may write to", scope="rank") from error
