"""`train.dry_run`: what a run will do and need, from its plan and two steps of it."""

import time
from collections.abc import Iterator
from datetime import timedelta

import psutil
import torch
from rich.filesize import decimal

from distrain import models
from distrain.config import Config
from distrain.errors import EXIT_DONE
from distrain.models.complexity import count_complexity, total
from distrain.parallel.group import Group
from distrain.recipe.catalog import relative_cost
from distrain.recipe.schedules import learning_rate, peak_rate
from distrain.short_run import ShortRun, open_short_run
from distrain.train import train_step

_BEST_AND_NEW = 2  # checkpoints beside the newest ones: the best, and the one that is being written


def dry_run(config: Config) -> int:
    """Print what the run will do and need, and take two steps of it; the second one is timed. Nothing is kept.

    Raises UserError if configuration and data do not belong together.
    """
    with Group() as group:

        def info(line: str) -> None:
            if group.is_main:
                print(line, flush=True)

        with open_short_run(config, group, info, steps=2) as short:
            for line in describe(config, short, group):
                info(line)
            train_step(short.learner, 0, short.batches, learning_rate(config, 0.0))
            _synchronize(group)
            began = time.monotonic()
            means, _ = train_step(short.learner, 1, short.batches, learning_rate(config, 0.0))
            _synchronize(group)
            seconds = time.monotonic() - began
            for line in report(config, short, group, seconds, float(means["loss"])):
                info(line)
    return EXIT_DONE


def describe(config: Config, short: ShortRun, group: Group) -> Iterator[str]:
    """Yield what is known before the first step."""
    train, val, plan, batch = short.train_index, short.val_index, short.plan, config.batch
    yield f"data      {len(train):,} images for training, {len(val):,} for validation, {len(train.classes):,} classes"
    yield (
        f"plan      {config.train.epochs:g} epochs of {plan.step_at(1.0):,} steps; in a step {batch.size:,} images: "
        f"{batch.lanes} lanes of {batch.per_lane}, on {group.world} {'rank' if group.world == 1 else 'ranks'}"
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


def report(config: Config, short: ShortRun, group: Group, seconds: float, loss: float) -> Iterator[str]:
    """Yield what the steps have shown."""
    is_gpu = group.device.type == "cuda"
    yield f"step      loss {loss:.4g}; {seconds:.3g} s, {config.batch.size / seconds:,.0f} images/s"
    if is_gpu:
        limit = torch.cuda.get_device_properties(group.device).total_memory
        yield f"memory    {decimal(torch.cuda.max_memory_allocated())} of the GPU's {decimal(limit)}"
    else:
        yield f"memory    {decimal(psutil.Process().memory_info().rss)} per process"
    size = sum(tensor.nbytes for tensor in short.learner.state().values())
    kept = config.checkpoint.keep + _BEST_AND_NEW
    yield f"disk      {decimal(size)} per checkpoint, {decimal(size * kept)} for {kept} of them in {config.run.folder}"
    total_s = seconds * short.plan.steps * relative_cost(config)
    yield (
        f"time      {timedelta(seconds=round(total_s))} without validation, if the data keeps up: "
        f"{total_s * group.world / 3600:,.3g} hours of {'GPUs' if is_gpu else 'processes'}"
    )


def _synchronize(group: Group) -> None:
    if group.device.type == "cuda":
        torch.cuda.synchronize()
    group.barrier()
