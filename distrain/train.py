"""The training loop."""

import logging
import time
from collections.abc import Generator
from contextlib import closing

import torch

from distrain import __version__
from distrain.checkpoint import Checkpointer, check_identity, newest_step, weights_digest
from distrain.config import Config, changeable_settings, fixed_settings
from distrain.data.index import Index
from distrain.data.loading.feed import (
    choose_loader,
    load_indexes,
    make_loader,
    make_plan,
    make_quarantine,
    train_requests,
)
from distrain.data.loading.loader import Batch, normalize
from distrain.data.sampling.order import resolve_shuffle
from distrain.data.sampling.plan import Plan
from distrain.decisions import RunDecisions
from distrain.errors import EXIT_DONE, EXIT_STOPPED, UserError
from distrain.evaluate import Accuracy, evaluate
from distrain.learner import Learner
from distrain.parallel.group import AsyncFlags, Group
from distrain.parallel.strategy import Update
from distrain.recipe.schedules import learning_rate
from distrain.resilience.attempt import Attempt
from distrain.resilience.divergence import Diverged, Divergence
from distrain.resilience.stopping import Stopped, StopRequest
from distrain.rng import Stream, torch_seed
from distrain.track import Tracker

OMITTED = "skipped_steps"  # among the choices of a run: windows of steps, [first, end]


def train(config: Config) -> int:
    """Train as configured, from the newest checkpoint on if there is one. Returns the exit code.

    Raises UserError before any work when configuration, data and checkpoint do not fit one another.
    """
    logging.basicConfig(format="distrain: %(message)s", level=logging.WARNING)
    train_index, val_index = load_indexes(config)
    plan = make_plan(config, train_index)
    with Group() as group, StopRequest(config.run.folder, config.train.max_minutes) as stop:
        try:
            with (
                Tracker(config, group.is_main, plan.steps) as tracker,
                Attempt(config, group) as attempt,
            ):
                while True:
                    try:
                        accuracy, digest = run_steps(
                            config, plan, train_index, val_index, group, stop, tracker, attempt
                        )
                        break
                    except Diverged as diverged:
                        go_back(config, group, diverged, tracker)
        except Stopped as stopped:
            tracker.info(f"stopped by {stopped}; all is saved, run the same command again to go on")
            group.barrier()
            stop.clear_file()
            return EXIT_STOPPED
        tracker.info(tracker.view_hint)
        tracker.info(f"done: {accuracy}  weights {digest}")
        group.barrier()
    return EXIT_DONE


def go_back(config: Config, group: Group, diverged: Diverged, tracker: Tracker) -> None:
    """Note that the steps from the last checkpoint up to where training diverged are to be left out.

    Raises UserError if that has happened too often.
    """
    decisions = RunDecisions(config.run.folder)
    windows = group.broadcast(decisions.get(OMITTED, list) if group.is_main else None)
    if len(windows) >= config.resilience.rollbacks:
        raise UserError(
            f"training diverged {len(windows) + 1} times, more than resilience.rollbacks="
            f"{config.resilience.rollbacks} allows: {diverged}; try a lower optimizer.lr or optimizer.clip_norm=1"
        )
    if group.is_main:
        start = newest_step(config.run.folder / "checkpoints")
        decisions.set(OMITTED, [*windows, [start, diverged.step + 1]])
        tracker.info(f"{diverged}: going back to step {start}, and on from there at step {diverged.step + 1}")
    group.barrier()


def load_skipped_steps(config: Config, group: Group) -> set[int]:
    """The steps that are left out because training diverged in them."""
    windows = group.broadcast(RunDecisions(config.run.folder).get(OMITTED, list) if group.is_main else None)
    return {step for first, end in windows for step in range(first, end)}


