"""Sets up the data pipeline of a run: indexes, plan, quarantine, loader."""

import torch

from distrain.config import Config
from distrain.data.index import Index
from distrain.data.loading import loaders
from distrain.data.loading.in_flight import open_in_flight
from distrain.data.loading.loader import Loader
from distrain.data.loading.quarantine import Quarantine
from distrain.data.loading.reader import SampleReader
from distrain.data.sampling.lanes import LaneLayout
from distrain.data.sampling.order import make_order
from distrain.data.sampling.plan import Plan
from distrain.data.storage.index_file import load_index
from distrain.data.storage.remote import open_store
from distrain.errors import UserError


def load_indexes(config: Config) -> tuple[Index, Index]:
    """Load the training and validation index, or what data.limit or train.overfit_batches leave of them.

    Raises UserError unless both have the classes of the model, and labels as the configured loss needs them.
    """
    train_index, val_index = (load_index(path, config.download) for path in (config.data.train, config.data.val))
    if train_index.classes != val_index.classes:
        raise UserError(
            f"{config.data.val}: classes differ from those of {config.data.train}; index both with the same --classes"
        )
    classes = len(train_index.classes)
    if classes != config.model.num_classes:
        raise UserError(
            f"model.num_classes={config.model.num_classes}, but {config.data.train} has {classes} classes: "
            f"set model.num_classes={classes}"
        )
    _check_labels(config, train_index, val_index)
    if config.train.overfit_batches:
        same = train_index.limited(config.train.overfit_batches * config.batch.size)
        return same, same
    if config.data.limit:
        return train_index.limited(config.data.limit), val_index.limited(config.data.limit)
    return train_index, val_index


def _check_labels(config: Config, train_index: Index, val_index: Index) -> None:
    if train_index.multi_label != val_index.multi_label:
        one, other = (config.data.train, config.data.val)[:: 1 if val_index.multi_label else -1]
        raise UserError(f"{one}: has one label per image, and {other} is multi-label: index both with --multi-label")
    if not train_index.multi_label:
        if config.evaluate.patience and config.evaluate.metric == "top5" and len(train_index.classes) <= 5:
            raise UserError(
                f"evaluate.metric=top5 is always 1 of the {len(train_index.classes)} classes of {config.data.train}: "
                "set evaluate.metric=score"
            )
        return
    if config.loss.name == "cross_entropy":
        raise UserError(
            f"loss.name=cross_entropy needs one label per image, and {config.data.train} is multi-label: set "
            "loss.name=auto"
        )
    if config.loss.label_smoothing:
        raise UserError(
            f"loss.label_smoothing={config.loss.label_smoothing} spreads the one label of an image over all classes, "
            f"and {config.data.train} is multi-label: set loss.label_smoothing=0"
        )
    if config.evaluate.patience and config.evaluate.metric == "top5":
        raise UserError("evaluate.metric=top5 is not measured of multi-label data: set evaluate.metric=score")
    if not val_index.class_counts().any():
        raise UserError(f"{config.data.val}: no image has a label, so that nothing can be measured: correct data.val")


def make_plan(config: Config, index: Index) -> Plan:
    """Return which samples each lane consumes at each step."""
    layout = LaneLayout(len(index), config.batch.lanes, config.batch.per_lane)
    return Plan(layout, config.train.epochs, make_order(config.data, index, layout, config.run.seed))


def make_quarantine(config: Config, index: Index, split: str) -> Quarantine:
    """Open the list of bad samples of a split, in the run's folder."""
    return Quarantine(config.run.folder / "quarantine.jsonl", split, len(index), config.data.max_bad)


def make_loader(
    config: Config,
    name: str,
    index: Index,
    quarantine: Quarantine,
    device: torch.device,
    checked: bool = False,
    recorded: bool = True,
) -> Loader:
    """Open the loader `name` of a run over an index. Raises UserError if it is not installed on this machine.

    `checked`: whether `check_store` has been called for the index on this host. `recorded`: whether what it decodes is
    recorded in case it crashes the process, as for one loader of a split.
    """
    if name == "dali":
        loaders.require_dali()
    store = open_store(index, config.download, checked)
    in_flight = open_in_flight(config, quarantine.split) if recorded else None
    reader = SampleReader(index, store, quarantine, in_flight)
    batch = max(config.batch.per_lane, config.evaluate.batch)
    return loaders.open_loader(
        name, config.data, config.augment, config.run.seed, batch, reader, device, config.train.deterministic
    )
