"""The training loop."""

import logging
import time
from collections.abc import Iterator

import torch
from torch.nn import CrossEntropyLoss

from distrain import __version__, models
from distrain.checkpoint import Checkpointer, check_identity, weights_digest
from distrain.config import Config, fixed_settings
from distrain.data import index as data_index
from distrain.data.augment import draw_windows
from distrain.data.index import Index
from distrain.data.loader import Loader, Request, normalize
from distrain.data.loaders.torch import TorchLoader
from distrain.data.plan import Plan
from distrain.data.store import LocalStore
from distrain.errors import EXIT_DONE, EXIT_STOPPED, UserError
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
    plan = Plan(len(train_index), config.batch.lanes, config.batch.per_lane, config.train.epochs, config.run.seed)
    with Group() as group, StopRequest(config.run.folder) as stop:
        try:
            with Tracker(config, group.leads, plan.steps) as tracker:
                accuracy, digest = run_steps(config, plan, train_index, val_index, group, stop, tracker)
        except Stopped as stopped:
            tracker.say(f"stopped by {stopped}; all is saved, run the same command again to go on")
            group.barrier()
            stop.clear_file()
            return EXIT_STOPPED
        tracker.say(f"compare runs with: {tracker.how_to_look}")
        tracker.say(
            f"done: top-1 {accuracy.top1 / accuracy.images:.2%}  top-5 {accuracy.top5 / accuracy.images:.2%}  "
            f"of {accuracy.images:,} images  weights {digest}"
        )
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
    """The run itself: every step of `plan` that is not done yet. Returns the final accuracy and weights digest.

    Raises Stopped, with everything saved, once any rank was asked to stop.
    """
    device, lanes = group.device, group.lanes(config.batch.lanes)
    torch.use_deterministic_algorithms(config.train.deterministic)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=config.train.precision == "bf16")
    layout = torch.channels_last if config.train.channels_last else torch.contiguous_format

    torch.manual_seed(torch_seed(config.run.seed, Stream.INIT))
    network = models.build(config.model.name, config.model.num_classes, **config.model.options)
    network.to(device, memory_format=layout)
    criterion = CrossEntropyLoss(label_smoothing=config.loss.label_smoothing)
    statistics = LaneStatistics(network, group, config.batch.lanes, reported=2)
    strategy = DDP(network, build_optimizer(network, config.optimizer), group, config.batch.lanes)
    with autocast:
        blank = torch.zeros(config.batch.per_lane, 3, config.data.image_size, config.data.image_size, device=device)
        strategy.settle(blank.to(memory_format=layout))

    checkpoints = Checkpointer(config.run.folder / "checkpoints", group, config.checkpoint.keep)
    identity = fixed_settings(config) | {"data.train digest": train_index.digest}
    extra = {"identity": identity, "versions": {"distrain": __version__, "torch": torch.__version__}}
    start = 0
    if (snapshot := checkpoints.restore()) is not None:
        check_identity(snapshot.extra["identity"], identity)
        strategy.load_state(snapshot.tensors)
        start = snapshot.step
        tracker.say(f"resuming at step {start} of {plan.steps}")

    train_loader, val_loader = make_loader(config, train_index, group), make_loader(config, val_index, group)
    batches = train_loader.stream(train_requests(config, plan, train_index, lanes, start))
    evaluation_steps = {plan.steps} | {
        plan.step_at(times * config.evaluate.every_epochs)
        for times in range(1, int(config.train.epochs / config.evaluate.every_epochs) + 1)
    }
    agreement = Agreement(group)
    clock, clock_step = time.monotonic(), start

    def keep_going() -> bool:
        return not agreement.exchange(bool(stop))

    try:
        for step in range(start, plan.steps + 1):
            if step > start and (step % config.checkpoint.every_steps == 0 or step == plan.steps):
                checkpoints.save(step, strategy.state(), extra)
            if step in evaluation_steps:
                accuracy = evaluate(network, val_index, val_loader, config, group, keep_going)
                if accuracy is not None:
                    tracker.log(step, accuracy.metrics())
                clock, clock_step = time.monotonic(), step
            if step == plan.steps and accuracy is not None:
                break
            if not keep_going():
                checkpoints.save(step, strategy.state(), extra)
                raise Stopped(stop.reason or "a signal to another rank")

            lr = learning_rate(config.optimizer.lr, config.schedule, plan.epoch_at(step), config.train.epochs)
            statistics.begin_step()
            for number, lane in enumerate(lanes):
                images, labels = next(batches)
                images = normalize(images, config.data.mean, config.data.std).contiguous(memory_format=layout)
                torch.manual_seed(torch_seed(config.run.seed, Stream.FORWARD, step, lane))
                with strategy.lane(number):
                    with autocast:
                        logits = strategy.forward(images)
                        loss = criterion(logits.float(), labels)
                    strategy.backward(loss)
                hits = (logits.detach().argmax(dim=1) == labels).float().mean()
                statistics.end_lane(torch.stack([loss.detach(), hits]))
            strategy.update(lr)
            means = statistics.end_step()

            tracker.advance(step + 1)
            if (step + 1) % config.track.every_steps == 0 or step + 1 == plan.steps:
                loss_mean, top1 = means.tolist()
                now = time.monotonic()
                rate = (step + 1 - clock_step) * plan.batch / (now - clock)
                clock, clock_step = now, step + 1
                metrics = {"train/loss": loss_mean, "train/top1": top1, "train/lr": lr}
                tracker.log(step + 1, metrics | {"train/images_per_second": rate})
        return accuracy, weights_digest(strategy.state())
    finally:
        agreement.settle()
        batches.close()
        train_loader.close()
        val_loader.close()
        checkpoints.close()


def train_requests(config: Config, plan: Plan, index: Index, lanes: range, start: int) -> Iterator[Request]:
    """What this rank decodes: for every step from `start` on, the share of each of its lanes."""
    for step in range(start, plan.steps):
        for lane in lanes:
            ids, epochs = plan.lane_batch(step, lane)
            yield Request(
                ids,
                draw_windows(config.data, config.run.seed, epochs, ids, index.width[ids], index.height[ids]),
            )


def make_loader(config: Config, index: Index, group: Group) -> Loader:
    return TorchLoader(config.data, index, LocalStore(index), group.device)


def load_indexes(config: Config) -> tuple[Index, Index]:
    """The training and validation index. Raises UserError unless both know the classes the model is to learn."""
    train_index, val_index = data_index.load(config.data.train), data_index.load(config.data.val)
    if train_index.classes != val_index.classes:
        raise UserError(f"{config.data.val} has other classes than {config.data.train}; index both with one list")
    if len(train_index.classes) != config.model.num_classes:
        raise UserError(
            f"model.num_classes={config.model.num_classes}, but {config.data.train} has {len(train_index.classes)} "
            f"classes: set model.num_classes={len(train_index.classes)}"
        )
    return train_index, val_index
