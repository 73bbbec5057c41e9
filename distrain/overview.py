"""What a run is, in a few lines: before a dry run and at the start of every run."""

from collections.abc import Iterator

import torch

from distrain import models
from distrain.config import Config
from distrain.data.index import Index
from distrain.data.sampling.plan import Plan
from distrain.models.complexity import count_complexity, total
from distrain.parallel.group import Group
from distrain.recipe.schedules import learning_rate, peak_rate


def overview(config: Config, plan: Plan, train_index: Index, val_index: Index, group: Group) -> Iterator[str]:
    """Yield lines on its data, plan, network, learning rate and computation."""
    train, val, batch = train_index, val_index, config.batch
    yield f"data      {len(train):,} images for training, {len(val):,} for validation, {len(train.classes):,} classes"
    yield (
        f"plan      {config.train.epochs:g} epochs of {plan.step_at(1.0):,} steps; in a step {batch.size:,} images: "
        f"{batch.lanes} lanes of {batch.per_lane}, on {_counted(group.world, 'rank')}"
    )
    with torch.device("meta"):
        network = models.build(config.model.name, config.model.num_classes, **config.model.options)
    cost = total(count_complexity(network, config.data.image_size).values())
    yield (
        f"network   {config.model.name}: {cost.params / 1e6:.3g} million weights; for an image of "
        f"{config.data.image_size} pixels {cost.flops / 1e9:.3g} billion multiply-adds, {cost.activations / 1e6:.3g} "
        "million activations"
    )
    last = learning_rate(config, config.train.epochs * (1 - 1 / max(2, plan.steps)))
    yield (
        f"schedule  {config.schedule.name}: learning rate {learning_rate(config, 0.0):.3g} at first, at most "
        f"{peak_rate(config):.3g}, {last:.3g} at the end"
    )
    device = torch.cuda.get_device_name(group.device) if group.device.type == "cuda" else "CPU"
    yield (
        f"compute   {config.parallel.strategy} in {config.train.precision} on {_counted(group.world, 'rank')} of "
        f"{_counted(len(group.nodes), 'node')}, {device}"
    )


def _counted(number: int, name: str) -> str:
    return f"{number:,} {name}{'s' * (number != 1)}"