def run_steps(
    config: Config,
    plan: Plan,
    train_index: Index,
    val_index: Index,
    group: Group,
    stop: StopRequest,
    tracker: Tracker,
    attempt: Attempt,
) -> tuple[Accuracy, str]:
    """Every step of `plan` that is not done yet. Returns the final accuracy and the digest of the weights.

    Raises Stopped, with everything saved, once any rank was asked to stop.
    """
    quarantine, val_quarantine = (
        make_quarantine(config, index, split) for split, index in (("train", train_index), ("val", val_index))
    )
    loader = group.broadcast(
        choose_loader(config, plan, train_index, group.device, tracker.info) if group.is_main else None
    )
    with (
        closing(Checkpointer(config.run.folder / "checkpoints", group, config.checkpoint, attempt)) as checkpoints,
        closing(make_loader(config, loader, train_index, quarantine, group.device)) as train_loader,
        closing(make_loader(config, loader, val_index, val_quarantine, group.device)) as val_loader,
    ):
        identity = fixed_settings(config) | {
            "data.train digest": train_index.digest,
            "data.shuffle": resolve_shuffle(config.data, train_index),
        }
        extra = {"identity": identity, "versions": {"distrain": __version__, "torch": torch.__version__}}
        start, saved = 0, None
        attempt.moves("restore", 0)
        if (snapshot := checkpoints.restore()) is not None:
            check_identity(snapshot.extra["identity"], identity, changeable_settings(config), config.run.change)
            start, saved = snapshot.step, snapshot.tensors
            tracker.info(f"resuming at step {start} of {plan.steps}")
        learner = Learner(config, group, saved, tracker.info)
        attempt.restored(start)
        agreement = AsyncFlags(group)

        def heed_wishes() -> bool:
            """Stop if any rank was asked to; return whether a checkpoint is overdue."""
            attempt.moves("step-or-validation", step)
            stopping, saving = agreement.exchange(bool(stop), group.is_main and checkpoints.is_overdue())
            if stopping:
                raise Stopped(stop.reason or "a signal to another rank")
            return saving

        def between_batches() -> None:
            attempt.strike("evaluate", step)
            heed_wishes()

        evaluation_steps = plan.steps_every(config.evaluate.every_epochs)
        skipped_steps, lanes = load_skipped_steps(config, group), group.lanes(config.batch.lanes)
        requests = train_requests(config, plan, train_index, lanes, start, skipped_steps)
        requests = attempt.faults.watch(requests, start, len(lanes))
        batches = cut(train_loader.stream(requests), learner.parts)
        divergence = Divergence(config.resilience)
        speed = Speed(plan.batch, start)
        skipped = torch.zeros((), dtype=torch.int64, device=group.device)
        overdue = False
        try:
            for step in (step for step in range(start, plan.steps + 1) if step not in skipped_steps):
                if step == plan.steps or checkpoints.is_due(step, overdue):
                    checkpoints.save(step, learner.state(), extra)
                    tracker.log(step, {"checkpoint/stall_seconds": checkpoints.stall})
                if step in evaluation_steps:
                    accuracy = evaluate(learner.eval_model, val_index, val_loader, config, group, between_batches)
                    tracker.log(step, accuracy.metrics())
                    if checkpoints.note_best(step, accuracy.top1 / accuracy.images):
                        checkpoints.save(step, learner.state(), extra)
                    speed.restart(step)
                if step == plan.steps:
                    checkpoints.require()
                    return accuracy, weights_digest(learner.state())
                overdue = heed_wishes()
                attempt.strike("step", step)
                attempt.faults.poison(learner.strategy.network, step)

                lr = learning_rate(config.optimizer.lr, config.schedule, plan.epoch_at(step), config.train.epochs)
                means, update = train_step(learner, step, batches, lr)
                learner.update_average(step + 1)
                skipped += ~update.applied
                divergence.see(step, means[0], update.applied)

                attempt.has_done(step + 1)
                tracker.advance(step + 1)
                if (step + 1) % config.track.every_steps == 0 or step + 1 == plan.steps:
                    loss, top1 = means.tolist()
                    metrics = {"train/loss": loss, "train/top1": top1, "train/lr": lr}
                    metrics["train/grad_norm"] = update.norm.item()
                    metrics["train/images_per_second"] = speed.measure(step + 1)
                    if times := skipped.item():
                        metrics["train/skipped_updates"] = times
                    if bad := quarantine.count() + val_quarantine.count():
                        metrics["data/quarantined"] = bad
                    tracker.log(step + 1, metrics)
        except Stopped:
            checkpoints.save(step, learner.state(), extra)
            checkpoints.require()
            raise
        finally:
            agreement.wait()
            batches.close()
    raise AssertionError("the last step returns")


def train_step(
    learner: Learner, step: int, batches: Generator[Batch, None, None], lr: float
) -> tuple[torch.Tensor, Update]:
    """One update from one batch of every lane. Returns loss and top-1 accuracy, means over all lanes [2], and what
    came of the update."""
    config, strategy, statistics = learner.config, learner.strategy, learner.statistics
    statistics.begin_step()
    for number, (lane, part) in enumerate(learner.micro_batches):
        batch = next(batches)
        images = normalize(batch.images, config.data.mean, config.data.std)
        torch.manual_seed(torch_seed(config.run.seed, Stream.FORWARD, step, lane, part))
        with strategy.micro_batch(number):
            logits = strategy.forward(images.contiguous(memory_format=learner.memory_format))
            loss = learner.criterion(logits, batch.labels)
            strategy.backward(loss)
        hits = (logits.detach().argmax(dim=1) == batch.labels).float().mean()
        statistics.end_lane(torch.stack([loss.detach(), hits]))
    update = strategy.update(lr)
    return statistics.end_step(update.applied), update


def cut(batches: Generator[Batch, None, None], parts: int) -> Generator[Batch, None, None]:
    """Each batch as so many smaller ones."""
    with closing(batches):
        for images, labels in batches:
            yield from map(Batch, images.chunk(parts), labels.chunk(parts))


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
