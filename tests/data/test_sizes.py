"""Progressive resizing: a schedule over the sizes of training images."""

import pytest

from distrain import config
from distrain.errors import UserError

REQUIRED = ["run.name=a", "data.train=t.parquet", "data.val=v.parquet", "model.name=densenet121"]


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ("[[0,128],[30]]", "data.size_schedule=[[0.0, 128.0], [30.0]] must be rows of an epoch and a whole number of"),
        ("[[0,100.5],[30,224]]", "must be rows of an epoch and a whole number of pixels"),
        ("[[0,0],[30,224]]", "must be rows of an epoch and a whole number of pixels"),
        ("[[1,128],[30,224]]", "must begin at epoch 0 and go on with ever later epochs"),
        ("[[0,128],[30,160],[30,224]]", "must begin at epoch 0 and go on with ever later epochs"),
        ("[[0,128],[30,160]]", "data.size_schedule ends at 160 pixels, but data.image_size=224: end it there"),
    ],
)
def test_a_schedule_that_makes_no_sense_is_one_line(schedule, message):
    with pytest.raises(UserError) as caught:
        config.load(None, [*REQUIRED, f"data.size_schedule={schedule}"])
    assert message in str(caught.value)


def test_a_schedule_reads_back_as_it_is_printed(tmp_path):
    loaded = config.load(None, [*REQUIRED, "data.size_schedule=[[0,128],[30.5,160],[60,224]]"])
    (tmp_path / "printed.yaml").write_text(config.to_yaml(loaded))
    assert config.load(tmp_path / "printed.yaml") == loaded
    assert loaded.data.size_schedule == [[0, 128], [30.5, 160], [60, 224]]
