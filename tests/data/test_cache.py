"""Disk errors of the shard cache are one line that names its folder."""

import errno
import os
import threading
from pathlib import Path

import pytest

from distrain.data.storage.cache import ShardCache
from distrain.errors import UserError

CONTENT = b"0123456789"


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def cache(folder):
    """A cache that contains the shard `old`."""
    cache = ShardCache(folder, 10**6, threading.Event())
    read(cache, "old")
    return cache


def read(cache, name):
    return cache.read(name, len(CONTENT), 2, 3, lambda write: write(CONTENT, 0))


def fail_at(monkeypatch, owner, function, ending, number):
    """Make a system function fail for paths with this ending, and for all descriptors."""
    real = getattr(owner, function)

    def failing(path, *rest, **options):
        if isinstance(path, int) or str(path).endswith(ending):
            raise OSError(number, os.strerror(number))
        return real(path, *rest, **options)

    monkeypatch.setattr(owner, function, failing)


FAILURES = {
    "lock on a full disk": (os, "open", "/lock", errno.ENOSPC),
    "lock of another user": (os, "open", "/lock", errno.EACCES),
    "partial file on a full disk": (os, "open", ".part", errno.ENOSPC),
    "shard of another user": (os, "open", ".shard", errno.EACCES),
    "quota exceeded by the rename": (Path, "rename", ".part", errno.EDQUOT),
    "time stamp of another user's shard": (os, "utime", "", errno.EPERM),
    "disk that cannot be read": (os, "pread", "", errno.EIO),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_a_disk_error_is_one_line_that_names_the_folder_and_the_cure(failure, cache, folder, monkeypatch):
    fail_at(monkeypatch, *FAILURES[failure])
    with pytest.raises(UserError, match=rf"^{folder}: (disk full|cannot cache shards): .* set download\.cache "):
        read(cache, "new")
    monkeypatch.undo()
    assert read(cache, "new") == b"234"


def test_a_cached_shard_of_another_user_is_one_line_in_every_method(cache, folder, monkeypatch):
    fail_at(monkeypatch, os, "open", ".shard", errno.EACCES)
    fail_at(monkeypatch, os, "utime", "", errno.EPERM)
    for use in (
        lambda: cache.touch("old"),
        lambda: cache.fetch("old", 10, print),
        lambda: cache.remove_damaged("old", 10, 0),
    ):
        with pytest.raises(
            UserError, match=rf"^{folder}: cannot cache shards: .*; set download\.cache to another folder"
        ):
            use()
