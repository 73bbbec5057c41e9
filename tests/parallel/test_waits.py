"""In a step, the host waits for the device nowhere: it submits the next step while the device computes this one."""

import pytest
from support.processes import SMALL
from support.strategies import STRATEGIES
from support.waits import READS_OF_THE_HOST, count_waits

VARIANTS = {
    **{strategy: (f"parallel.strategy={strategy}",) for strategy in STRATEGIES},
    "lars-fp16": ("optimizer.name=lars", "train.precision=fp16", "ema.decay=0.9", "optimizer.clip_norm=1"),
    "lamb": ("optimizer.name=lamb", "train.recompute=selective", "optimizer.clip_norm=1"),
    "recipe": ("augment.mixup=0.2", "augment.cutmix=1", "optimizer.clip_agc=0.01", "ema.decay=0.9", "ema.warmup=true"),
    "zero2-fp16": ("parallel.strategy=zero2", "train.precision=fp16", "ema.decay=0.9"),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_step_waits_for_the_device(variant, on_dataset, tmp_path):
    sizes = ("batch.lanes=2", "batch.per_lane=8", "train.epochs=1", "checkpoint.every_steps=5", "track.every_steps=2")
    waits = count_waits(tmp_path, *SMALL, *on_dataset, *sizes, *VARIANTS[variant])
    assert ("distrain.outcomes", "read") in waits  # or nothing was counted
    assert {place for place in waits if not place[0].startswith("deepspeed")} - READS_OF_THE_HOST == set()
