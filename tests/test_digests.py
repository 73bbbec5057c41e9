"""Pinned results: the weights of three short runs, and what a seed yields at each stage before training."""

from pathlib import Path

import numpy as np
import pytest
import torch
from support.processes import SMALL, train

from distrain import config
from distrain.config import AugmentConfig
from distrain.data.augmentation.crops import draw_crop_boxes
from distrain.data.augmentation.pixels import augment_pixels
from distrain.data.index import COLUMNS, Index, Shard
from distrain.data.loading.setup import load_indexes, make_plan
from distrain.data.sampling.plan import LaneBatch
from distrain.learner import build_network

CONSTRAINTS = Path(__file__).parents[1] / "docker" / "constraints.txt"
(PINNED,) = [line[7:] for line in CONSTRAINTS.read_text().splitlines() if line.startswith("torch==")]

# Code paths of torch, oneDNN and MKL that compute the same bits on every x86-64 CPU, and no GPU.
SAME_BITS = (
    "env", "ATEN_CPU_CAPABILITY=default", "ONEDNN_MAX_CPU_ISA=SSE41", "MKL_CBWR=COMPATIBLE", "CUDA_VISIBLE_DEVICES=",
)  # fmt: skip
REGNET = (
    "model.name=regnet",
    "model.options={depth: 4, w0: 16, wa: 8.0, wm: 2.0, group_width: 8, se_ratio: 0.25, stem: cifar, drop_path: 0.1}",
)
RUNS = {
    "densenet-sgd": (
        1,
        (
            "model.options={dropout: 0.1}", "augment.crop=pad", "augment.crop_pad=1", "loss.label_smoothing=0.1",
        ),
    ),
    "regnet-adamw-window-ema": (
        2,
        (
            *REGNET, "augment.crop=resized", "optimizer.name=adamw", "optimizer.lr=0.01", "optimizer.clip_norm=1",
            "augment.auto_augment=ta_wide", "augment.color_jitter=[0.4,0.4,0.4]", "augment.lighting=0.1",
            "augment.erase=0.5", "data.shuffle=window", "data.window_shards=10", "ema.decay=0.9", "ema.every_steps=2",
        ),
    ),
    "regnet-zero2-balanced-resizing": (
        2,
        (
            *REGNET, "augment.crop=resized", "optimizer.lr=0.1", "parallel.strategy=zero2", "data.balanced=true",
            "data.size_schedule=[[0,6],[0.5,8]]",
        ),
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def base(on_dataset) -> tuple[str, ...]:
    """Overrides that all runs have in common."""
    return (*SMALL, *on_dataset, "batch.lanes=4", "batch.per_lane=4", "train.epochs=1")


@pytest.mark.skipif(torch.__version__.split("+")[0] != PINNED, reason=f"the digests are those of torch {PINNED}")
@pytest.mark.parametrize(
    ("name", "accuracy", "digest"),
    [
        ("densenet-sgd", "44.26%", "e7312880ac0b10bcf5aa1b6cd991b876"),
        ("regnet-adamw-window-ema", "31.15%", "3f06ca8616bc5fccff02ee120e2e8cea"),
        ("regnet-zero2-balanced-resizing", "93.44%", "8f0ddc3020c621c65ede96fa5be97216"),
    ],
)
def test_a_run_ends_in_the_pinned_bits(base, tmp_path, name, accuracy, digest):
    ranks, settings = RUNS[name]
    result = train(tmp_path / name, *base, *settings, ranks=ranks, host=SAME_BITS)
    assert result.code == 0, result.output
    assert (result.last_line.split()[2], result.digest) == (accuracy, f"sha256:{digest}")


@pytest.mark.parametrize(
    ("order", "step_0_lane_0", "step_20_lane_3"),
    [
        ("data.shuffle=global", [149, 160, 33, 154], [1, 104, 127, 41]),
        ("data.repeats=3", [149, 149, 149, 160], [47, 47, 47, 9]),
        ("data.balanced=true", [30, 55, 149, 160], [17, 28, 60, 140]),
        ("data.shuffle=window", [154, 153, 135, 141], [155, 12, 153, 34]),
    ],
)
def test_a_seed_yields_the_pinned_orders(base, order, step_0_lane_0, step_20_lane_3):
    settings = config.load(None, [*base, "run.name=x", "run.seed=5", order])
    plan = make_plan(settings, load_indexes(settings)[0])
    assert plan.lane_batch(0, 0).ids.tolist() == step_0_lane_0
    assert plan.lane_batch(20, 3).ids.tolist() == step_20_lane_3


@pytest.mark.parametrize(
    ("crop", "boxes"),
    [
        ("resized", [[28, 2, 28, 6], [31, 4, 26, 42], [50, 75, 52, 45], [66, 79, 53, 40], [1, 0, 0, 0]]),
        ("pad", [[-2, -4, 2, 2], [4, -4, 2, 0], [80] * 4, [100] * 4, [1, 0, 0, 0]]),
    ],
)
def test_a_seed_yields_the_pinned_crop_boxes_and_flips(base, crop, boxes):
    settings = config.load(None, [*base, "run.name=x", f"augment.crop={crop}", "augment.crop_pad=4"])
    batch = LaneBatch(np.arange(4), np.full(4, 1), np.array([0, 0, 0, 1]))
    widths, heights = np.full(4, 100, np.int32), np.full(4, 80, np.int32)
    drawn = draw_crop_boxes(settings.augment, settings.data, 5, batch, widths, heights)
    assert [column.tolist() for column in drawn] == boxes  # top, left, height, width, flip


def augmented(image: torch.Tensor, sample: int, **augment) -> torch.Tensor:
    return augment_pixels(image, AugmentConfig(**augment), [1.0, 1.0, 1.0], 5, (sample, 1, 0))


def test_a_seed_yields_the_pinned_erased_boxes():
    white = [
        augmented(torch.zeros(3, 40, 60, dtype=torch.uint8), sample, erase=0.6)[0].nonzero() for sample in (0, 1, 2)
    ]
    corners = [(box.min(dim=0).values.tolist(), box.max(dim=0).values.tolist()) for box in white[1:]]
    assert len(white[0]) == 0
    assert corners == [([25, 2], [36, 33]), ([24, 45], [37, 50])]


def test_a_seed_yields_the_pinned_color_jitter_and_lighting():
    gray = torch.full((3, 1, 1), 100, dtype=torch.uint8)
    brightness = [augmented(gray, sample, color_jitter=[0.4, 0.0, 0.0]).flatten()[0].item() for sample in range(4)]
    assert brightness == [109, 90, 75, 126]
    colors = [augmented(gray, sample, lighting=0.1).flatten().tolist() for sample in (0, 1, 3)]
    assert colors == [[101, 101, 101], [98, 98, 98], [103, 103, 104]]


def test_the_digest_of_a_data_set_is_pinned():
    values = {"shard": [0, 0], "offset": [512, 2048], "size": [100, 200], "label": [1, 0], "width": [5, 6]}
    values |= {"height": [7, 8], "crc32": [123, 2**32 - 1]}
    columns = {name: np.array(values[name], kind) for name, kind in COLUMNS.items()}
    assert Index("folder", (Shard("a.tar", 10, 1),), ("x", "y"), **columns).digest == "35936fcf80b22251"


def test_a_seed_yields_the_pinned_initial_weights(base):
    network = build_network(config.load(None, [*base, "run.name=x", "run.seed=5"]), torch.device("cpu"))
    weights = next(network.parameters()).detach().flatten()[:3]
    torch.testing.assert_close(weights, torch.tensor([0.7463536, -0.3129374, 0.1295812]), rtol=1e-5, atol=1e-6)
