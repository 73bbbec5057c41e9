"""Disk errors of the shard cache are one line that names its folder."""

import errno
import os
import tempfile
import threading
from pathlib import Path

import pytest

from distrain.config import DownloadConfig
from distrain.data.storage.cache import ShardCache
from distrain.data.storage.remote import cache_folder
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


@pytest.fixture
def default(tmp_path, monkeypatch) -> Path:
    """Where the default cache is in an empty TMPDIR."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path / f"distrain-{os.getuid()}"


def test_the_default_cache_is_this_users_alone(default):
    before = os.umask(0)
    try:
        folder = cache_folder(DownloadConfig())
    finally:
        os.umask(before)
    assert folder == default / "shards"
    assert [path.stat().st_mode & 0o777 for path in (default, folder)] == [0o700, 0o700]
    assert cache_folder(DownloadConfig()) == folder


def make_writable(folder: Path) -> None:
    folder.mkdir()
    folder.chmod(0o770)


def make_foreign(folder: Path) -> None:
    folder.mkdir()
    os.chown(folder, 12345, 12345)


def make_link(folder: Path) -> None:
    (folder.parent / "elsewhere").mkdir()
    folder.symlink_to("elsewhere")


PREPARED = {
    r"can be written by other users \(mode 770\)": make_writable,
    r"belongs to another user \(id 12345\)": make_foreign,
    "is a symbolic link": make_link,
    "is not a folder": Path.touch,
}


@pytest.mark.parametrize("problem", PREPARED)
@pytest.mark.parametrize("inside", [False, True], ids=["folder", "subfolder"])
def test_a_default_cache_that_another_user_may_have_prepared_is_refused(default, problem, inside):
    if os.getuid() and "another user" in problem:
        pytest.skip("needs root")
    prepared = default / "shards" if inside else default
    if inside:
        default.mkdir(mode=0o700)
    PREPARED[problem](prepared)
    with pytest.raises(UserError, match=rf"^{prepared}: {problem} and is not used, .*: remove it, or set download.cac"):
        cache_folder(DownloadConfig())


@pytest.mark.parametrize("name", ["new.part", "new.shard", "lock"])
def test_a_link_in_a_cache_is_never_followed(cache, folder, tmp_path, name):
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(victim)
    with pytest.raises(UserError, match=rf"^{folder}: cannot cache shards: "):
        read(cache, "new")
    assert victim.read_bytes() == b"precious"
