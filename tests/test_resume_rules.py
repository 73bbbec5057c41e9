"""Which settings a resumed run may have otherwise than before."""

from dataclasses import replace

import numpy as np
import pytest

from distrain import config
from distrain.checkpoint import check_identity
from distrain.data.loading.setup import load_indexes
from distrain.errors import UserError
from distrain.identity import run_manifest
from distrain.initial import InitialWeights
from distrain.recipe.distillation import Teacher

REQUIRED = ["run.name=a", "data.train=t.parquet", "data.val=v.parquet", "model.name=densenet121"]

# They would change what is learned in a way that no user means, or could not be continued from the saved state.
FIXED = """
run: seed
data: shuffle window_shards limit balanced repeats image_size size_schedule size_unit interpolation
data: val_resize mean std
augment: crop crop_scale crop_ratio crop_pad flip auto_augment operations magnitude color_jitter lighting erase
augment: mixup cutmix mix_prob
model: name num_classes options
batch: lanes per_lane
train: precision freeze overfit_batches
parallel: batch_norm
optimizer: name nesterov betas eps trust decay_norms no_decay head_lr_factor layer_decay
loss: name
distill: weight temperature
evaluate: precise_bn_steps
ema: decay equal start_epoch every_steps warmup
resilience: bad_steps spike rollbacks
"""
# They change what is learned, and only if run.change names them.
CHANGEABLE = """
train: epochs
optimizer: lr lr_batch momentum weight_decay clip_norm clip_value clip_agc
schedule: name per warmup_epochs warmup_factor warmup final_factor
schedule: power gamma step_epochs milestones cycle_epochs cycle_factor
loss: label_smoothing
"""
# They change where and how it is computed and reported.
FREE = """
run: name dir change
data: train val loader max_bad threads prefetch
download: cache cache_gb parallel retries retry_wait timeout
train: tf32 dense_block memory_format recompute activation_gb compile graphs
train: dry_run max_minutes stop_epoch deterministic
parallel: strategy offload bucket_mb
evaluate: every_epochs batch patience metric flip
checkpoint: every_steps every_minutes keep keep_every_steps keep_best
resilience: patience attempts faults
track: uri experiment models register parent params every_steps
model: init
loss: class_weights
distill: teacher network options
"""


def keys(table: str) -> set[str]:
    rows = (row.split(": ") for row in table.strip().splitlines())
    return {f"{section}.{name}" for section, names in rows for name in names.split()}


def test_every_setting_is_fixed_changeable_or_free_as_listed():
    settings = config.load(None, REQUIRED)
    fixed, changeable = set(config.fixed_settings(settings)), config.changeable_settings(settings)
    everything = set(config.flatten(config.to_dict(settings)))
    assert fixed - changeable == keys(FIXED)
    assert changeable == keys(CHANGEABLE)
    assert everything - fixed == keys(FREE)


def test_other_data_initial_weights_or_class_weights_are_another_run(on_dataset):
    def load(*overrides):
        return config.load(None, [*REQUIRED, *on_dataset, *overrides])

    train, val = load_indexes(load())
    other_train, other_val = (replace(index, label=np.roll(index.label, 1)) for index in (train, val))
    began = run_manifest(load(), train, val, None, None)
    check_identity(began, run_manifest(load(), train, val, None, None))
    for key, now in {
        "data.train digest": run_manifest(load(), other_train, val, None, None),
        "data.val digest": run_manifest(load(), train, other_val, None, None),
        "model.init digest": run_manifest(load(), train, val, InitialWeights("w.pth", "5ac1"), None),
        "distill.teacher digest": run_manifest(load(), train, val, None, Teacher(None, (), "5ac1")),
        "loss.class_weights digest": run_manifest(load("loss.class_weights=balanced"), train, val, None, None),
    }.items():
        with pytest.raises(UserError, match=f"^{key} was .* when this run began and is .* now: set it back, or start"):
            check_identity(began, now)
