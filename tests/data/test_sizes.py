"""Progressive resizing: data.size_schedule."""

from contextlib import closing
from dataclasses import replace

import pytest
import torch

from distrain import config
from distrain.config import (
    AugmentConfig,
    BatchConfig,
    Config,
    DataConfig,
    ModelConfig,
    RunConfig,
    ScheduleConfig,
    TrainConfig,
)
from distrain.data.augmentation.crops import size_at
from distrain.data.loading.requests import train_requests, validation_requests
from distrain.data.loading.setup import make_loader, make_plan, make_quarantine
from distrain.data.storage.index_file import load_index
from distrain.errors import UserError

REQUIRED = ["run.name=a", "data.train=t.parquet", "data.val=v.parquet", "model.name=densenet121"]


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ("[[0,128],[30]]", "data.size_schedule=[[0.0, 128.0], [30.0]] must be rows of an epoch and a whole number of"),
        ("[[0,100.5],[30,224]]", "must be rows of an epoch and a whole number of pixels"),
        ("[[0,0],[30,224]]", "must be rows of an epoch and a whole number of pixels"),
        ("[[1,128],[30,224]]", "must start at epoch 0, and epochs must increase"),
        ("[[0,128],[30,160],[30,224]]", "must start at epoch 0, and epochs must increase"),
        (
            "[[0,128],[30,256]]",
            "data.size_schedule ends at 256 pixels, but data.image_size=224: the last size must not exceed image_size",
        ),
    ],
)
def test_an_invalid_schedule_is_one_line(schedule, message):
    with pytest.raises(UserError) as caught:
        config.load(None, [*REQUIRED, f"data.size_schedule={schedule}"])
    assert message in str(caught.value)


def test_a_printed_schedule_loads_unchanged(tmp_path):
    loaded = config.load(None, [*REQUIRED, "data.size_schedule=[[0,128],[30.5,160],[60,224]]"])
    (tmp_path / "printed.yaml").write_text(config.to_yaml(loaded))
    assert config.load(tmp_path / "printed.yaml") == loaded
    assert loaded.data.size_schedule == [[0, 128], [30.5, 160], [60, 224]]


@pytest.mark.parametrize(
    ("epoch", "size"), [(0, 128), (0.5, 128), (29.999, 128), (30, 160), (59.9, 160), (60, 224), (1000, 224)]
)
def test_the_size_is_that_of_the_last_row_that_has_started(epoch, size):
    data = DataConfig(train="", val="", size_schedule=[[0, 128], [30, 160], [60, 224]])
    assert size_at(data, epoch, 100) == size


@pytest.mark.parametrize("epochs", [1, 8, 0.5])
def test_sizes_in_fractions_follow_the_length_of_the_run(epochs):
    data = DataConfig(train="", val="", size_schedule=[[0, 128], [0.5, 160], [0.75, 224]], size_unit="run")
    sizes = [size_at(data, epochs * fraction, epochs) for fraction in (0, 0.49, 0.5, 0.74, 0.75, 1.01)]
    assert sizes == [128, 128, 160, 160, 224, 224]


def test_a_size_that_begins_after_the_run_is_refused():
    with pytest.raises(UserError, match=r"must begin its last size before 1.*data.size_unit=epoch"):
        config.load(None, [*REQUIRED, "data.size_schedule=[[0,128],[60,224]]", "data.size_unit=run"])


def test_without_a_schedule_all_images_have_the_same_size():
    assert size_at(DataConfig(train="", val="", image_size=96, val_resize=96), 7.5, 10) == 96


@pytest.fixture
def growing(dataset, tmp_path):
    """A run whose images grow during its three epochs of 203 images, at 20 images per step."""
    data = DataConfig(
        train=f"{dataset}/train.parquet",
        val=f"{dataset}/val.parquet",
        image_size=12,
        val_resize=12,
        size_schedule=[[0, 6], [1, 8], [2.5, 12]],
    )
    return Config(
        run=RunConfig(name="run", dir=str(tmp_path)),
        data=data,
        augment=AugmentConfig(auto_augment="ta_wide"),
        model=ModelConfig(name="densenet121", num_classes=3),
        batch=BatchConfig(lanes=2, per_lane=10),
        train=TrainConfig(epochs=3),
        schedule=ScheduleConfig(warmup_epochs=0),
    )


@pytest.fixture(params=["torch", "dali"])
def load(request, growing):
    """load(start) -> training batches from that step on; load(None) -> validation batches."""
    train_index = load_index(growing.data.train)

    def batches(start):
        if start is None:
            requests = validation_requests(growing, train_index, range(1))
        else:
            requests = train_requests(growing, make_plan(growing, train_index), train_index, range(2), start)
        quarantine = make_quarantine(growing, train_index, "train")
        with closing(make_loader(growing, request.param, train_index, quarantine, torch.device("cpu"))) as loader:
            return list(loader.stream(requests))

    return batches


def test_images_have_the_size_of_the_epoch_in_which_their_step_starts(growing):
    train_index = load_index(growing.data.train)
    plan = make_plan(growing, train_index)
    sizes = [request.size for request in train_requests(growing, plan, train_index, range(1))]
    # Step 10 starts at sample 200 of epoch 0, step 26 at 2.56 epochs.
    assert sizes == [6] * 11 + [8] * 15 + [12] * 4


def test_a_replacement_has_the_same_size(growing):
    train_index = load_index(growing.data.train)
    requests = train_requests(growing, make_plan(growing, train_index), train_index, range(1), start=10)
    assert next(requests).replacement(9).size == 6


def test_batches_grow_with_the_schedule_and_validation_does_not(load):
    shapes = [tuple(batch.images.shape) for batch in load(0)]
    assert shapes == [(10, 3, size, size) for size in [6] * 22 + [8] * 30 + [12] * 8]
    assert load(None)[0].images.shape[1:] == (3, 12, 12)


def test_starting_in_the_middle_yields_the_tail_of_a_growing_run(load):
    full, tail = load(0), load(9)
    assert all(torch.equal(one.images, other.images) for one, other in zip(full[18:], tail, strict=True))


def test_the_size_does_not_change_the_crop_boxes(growing):
    train_index = load_index(growing.data.train)
    plan = make_plan(growing, train_index)
    constant = replace(growing, data=replace(growing.data, size_schedule=[]))
    scheduled, fixed = (next(train_requests(each, plan, train_index, range(1))) for each in (growing, constant))
    assert (scheduled.size, fixed.size) == (6, 12)
    assert all((one == other).all() for one, other in zip(scheduled.crops, fixed.crops, strict=True))
