"""Small files that a restart reads: written atomically and durably, read with one-line errors."""

import errno
import json
import os
import stat
import uuid
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO

from distrain.errors import TemporaryError, UserError

# Error numbers of mistakes in a path or its permissions; all others, as of a full disk or a lost server, may pass.
_PERMANENT = {
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOENT, errno.ENAMETOOLONG,
    errno.ELOOP, errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EFBIG, errno.ENXIO, errno.ENODEV,
}  # fmt: skip
_CHECKSUM = "crc32"  # of what else the JSON object in a file holds


def resolve(path: str | Path) -> Path:
    """The absolute path without links. A loop of links, for which Path.resolve raises RuntimeError, stays in it, and to
    open it is an OSError."""
    return Path(os.path.realpath(path))


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


def open_regular(path: Path) -> BinaryIO:
    """Open a file for reading, without waiting for whoever writes to a FIFO. Raises OSError unless it is a file."""

    def opener(name: str, flags: int) -> int:
        descriptor = os.open(name, flags | os.O_NONBLOCK)
        if not (stat.S_ISREG(mode := os.fstat(descriptor).st_mode) or stat.S_ISDIR(mode)):  # open refuses a folder
            os.close(descriptor)
            raise OSError(errno.ENXIO, "Not a regular file", name)
        return descriptor

    return open(path, "rb", opener=opener)  # Path.open has no opener


def read_regular(path: Path) -> bytes:
    """The content of a file. Raises OSError, as open_regular does."""
    with open_regular(path) as file:
        return file.read()


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON object, with a checksum that `read_json` compares, with `write_atomically`. Raises OSError."""
    write_atomically(path, json.dumps({**content, _CHECKSUM: _checksum(content)}, indent=1) + "\n")


def read_json(path: Path, cure: str, types: Mapping[str, type] = MappingProxyType({})) -> dict[str, Any]:
    """Return the JSON object in a file, {} if there is no file.

    Raises UserError, which names the file and the `cure`, if it holds anything else, lacks a member of `types` or is
    not as `write_json` wrote it, as an interrupted write by an older release or a damaged disk may leave it. Raises
    OSError if the file cannot be read.
    """
    try:
        content, checksum = parse_json(read_regular(path))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise UserError(f"{path}: {error}: {cure}") from error
    if checksum is False:
        raise UserError(f"{path}: not as it was written: {cure}")
    for name, kind in types.items():
        if type(content.get(name)) is not kind:
            raise UserError(f"{path}: lacks {name}: {cure}")
    return content


def read_json_from_user(path: Path, where: str, form: str) -> Any:
    """What a JSON file that a person or another program wrote holds.

    Raises UserError, which begins with `where` and shows the `form` that is expected.
    """
    try:
        return json.loads(read_regular(path))
    except OSError as error:
        raise UserError(f"{where}: cannot be read: {error.strerror}: expected a JSON file, {form}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not valid JSON: expected {form}") from error


def parse_json(data: bytes) -> tuple[dict[str, Any], bool | None]:
    """The JSON object in the content of a file, without its checksum, and whether that is right; None if it has none.

    Raises ValueError if it is not a JSON object.
    """
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:  # not JSON, or not UTF-8
        raise ValueError("not readable as JSON") from error
    if not isinstance(content, dict):
        raise ValueError("expected a JSON object")
    if _CHECKSUM not in content:
        return content, None
    checksum = content.pop(_CHECKSUM)
    return content, checksum == _checksum(content)


def _checksum(content: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


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
