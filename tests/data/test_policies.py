"""Policies of automatic augmentation are those of torchvision, by the same draws."""

from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torchvision.transforms import AutoAugmentPolicy, v2
from torchvision.transforms.v2 import InterpolationMode

from distrain.config import AugmentConfig
from distrain.data.augmentation.pixels import apply_change, apply_plan
from distrain.data.augmentation.policies import OPERATIONS, Change, find_policy

IMAGE = torch.from_numpy(np.random.default_rng(1).integers(0, 256, (3, 40, 40), dtype=np.uint8))
NAMES = {  # ours and torchvision's
    "identity": "Identity", "shear_x": "ShearX", "shear_y": "ShearY", "translate_x": "TranslateX",
    "translate_y": "TranslateY", "rotate": "Rotate", "brightness": "Brightness", "saturation": "Color",
    "contrast": "Contrast", "sharpness": "Sharpness", "posterize": "Posterize", "solarize": "Solarize",
    "autocontrast": "AutoContrast", "equalize": "Equalize", "invert": "Invert",
}  # fmt: skip


def changes(augment: AugmentConfig, *draws: float) -> Sequence[Sequence[Change]]:
    policy = find_policy(augment)
    assert policy is not None
    assert policy.draws == len(draws)
    return policy.plan(draws, 40, 40).chains


def changed_by_peer(transform, name: str, level: int, bins: int, sign: float) -> torch.Tensor:
    """IMAGE after one operation of torchvision at a level of its space."""
    magnitudes, signed = transform._AUGMENTATION_SPACE[NAMES[name]]
    values = magnitudes(bins, 40, 40)
    magnitude = 0.0 if values is None else float(values[level]) if values.ndim else float(values)
    if signed and sign >= 0.5:
        magnitude = -magnitude
    if name == "solarize":
        magnitude -= 1e-6  # of which float32 may have rounded the product with 255 up
    fill = {torch.Tensor: None}
    return transform._apply_image_or_video_transform(
        IMAGE, NAMES[name], magnitude, interpolation=InterpolationMode.NEAREST, fill=fill
    )


def assert_same(change: Change, expected: torch.Tensor) -> None:
    assert (apply_change(IMAGE, change).int() - expected.int()).abs().max() <= 1, change


@pytest.mark.parametrize("number", range(14), ids=OPERATIONS)
@pytest.mark.parametrize("sign", [0.0, 0.9])
def test_trivial_augment(number, sign):
    for level in range(31):
        ((change,),) = changes(AugmentConfig(auto_augment="ta_wide"), (number + 0.5) / 14, (level + 0.5) / 31, sign)
        assert change.name == OPERATIONS[number]
        assert_same(change, changed_by_peer(v2.TrivialAugmentWide(), change.name, level, 31, sign))


@pytest.mark.parametrize("number", range(14), ids=OPERATIONS)
@pytest.mark.parametrize("magnitude", [0, 5, 9, 30])
def test_randaugment(number, magnitude):
    augment = AugmentConfig(auto_augment="randaugment", operations=2, magnitude=magnitude)
    which = (number + 0.5) / 14
    (chain,) = changes(augment, which, 0.0, which, 0.9)
    assert [change.name for change in chain] == [OPERATIONS[number]] * 2
    for change, sign in zip(chain, (0.0, 0.9), strict=True):
        assert_same(change, changed_by_peer(v2.RandAugment(), change.name, magnitude, 31, sign))


@pytest.mark.parametrize("number", range(25))
@pytest.mark.parametrize(
    ("name", "table"), [("autoaugment", AutoAugmentPolicy.IMAGENET), ("autoaugment_cifar10", AutoAugmentPolicy.CIFAR10)]
)
def test_autoaugment(name, table, number):
    peer, augment = v2.AutoAugment(table), AugmentConfig(auto_augment=name)
    pair, which = peer._policies[number], (number + 0.5) / 25
    possible = [(one, probability, level) for one, probability, level in pair if probability]
    (chain,) = changes(augment, which, 0.0, 0.9, 0.0, 0.9)  # whatever can happen does
    assert [NAMES[change.name] for change in chain] == [one for one, _, _ in possible]
    for change, (_, _, level) in zip(chain, possible, strict=True):
        assert_same(change, changed_by_peer(peer, change.name, level or 0, 10, 0.9))
    for position, (_, probability, _) in enumerate(pair):
        for chance, happens in ((max(0.0, probability - 1e-9), True), (probability, False)):
            others = (0.999999, 0.9)  # only what is certain happens
            draws = (chance, 0.9, *others) if position == 0 else (*others, chance, 0.9)
            (chain,) = changes(augment, which, *draws)
            certain = sum(other == 1 for index, (_, other, _) in enumerate(pair) if index != position)
            assert len(chain) == certain + (happens and probability > 0)


def test_augmix_mixes_three_chains_of_weak_operations_in_all_proportions():
    policy = find_policy(AugmentConfig(auto_augment="augmix"))
    plans = [policy.plan(draws, 40, 40) for draws in np.random.default_rng(0).random((3000, policy.draws)).tolist()]
    assert {len(plan.chains) for plan in plans} == {3}
    depths = Counter(len(chain) for plan in plans for chain in plan.chains)
    assert sorted(depths) == [1, 2, 3]
    assert min(depths.values()) == pytest.approx(3000, rel=0.1)
    weights = np.array([plan.weights for plan in plans])
    assert weights.sum(axis=1) == pytest.approx(1)
    assert weights[:, 0].mean() == pytest.approx(0.5, abs=0.02)  # Beta(1, 1)
    assert weights[:, 1:].mean(axis=0) == pytest.approx([1 / 6] * 3, abs=0.01)
    assert weights[:, 0].std() == pytest.approx(1 / 12**0.5, abs=0.01)
    shares = weights[:, 1:] / weights[:, 1:].sum(axis=1, keepdims=True)
    assert shares.std(axis=0) == pytest.approx([(1 / 18) ** 0.5] * 3, abs=0.01)  # Dirichlet(1, 1, 1)


@pytest.mark.parametrize("number", range(13), ids=OPERATIONS[1:])
def test_operations_of_augmix(number):
    for level in range(3):
        chain = [(number + 0.5) / 13, (level + 0.5) / 3, 0.9]
        draws = [0.2, 0.6, 0.5, *([0.0, *chain, *[0.0] * 6] * 3)]
        for (change,) in changes(AugmentConfig(auto_augment="augmix"), *draws):
            assert change.name == OPERATIONS[number + 1]
            assert_same(change, changed_by_peer(v2.AugMix(), change.name, level, 10, 0.9))


def test_chains_are_mixed_as_by_torchvision():
    policy = find_policy(AugmentConfig(auto_augment="augmix"))
    plan = policy.plan(np.random.default_rng(3).random(policy.draws).tolist(), 40, 40)
    mixed = plan.weights[0] * IMAGE.double()
    for chain, weight in zip(plan.chains, plan.weights[1:], strict=True):
        image = IMAGE
        for change in chain:
            image = apply_change(image, change)
        mixed += weight * image.double()
    assert (apply_plan(IMAGE, plan).double() - mixed).abs().max() <= 1
    assert not torch.equal(apply_plan(IMAGE, plan), IMAGE)
