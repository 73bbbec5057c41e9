"""The training loop."""

import logging
import time
from collections.abc import Iterator
from contextlib import closing

import torch
from torch import nn
from torch.nn import CrossEntropyLoss

from distrain import __version__, models
from distrain.checkpoint import Checkpointer, check_identity, weights_digest
from distrain.config import Config, fixed_settings
from distrain.data.feed import (
    choose_loader,
    load_indexes,
    make_loader,
    make_plan,
    make_quarantine,
    train_requests,
)
from distrain.data.index import Index
from distrain.data.loader import Batch, normalize
from distrain.data.order import resolve_shuffle
from distrain.data.plan import Plan
from distrain.errors import EXIT_DONE, EXIT_STOPPED
from distrain.evaluate import Accuracy, evaluate
from distrain.parallel.ddp import DDP
from distrain.parallel.group import Agreement, Group
from distrain.parallel.statistics import LaneStatistics
from distrain.recipe.optimizers import build_optimizer
from distrain.recipe.schedules import learning_rate
from distrain.resilience.stopping import Stopped, StopRequest
from distrain.rng import Stream, torch_seed
from distrain.track import Tracker


def train(config: Config) -> int:
    """Train as configured, from the newest checkpoint on if there is one. Returns the exit code.

    Raises UserError before any work when configuration, data and checkpoint do not fit one another.
    """
    logging.basicConfig(format="distrain: %(message)s", level=logging.WARNING)
    train_index, val_index = load_indexes(config)
    plan = make_plan(config, train_index)
    with Group() as group, StopRequest(config.run.folder) as stop:
        try:
            with Tracker(config, group.leads, plan.steps) as tracker:
                accuracy, digest = run_steps(config, plan, train_index, val_index, group, stop, tracker)
        except Stopped as stopped:
            tracker.say(f"stopped by {stopped}; all is saved, run the same command again to go on")
            group.barrier()
            stop.clear_file()
            return EXIT_STOPPED
        tracker.say(tracker.how_to_look)
        tracker.say(f"done: {accuracy}  weights {digest}")
        group.barrier()
    return EXIT_DONE


def run_steps(
    config: Config,
    plan: Plan,
    train_index: Index,
    val_index: Index,
    group: Group,
    stop: StopRequest,
    tracker: Tracker,
) -> tuple[Accuracy, str]:
    """Every step of `plan` that is not done yet. Returns the final accuracy and the digest of the weights.

    Raises Stopped, with everything saved, once any rank was asked to stop.
    """
    lanes = group.lanes(config.batch.lanes)
    network = build_network(config, group.device)
    statistics = LaneStatistics(network, group, config.batch.lanes, reported=2)
    strategy = DDP(network, build_optimizer(network, config.optimizer), group, config.batch.lanes)
    criterion = CrossEntropyLoss(label_smoothing=config.loss.label_smoothing)
    with autocast(config, group.device):
        strategy.settle(blank_images(config, group.device))

    agreement = Agreement(group)

    def stop_if_asked() -> None:
        if agreement.exchange(bool(stop)):
            raise Stopped(stop.reason or "a signal to another rank")

    quarantine, val_quarantine = (
        make_quarantine(config, index, split) for split, index in (("train", train_index), ("val", val_index))
    )
    loader = group.from_leader(
        choose_loader(config, plan, train_index, group.device, tracker.say) if group.leads else None
    )
    with (
        closing(Checkpointer(config.run.folder / "checkpoints", group, config.checkpoint.keep)) as checkpoints,
        closing(make_loader(config, loader, train_index, quarantine, group.device)) as train_loader,
        closing(make_loader(config, loader, val_index, val_quarantine, group.device)) as val_loader,
    ):
        identity = fixed_settings(config) | {
            "data.train digest": train_index.digest,
            "data.shuffle": resolve_shuffle(config.data, train_index),
        }
        extra = {"identity": identity, "versions": {"distrain": __version__, "torch": torch.__version__}}
        start = 0
        if (snapshot := checkpoints.restore()) is not None:
            check_identity(snapshot.extra["identity"], identity)
            strategy.load_state(snapshot.tensors)
            start = snapshot.step
            tracker.say(f"resuming at step {start} of {plan.steps}")

        evaluation_steps = plan.steps_every(config.evaluate.every_epochs)
        batches = train_loader.stream(train_requests(config, plan, train_index, lanes, start))
        speed = Speed(plan.batch, start)
        try:
            for step in range(start, plan.steps + 1):
                if step == plan.steps or (step % config.checkpoint.every_steps == 0 and step > start):
                    checkpoints.save(step, strategy.state(), extra)
                if step in evaluation_steps:
                    accuracy = evaluate(network, val_index, val_loader, config, group, stop_if_asked)
                    tracker.log(step, accuracy.metrics())
                    speed.restart(step)
                if step == plan.steps:
                    return accuracy, weights_digest(strategy.state())
                stop_if_asked()

                lr = learning_rate(config.optimizer.lr, config.schedule, plan.epoch_at(step), config.train.epochs)
                means = train_step(config, step, lanes, batches, strategy, criterion, statistics, lr)

                tracker.advance(step + 1)
                if (step + 1) % config.track.every_steps == 0 or step + 1 == plan.steps:
                    loss, top1 = means.tolist()
                    metrics = {"train/loss": loss, "train/top1": top1, "train/lr": lr}
                    metrics["train/images_per_second"] = speed.measure(step + 1)
                    if bad := quarantine.count() + val_quarantine.count():
                        metrics["data/quarantined"] = bad
                    tracker.log(step + 1, metrics)
        except Stopped:
            checkpoints.save(step, strategy.state(), extra)
            raise
        finally:
            agreement.settle()
            batches.close()
    raise AssertionError("the last step returns")


