"""Whole runs with fused dense blocks: bit for bit after SIGKILL, and to plain ones and back."""

import numpy as np
import pytest
from support.processes import SMALL, Result, train

# 203 samples in steps of 24 are 8.5 steps an epoch: 3 epochs are 25 steps.
SETTINGS = (
    *SMALL, "batch.lanes=6", "batch.per_lane=4", "train.epochs=3", "checkpoint.every_steps=4", "evaluate.batch=16",
    "optimizer.lr=0.02", "ema.decay=0.9",
)  # fmt: skip
FUSED, PLAIN = "train.dense_block=fused", "train.dense_block=plain"


@pytest.fixture(scope="module")
def settings(on_dataset) -> tuple[str, ...]:
    return (*SETTINGS, *on_dataset)


@pytest.fixture(scope="module")
def plain(settings, tmp_path_factory) -> Result:
    """The finished run of plain blocks, on one rank."""
    return train(tmp_path_factory.mktemp("plain") / "run", *settings)


def losses(result: Result) -> list[float]:
    assert result.code == 0, result.output
    return list(result.series("train/loss").values())


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_a_killed_run_ends_in_the_same_bits_and_on_the_plain_curve(settings, plain, ranks, tmp_path):
    uninterrupted = train(tmp_path / "uninterrupted", *settings, FUSED, ranks=ranks)
    np.testing.assert_allclose(losses(uninterrupted), losses(plain), rtol=2e-4)
    assert uninterrupted.digest != plain.digest  # or nothing was fused
    fault = f"resilience.faults=[sigkill@train.step:13/{ranks - 1}]"
    assert train(tmp_path / "killed", *settings, FUSED, fault, ranks=ranks).code not in (0, 78)
    resumed = train(tmp_path / "killed", *settings, FUSED, ranks=ranks)
    assert "resuming at step" in resumed.output
    assert resumed.digest == uninterrupted.digest


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_a_run_changes_to_plain_blocks_and_back(settings, plain, ranks, tmp_path):
    for kind, step in ((FUSED, 6), (PLAIN, 14)):
        fault = f"resilience.faults=[sigkill@train.step:{step}/0]"
        killed = train(tmp_path / "run", *settings, kind, fault, ranks=ranks)
        assert killed.code not in (0, 78), killed.output
    finished = train(tmp_path / "run", *settings, FUSED, ranks=ranks)
    assert "resuming at step" in finished.output
    np.testing.assert_allclose(losses(finished), losses(plain), rtol=2e-4)
    assert finished.digest != plain.digest


WIDE = (
    "model.options={depths: [2], growth_rate: 48, stem_width: 600, stem: imagenet}"  # DeepSpeed keeps small ones whole
)


@pytest.mark.slow
@pytest.mark.parametrize("words", [(), ("train.freeze=[stem]",)], ids=["trained", "frozen stem"])
def test_the_weights_of_fused_blocks_are_gathered_under_zero3(settings, words, tmp_path):
    chosen = (
        *settings,
        "model.name=densenet",
        WIDE,
        "train.epochs=0.5",
        "data.image_size=32",
        "data.val_resize=32",
        *words,
    )
    plain = train(tmp_path / "plain", *chosen)
    fused = train(tmp_path / "fused", *chosen, FUSED, "parallel.strategy=zero3", ranks=2)
    np.testing.assert_allclose(losses(fused), losses(plain), rtol=2e-4)
