import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
import torch
from support.processes import SMALL, Result, train
from support.synthetic import CLASSES, write_multi_label_split, write_split

from distrain.parallel.group import Group

os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)
hypothesis.settings.register_profile("untimed", deadline=None)  # a busy machine is not a failure
hypothesis.settings.load_profile("untimed")
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as a shell starts what it runs in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)

LONGEST = (
    "test_slurm.py", "test_equivalence.py", "test_crash_matrix.py", "test_ssh.py", "test_strategies.py",
    "test_training.py", "test_sweep.py", "test_soak.py", "test_compilation.py",
)  # fmt: skip


def pytest_collection_modifyitems(items):
    """Run the longest files first, so that no worker is left with one when the others are done."""
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


def pytest_configure(config):
    """Hide the GPUs, of which a machine may have fewer than a test has ranks, from all tests but those of `-m gpu`."""
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") is not None and not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU, and -m gpu")


@pytest.fixture(autouse=True)
def _seed_torch():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def group():
    """A process group of only this process."""
    with Group() as group:
        yield group


@pytest.fixture(scope="session")
def dataset(tmp_path_factory) -> Path:
    """Shards of small synthetic images whose color is their class: 203 for training in 5 shards, 61 for validation in
    2. Neither count is divisible by any batch size or number of ranks that the tests use."""
    folder = tmp_path_factory.mktemp("dataset")
    write_split(folder, "train", 203, shards=5)
    write_split(folder, "val", 61, shards=2)
    return folder


@pytest.fixture(scope="session")
def on_dataset(dataset) -> tuple[str, ...]:
    """Overrides for training on `dataset`."""
    return (
        f"data.train={dataset}/train.parquet",
        f"data.val={dataset}/val.parquet",
        "data.image_size=8",
        "data.val_resize=8",
        "augment.crop=pad",
        "augment.crop_pad=1",
        "model.num_classes=3",
    )


@pytest.fixture(scope="session")
def settings(on_dataset) -> tuple[str, ...]:
    """Overrides for a run of 51 steps, with dropout: 3 epochs of 203 samples, 12 per step, so that epochs end within a
    step."""
    sizes = ("batch.lanes=3", "batch.per_lane=4", "train.epochs=3", "checkpoint.every_steps=7")
    return (*SMALL, *on_dataset, *sizes, "model.options={dropout: 0.1}")


@pytest.fixture(scope="session")
def finished(settings, tmp_path_factory) -> tuple[tuple[str, ...], Path]:
    """The settings of a finished run with EMA, a padded crop and an MLflow database, and its folder."""
    chosen = (*settings, "train.epochs=0.5", "ema.decay=0.9", "track.uri=''")
    result = train(tmp_path_factory.mktemp("finished") / "run", *chosen)
    assert result.code == 0, result.output
    return chosen, result.folder


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A disk of 2 MiB, with room for a few checkpoints."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount a small disk: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.fixture(scope="session")
def colors(tmp_path_factory) -> tuple[str, ...]:
    """Settings of a run on small images of any number of colors, which are their labels: 203 for training, 61 for
    validation."""
    folder = tmp_path_factory.mktemp("colors")
    write_multi_label_split(folder, "train", 203, shards=3)
    write_multi_label_split(folder, "val", 61, shards=2)
    return (
        *SMALL, "data.image_size=8", "data.val_resize=8", "augment.crop=none", f"model.num_classes={len(CLASSES)}",
        "batch.lanes=2", "batch.per_lane=8", "train.epochs=4", "evaluate.batch=7", "checkpoint.every_steps=9",
        f"data.train={folder}/train.parquet", f"data.val={folder}/val.parquet",
    )  # fmt: skip


@pytest.fixture(scope="session")
def colors_run(colors, tmp_path_factory) -> tuple[tuple[str, ...], Result]:
    """These settings and the finished run."""
    result = train(tmp_path_factory.mktemp("colors-run") / "run", *colors)
    assert result.code == 0, result.output
    return colors, result
