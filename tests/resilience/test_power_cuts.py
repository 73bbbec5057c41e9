"""What a power cut leaves of a run: its folder lies on a file system that is shut down without flushing anything."""

import errno
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
from support.processes import SMALL, Training, environment

from distrain.checkpoint import newest_step
from distrain.files import write_atomically
from distrain.soak.disk import Disk, why_impossible

pytestmark = pytest.mark.skipif(bool(why_impossible()), reason=why_impossible())


@pytest.fixture
def disk(tmp_path) -> Iterator[Disk]:
    disk = Disk(tmp_path / "image", tmp_path / "disk")
    disk.mount()
    yield disk
    disk.unmount()


def cut_power(disk: Disk, *trainings: Training) -> None:
    disk.cut_power()
    for training in trainings:
        training.kill()
    disk.unmount()
    disk.mount()


def test_a_power_cut_loses_what_is_not_synced_and_nothing_else(disk):
    write_atomically(disk.folder / "synced", "kept")
    (disk.folder / "not-synced").write_text("lost")
    disk.cut_power()
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        (disk.folder / "later").write_text("lost")
    disk.unmount()
    disk.mount()
    assert (disk.folder / "synced").read_text() == "kept"
    assert not (disk.folder / "not-synced").exists() or not (disk.folder / "not-synced").read_text()
    assert not (disk.folder / "later").exists()


BESIDE_A_CONTAINER = """
import os, subprocess, sys, time
from pathlib import Path
from distrain.soak.disk import Disk, hide_mounts

container = subprocess.Popen(["sh", "-c", "read go; exec unshare --mount sleep 60"], stdin=subprocess.PIPE)
mounts = Path(f"/proc/{container.pid}/ns/mnt")
before = os.readlink(mounts)
try:
    hide_mounts()
    disk = Disk(Path("image").resolve(), Path("disk").resolve())
    disk.mount()
    container.stdin.write(b"go\\n")
    container.stdin.flush()
    while os.readlink(mounts) == before:
        time.sleep(0.01)
    disk.cut_power()
    disk.unmount()
    disk.mount()
    (disk.folder / "file").write_text("written")
    disk.unmount()
finally:
    container.kill()
"""


def test_a_container_that_starts_meanwhile_does_not_keep_a_disk_without_power(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", BESIDE_A_CONTAINER], cwd=tmp_path, env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "disk").is_mount()


def test_the_metrics_up_to_the_newest_checkpoint_survive_a_power_cut(disk, on_dataset):
    settings = (
        *SMALL,
        *on_dataset,
        "batch.lanes=3",
        "batch.per_lane=4",
        "train.epochs=30",
        "checkpoint.every_steps=50",
    )
    training = Training(disk.folder / "run", *settings, "resilience.faults=[hang@train.step:130]")
    training.wait_for_step(129)  # a step is reported in the one after it
    cut_power(disk, training)
    step = newest_step(training.folder / "checkpoints")
    assert step in (50, 100)
    resumed = Training(training.folder, *settings, "run.change=[train.epochs]", "train.epochs=8").wait()
    assert resumed.code == 0, resumed.output
    assert f"resuming at step {step}" in resumed.output
    assert [*resumed.series("train/loss")] == [*range(1, 136)]
