import numpy as np
import pytest
import torch
from torchvision.transforms import RandomResizedCrop

from distrain.config import AugmentConfig, DataConfig
from distrain.data.augmentation.crops import center_crop_boxes, draw_crop_boxes
from distrain.data.sampling.plan import LaneBatch

N = 5000
IDS = np.arange(N)
RNG = np.random.default_rng(0)
WIDTHS = RNG.integers(20, 900, N).astype(np.int32)
HEIGHTS = RNG.integers(20, 900, N).astype(np.int32)
AUGMENT = AugmentConfig()


def config(**options) -> DataConfig:
    return DataConfig(train="", val="", **options)


def batch(epoch=0, repeat=0, ids=IDS) -> LaneBatch:
    return LaneBatch(ids, np.full_like(ids, epoch), np.full_like(ids, repeat))


def test_a_crop_box_depends_only_on_its_sample():
    together = draw_crop_boxes(AUGMENT, config(), 1, batch(3), WIDTHS, HEIGHTS)
    single = draw_crop_boxes(AUGMENT, config(), 1, batch(3, ids=IDS[7:8]), WIDTHS[7:8], HEIGHTS[7:8])
    assert [column[7] for column in together] == [column[0] for column in single]


def test_crop_boxes_change_with_epoch_repeat_and_seed():
    drawn = [
        draw_crop_boxes(AUGMENT, config(), seed, batch(epoch, repeat), WIDTHS, HEIGHTS)
        for seed, epoch, repeat in ((0, 0, 0), (0, 1, 0), (1, 0, 0), (0, 0, 1))
    ]
    boxes = [np.stack(each[:4]) for each in drawn]
    for other in boxes[1:]:
        assert np.mean((boxes[0] == other).all(axis=0)) < 0.15  # some fit no crop and take the center
    assert 0.4 < np.mean(drawn[0].flip == drawn[1].flip) < 0.6


def test_resized_crops_lie_inside_the_image():
    top, left, height, width, flip = draw_crop_boxes(AUGMENT, config(), 0, batch(), WIDTHS, HEIGHTS)
    assert min(top.min(), left.min()) == 0
    assert min(height.min(), width.min()) > 0
    assert (top + height <= HEIGHTS).all()
    assert (left + width <= WIDTHS).all()
    assert flip.mean() == pytest.approx(0.5, abs=0.03)


def test_resized_crops_are_distributed_as_those_of_torchvision():
    top, left, height, width, _ = draw_crop_boxes(AUGMENT, config(), 0, batch(), WIDTHS, HEIGHTS)
    torchvision = np.array(
        [
            RandomResizedCrop.get_params(torch.empty(3, 1, 1).expand(3, h, w), (0.08, 1.0), (0.75, 4 / 3))
            for w, h in zip(WIDTHS.tolist(), HEIGHTS.tolist(), strict=True)
        ]
    )
    quantiles = np.linspace(0.05, 0.95, 10)
    for ours, expected in (
        (
            width * height / (WIDTHS.astype(float) * HEIGHTS),
            torchvision[:, 3] * torchvision[:, 2] / (WIDTHS.astype(float) * HEIGHTS),
        ),
        (width / height, torchvision[:, 3] / torchvision[:, 2]),
        (left / WIDTHS, torchvision[:, 1] / WIDTHS),
        (top / HEIGHTS, torchvision[:, 0] / HEIGHTS),
    ):
        np.testing.assert_allclose(np.quantile(ours, quantiles), np.quantile(expected, quantiles), atol=0.03)


@pytest.mark.parametrize(("width", "height"), [(400, 101), (101, 400), (33, 10), (1, 1000)])
def test_an_image_that_no_crop_fits_is_cropped_at_the_center_as_by_torchvision(width, height):
    augment = AugmentConfig(crop_scale=[1.0, 1.0], crop_ratio=[0.75, 4 / 3])
    sides = np.array([width], np.int32), np.array([height], np.int32)
    drawn = draw_crop_boxes(augment, config(), 0, batch(ids=IDS[:1]), *sides)
    expected = RandomResizedCrop.get_params(torch.empty(3, 1, 1).expand(3, height, width), (1.0, 1.0), (0.75, 4 / 3))
    assert [int(column[0]) for column in drawn[:4]] == list(expected)


def test_padded_crops_shift_up_to_the_padding_on_every_side():
    augment = AugmentConfig(crop="pad", crop_pad=4)
    sides = np.full(N, 32, np.int32)
    top, left, height, width, _ = draw_crop_boxes(augment, config(), 0, batch(), sides, sides)
    assert set(top) == set(left) == set(range(-4, 5))
    assert set(height) == set(width) == {32}


def test_validation_crops_equal_resizing_and_then_center_cropping():
    widths, heights = np.array([500, 256, 32], np.int32), np.array([375, 512, 32], np.int32)
    top, left, height, width, flip = center_crop_boxes(config(image_size=224, val_resize=256), widths, heights)
    assert height.tolist() == width.tolist() == [328, 224, 28]
    assert top.tolist() == [23, 144, 2]
    assert left.tolist() == [86, 16, 2]
    assert not flip.any()
