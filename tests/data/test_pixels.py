import numpy as np
import pytest
import torch
from torchvision.transforms import RandomErasing

from distrain.config import AugmentConfig
from distrain.data.augmentation import pixels
from distrain.data.augmentation.pixels import augment_pixels, erase_box, shift_lighting

MEAN = [0.485, 0.456, 0.406]
IMAGE = torch.randint(0, 256, (3, 48, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_augmentation_is_a_function_of_seed_sample_epoch_and_repeat():
    augment = AugmentConfig(auto_augment="ta_wide", color_jitter=[0.4, 0.4, 0.4], lighting=0.1, erase=0.5)
    keys = [(0, (1, 2, 0)), (1, (1, 2, 0)), (0, (2, 2, 0)), (0, (1, 3, 0)), (0, (1, 2, 1))]
    first, *others = (augment_pixels(IMAGE, augment, MEAN, *key) for key in keys)
    assert torch.equal(first, augment_pixels(IMAGE, augment, MEAN, *keys[0]))
    assert not any(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("which", ["brightness", "contrast", "saturation"])
def test_color_jitter_strengthens_and_weakens_by_up_to_its_strength(which):
    number = ("brightness", "contrast", "saturation").index(which)
    augment = AugmentConfig(color_jitter=[0.4 * (number == other) for other in range(3)])
    pixels = {"brightness": [[0, 0, 0], [100, 100, 100]], "contrast": [[50, 50, 50], [150, 150, 150]]}
    image = torch.tensor(pixels.get(which, [[150, 100, 50]]), dtype=torch.uint8).T.reshape(3, 1, -1)
    jittered = [augment_pixels(image, augment, MEAN, 0, (sample, 0, 0)).int() for sample in range(400)]
    # Each factor multiplies the range of the image, which is 100.
    factors = np.array([(one.max() - one.min()).item() for one in jittered]) / 100
    assert (factors.min(), factors.max()) == pytest.approx((0.6, 1.4), abs=0.02)
    assert np.mean(factors > 1) == pytest.approx(0.5, abs=0.07)


def test_as_many_images_are_erased_as_configured():
    augment = AugmentConfig(erase=0.25)
    erased = [not torch.equal(augment_pixels(IMAGE, augment, MEAN, 0, (sample, 0, 0)), IMAGE) for sample in range(1000)]
    assert np.mean(erased) == pytest.approx(0.25, abs=0.04)


def test_lighting_shifts_all_pixels_equally_along_the_principal_component():
    gray = torch.full((3, 2, 2), 128, dtype=torch.uint8)
    unchanged = shift_lighting(gray, 0.1, np.array([0.5, 0.5, 0.5, 0.25, 0.25, 0.25]))  # cosine of a quarter turn
    assert torch.equal(unchanged, gray)
    moved = shift_lighting(gray, 0.1, np.array([0.9, 0, 0, 0, 0, 0])).int() - gray.int()
    # sqrt(-2 ln 0.1) = 2.146 stds of 0.1 x 0.2175 x 255 along (-0.5675, -0.5808, -0.5836)
    assert moved[:, 0, 0].tolist() == [-7, -7, -7]
    assert (moved == moved[:, :1, :1]).all()


@pytest.mark.parametrize(
    ("component", "std", "shift"),
    # 2.146 stds of the eigenvalues 0.0188 and 0.0045 x 255, along their eigenvectors (Krizhevsky et al. 2012)
    [(1, 10, [74, 0, -71]), (2, 40, [39, -80, 41])],
)
def test_lighting_shifts_along_the_other_components_too(component, std, shift):
    draws = np.zeros(6)
    draws[component] = 0.9
    moved = shift_lighting(torch.full((3, 1, 1), 128, dtype=torch.uint8), std, draws).int() - 128
    assert moved.flatten().tolist() == pytest.approx(shift, abs=1)


def test_erased_boxes_are_distributed_as_those_of_torchvision():
    draws = np.random.default_rng(0).random((2000, 4))
    black = torch.zeros(3, 40, 40, dtype=torch.uint8)
    ours = [erase_box(black, [1.0, 1.0, 1.0], *draw)[0].bool() for draw in draws]
    assert all(box.any() for box in ours)
    torchvision = [RandomErasing.get_params(black, (0.02, 0.33), (0.3, 3.3), [1.0])[2:4] for _ in range(2000)]
    ours_area = np.quantile([int(box.sum()) for box in ours], [0.1, 0.5, 0.9])
    torchvision_area = np.quantile([h * w for h, w in torchvision], [0.1, 0.5, 0.9])
    np.testing.assert_allclose(ours_area, torchvision_area, rtol=0.12)


def test_erased_boxes_are_filled_with_the_mean_color():
    erased = erase_box(IMAGE, [0.2, 0.4, 0.6], 0.5, 0.5, 0.0, 0.0)
    assert erased[:, 0, 0].tolist() == [51, 102, 153]
    assert torch.equal(erased[:, -1, -1], IMAGE[:, -1, -1])
    last = erase_box(IMAGE, [0.2, 0.4, 0.6], 0.5, 0.5, 1 - 2**-53, 1 - 2**-53)
    assert last[:, -1, -1].tolist() == [51, 102, 153]
    assert torch.equal(last[:, 0, 0], IMAGE[:, 0, 0])


def test_pixel_augmentation_is_off_by_default():
    assert not pixels.augments_pixels(AugmentConfig())
