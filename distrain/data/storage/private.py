"""Folders below one that all users of a machine share, where another user may have created the name first."""

import os
import stat
import tempfile
from contextlib import suppress
from pathlib import Path

from distrain.errors import UserError


def create_tmp_folder(name: str, cure: str = "remove it") -> Path:
    """Create a folder of this user below TMPDIR. Raises UserError, which ends in the `cure`, if that is not this user's
    alone; OSError."""
    own = Path(tempfile.gettempdir()) / f"distrain-{os.getuid()}"
    for folder in (own, own / name):
        create_private_folder(folder, cure)
    return own / name


def create_private_folder(path: Path, cure: str) -> None:
    """Create a folder that only this user can enter, unless there is one that only this user can have written to.

    Raises UserError, which ends in the `cure`, for a link and what other users own or can write to; OSError.
    """
    with suppress(FileExistsError):
        path.mkdir(mode=0o700)
    found = path.lstat()
    if stat.S_ISLNK(found.st_mode):
        problem = "is a symbolic link"
    elif not stat.S_ISDIR(found.st_mode):
        problem = "is not a folder"
    elif found.st_uid != os.getuid():
        problem = f"belongs to another user (id {found.st_uid})"
    elif found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        problem = f"can be written by other users (mode {stat.S_IMODE(found.st_mode):o})"
    else:
        return
    raise UserError(f"{path}: {problem} and is not used, as others could change what is in it: {cure}", scope="rank")
