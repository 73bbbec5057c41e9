"""Trains small networks under several strategies, one after the other in one process group.

    torchrun --nproc-per-node N strategies_main.py FILE.json

FILE.json holds a list of tasks: `settings` of the run, its `first` and `last` step (exclusive), files to `load` its
state from and `save` it to, and the step to `poison` with an image of NaN. Writes FILE.results: for each task the
loss of every step, the mean over all lanes, the norm of every gradient, and whether the step was applied.
"""

import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

from distrain import config, models
from distrain.execution.graphs import uses_graphs
from distrain.execution.precision import Autocast
from distrain.models.fusion import set_fused
from distrain.parallel.factory import open_strategy
from distrain.parallel.group import Group
from distrain.parallel.statistics import LaneStatistics

REQUIRED = [
    "run.name=task",
    "data.train=none",
    "data.val=none",
    "model.num_classes=5",
    "train.memory_format=contiguous",
    "train.dense_block=plain",
]


def synthetic_batch(step: int, lane: int, per_lane: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1000 * step + lane)
    labels = torch.randint(0, 5, (per_lane,), generator=generator)
    images = torch.randn(per_lane, 3, 16, 16, generator=generator)
    images[torch.arange(per_lane), labels % 3] += labels.view(-1, 1, 1) - 2.0
    return images, labels


def run_task(task: dict, group: Group) -> dict:
    settings = config.load(None, [*REQUIRED, *task["settings"]])
    torch.manual_seed(3)
    network = models.build(settings.model.name, 5, **settings.model.options).to(group.device)
    lanes, per_lane = group.lanes(settings.batch.lanes), settings.batch.per_lane
    statistics = LaneStatistics(network, group, settings.batch.lanes, metrics=("loss",))
    saved = torch.load(task["load"]) if task.get("load") else None
    example = synthetic_batch(0, 0, per_lane)[0].to(group.device)
    executed = Autocast(network, settings.train.precision, torch.contiguous_format)
    is_fused = settings.train.dense_block == "fused"
    set_fused(network, is_fused)
    flat = uses_graphs(settings, group, is_fused, print)
    strategy = open_strategy(settings, executed, group, settings.batch.lanes, example, saved, flat)

    losses, norms, applied = [], [], []
    for step in range(task["first"], task["last"]):
        statistics.begin_step()
        for number, lane in enumerate(lanes):
            images, labels = (tensor.to(group.device) for tensor in synthetic_batch(step, lane, per_lane))
            if step == task.get("poison"):
                images[0] = torch.nan
            torch.manual_seed(1000 * step + lane)
            with strategy.micro_batch(number):
                loss = F.cross_entropy(strategy.forward(images), labels)
                strategy.backward(loss)
            statistics.end_lane(loss=loss.detach())
        update = strategy.update(lr=settings.optimizer.lr)
        losses.append(statistics.end_step(update.applied)["loss"].item())
        norms.append(update.norm.item())
        applied.append(bool(update.applied))

    state = {name: tensor.clone() for name, tensor in strategy.state().items()}
    if group.is_main and task.get("save"):
        torch.save(state, task["save"])
    group.barrier()  # a later task may load that file on every rank
    return {"losses": losses, "norms": norms, "applied": applied}


def main() -> None:
    torch.set_num_threads(1)
    path = Path(sys.argv[1])
    with Group() as group:
        results = [run_task(task, group) for task in json.loads(path.read_text())]
        if group.is_main:
            path.with_suffix(".results").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
