import errno
import io
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from distrain.files import sync_folder
from distrain.resilience.file_calls import Disturbance, FileCalls, draw_disturbance


def remove_tree(folder: Path) -> None:
    shutil.rmtree(folder / "tree")


def write_opened(folder: Path) -> None:
    with (folder / "file").open("a") as file:
        file.write("more")


CALLS: dict[str, Callable[[Path], object]] = {
    "open": lambda folder: os.open(folder / "file", os.O_RDONLY),
    "read": lambda folder: (folder / "file").read_bytes(),
    "write": write_opened,
    "fsync": sync_folder,
    "rename": lambda folder: (folder / "file").rename(folder / "other"),
    "replace": lambda folder: (folder / "file").replace(folder / "other"),
    "stat": lambda folder: (folder / "file").stat(),
    "scandir": lambda folder: list(folder.glob("*")),
    "unlink": lambda folder: (folder / "file").unlink(),
    "rmdir": remove_tree,
    "mkdir": lambda folder: (folder / "new").mkdir(),
}


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "run" / "tree" / "below").mkdir(parents=True)
    (tmp_path / "run" / "file").write_text("content")
    return tmp_path / "run"


@pytest.mark.parametrize("call", CALLS)
def test_the_next_calls_of_a_kind_fail_for_a_while(folder, call):
    with FileCalls(folder) as files:
        files.disturb(Disturbance((call,), errno.ESTALE, 1000.0))
        with pytest.raises(OSError, match=os.strerror(errno.ESTALE)):
            CALLS[call](folder)
    CALLS[call](folder)


def test_files_elsewhere_and_the_record_of_faults_are_spared(folder, tmp_path):
    every = tuple(CALLS)
    with FileCalls(folder) as files:
        files.disturb(Disturbance((*every, "lstat", "listdir", "remove"), errno.EIO, 1000.0))
        shutil.copytree(Path(__file__).parent, tmp_path / "copied", ignore=shutil.ignore_patterns("__pycache__"))
        shutil.rmtree(tmp_path / "copied")
        (folder / "faults.jsonl").write_text("line\n")
        assert (folder / "faults.jsonl").read_text() == "line\n"


def test_a_disturbance_ends_and_so_does_the_context(folder):
    before = (os.stat, os.open, io.open, open)
    with FileCalls(folder) as files:
        files.disturb(Disturbance(("stat", "write"), errno.EIO, 0.0))
        write_opened(folder)
    assert (os.stat, os.open, io.open, open) == before
    assert (folder / "file").read_text() == "contentmore"


def test_without_a_disturbance_files_are_as_always(folder):
    with FileCalls(folder):
        (folder / "binary").write_bytes(bytes(range(256)) * 1000)
        with (folder / "binary").open("r+b") as file:
            file.seek(7)
            file.write(b"xyz")
        assert (folder / "binary").read_bytes()[6:11] == b"\x06xyz\x0a"
        (folder / "text").write_text("\u00e4\nb")
        assert (folder / "text").read_text().splitlines() == ["\u00e4", "b"]
        unbuffered = (folder / "text").open("ab", buffering=0)
        assert unbuffered.write(b"c") == 1
        unbuffered.close()
        remove_tree(folder)
    assert (folder / "text").read_text() == "\u00e4\nbc"


def test_a_delayed_call_succeeds(folder, monkeypatch):
    slept = []
    monkeypatch.setattr("distrain.resilience.file_calls.time.sleep", slept.append)
    with FileCalls(folder) as files:
        files.disturb(Disturbance(("read",), 0, 1000.0))
        assert (folder / "file").read_text() == "content"
    assert slept


def test_what_is_drawn_is_a_function_of_the_key_and_varies():
    drawn = [draw_disturbance(f"eio@time:{step}+0.5/0", errno.EIO) for step in range(50)]
    assert drawn == [draw_disturbance(f"eio@time:{step}+0.5/0", errno.EIO) for step in range(50)]
    assert all(0.5 <= disturbance.seconds <= 2 for disturbance in drawn)
    assert len({disturbance.calls for disturbance in drawn}) > 5
    assert draw_disturbance("key", errno.ENOSPC, ("write",)).calls == ("write",)
