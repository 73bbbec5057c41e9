"""What a power cut leaves of a run: its folder lies on a file system that is shut down without flushing anything."""

import errno
import os
from collections.abc import Iterator

import pytest
from support.processes import SMALL, Training

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
    training.wait_for_step(130)
    cut_power(disk, training)
    step = newest_step(training.folder / "checkpoints")
    assert step in (50, 100)
    resumed = Training(training.folder, *settings, "run.change=[train.epochs]", "train.epochs=8").wait()
    assert resumed.code == 0, resumed.output
    assert f"resuming at step {step}" in resumed.output
    assert [*resumed.series("train/loss")] == [*range(1, 136)]