def train_step(
    config: Config,
    step: int,
    lanes: range,
    batches: Iterator[Batch],
    strategy: DDP,
    criterion: nn.Module,
    statistics: LaneStatistics,
    lr: float,
) -> torch.Tensor:
    """One update from one micro-batch of every lane. Returns loss and top-1 accuracy, means over all lanes. [2]"""
    statistics.begin_step()
    for number, lane in enumerate(lanes):
        batch = next(batches)
        images = normalize(batch.images, config.data.mean, config.data.std)
        torch.manual_seed(torch_seed(config.run.seed, Stream.FORWARD, step, lane))
        with strategy.lane(number):
            with autocast(config, images.device):
                logits = strategy.forward(images.contiguous(memory_format=memory_format(config)))
                loss = criterion(logits.float(), batch.labels)
            strategy.backward(loss)
        hits = (logits.detach().argmax(dim=1) == batch.labels).float().mean()
        statistics.end_lane(torch.stack([loss.detach(), hits]))
    strategy.update(lr)
    return statistics.end_step()


class Speed:
    """Images per second since the last measurement, over all ranks."""

    def __init__(self, batch: int, step: int) -> None:
        self._batch = batch
        self.restart(step)

    def restart(self, step: int) -> None:
        """Leave out what happened since the last measurement."""
        self._step, self._time = step, time.monotonic()

    def measure(self, step: int) -> float:
        rate = (step - self._step) * self._batch / (time.monotonic() - self._time)
        self.restart(step)
        return rate


def build_network(config: Config, device: torch.device) -> nn.Module:
    """The configured network with its initial weights, the same on every rank."""
    torch.use_deterministic_algorithms(config.train.deterministic)
    torch.manual_seed(torch_seed(config.run.seed, Stream.INIT))
    network = models.build(config.model.name, config.model.num_classes, **config.model.options)
    return network.to(device).to(memory_format=memory_format(config))


def memory_format(config: Config) -> torch.memory_format:
    return torch.channels_last if config.train.channels_last else torch.contiguous_format


def autocast(config: Config, device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=config.train.precision == "bf16")


def blank_images(config: Config, device: torch.device) -> torch.Tensor:
    """A micro-batch as the network gets it, but black."""
    size = config.data.image_size
    images = torch.zeros(config.batch.per_lane, 3, size, size, device=device)
    return images.contiguous(memory_format=memory_format(config))
