"""The training loop."""

from collections.abc import Generator

import torch

from distrain.checkpoint import weights_digest
from distrain.config import Config
from distrain.data.loading.loader import Batch, normalize
from distrain.data.loading.setup import load_indexes, make_plan
from distrain.errors import EXIT_DONE, EXIT_STOPPED, Diverged, Stopped
from distrain.evaluate import Quality, top1_hits
from distrain.execution.numerics import configure_numerics
from distrain.failpoints import failpoint
from distrain.identity import check_resumable
from distrain.learner import Learner
from distrain.lifetime import stop_agent
from distrain.parallel.group import Group
from distrain.parallel.strategy import Update
from distrain.recipe.distillation import open_teacher
from distrain.recipe.mixing import mix_batch
from distrain.recipe.schedules import learning_rate
from distrain.resilience.attempt import Attempt
from distrain.resilience.rollback import record_rollback
from distrain.resilience.watchdog import Watchdog
from distrain.rng import Stream, torch_seed
from distrain.run import Run, Session, open_run, open_stop_request
from distrain.track import open_tracker


def train(config: Config) -> int:
    """Train as configured, resuming from the newest checkpoint if there is one. Returns the exit code.

    Raises UserError before any work if configuration, data and checkpoint do not belong together.
    """
    configure_numerics(config.train)
    train_index, val_index = load_indexes(config)
    teacher = open_teacher(config, train_index)
    plan = make_plan(config, train_index)
    patience = config.resilience.patience
    with (
        Group(patience=patience) as group,
        Watchdog(group, config.run.folder, patience) as watchdog,
        open_stop_request(config, group) as stop,
    ):
        initial = check_resumable(config, train_index, val_index, teacher, group)
        try:
            with (
                Attempt(config, group, watchdog) as attempt,
                open_tracker(config, group.is_main, plan.steps) as tracker,
                attempt.watched(),
            ):
                session = Session(
                    config=config, plan=plan, train_index=train_index, val_index=val_index,
                    group=group, stop=stop, tracker=tracker, attempt=attempt, initial=initial, teacher=teacher,
                )  # fmt: skip
                quality, digest = train_with_rollbacks(session)
        except Stopped as stopped:
            tracker.info(f"stopped by {stopped}; everything is saved, run the same command again to continue")
            stop.clear_file()
            if group.any(stop.ends_job):
                stop_agent()
            return EXIT_STOPPED
        tracker.info(tracker.view_hint)
        tracker.info(f"done: {quality}  weights {digest}")
        group.barrier()
    return EXIT_DONE


def train_with_rollbacks(session: Session) -> tuple[Quality, str]:
    """Train to the end. After a divergence, start over from the last checkpoint and skip the steps that led to it.

    Returns the final quality and the digest of the weights.
    """
    while True:
        try:
            with open_run(session) as run:
                return train_steps(run)
        except Diverged as diverged:
            record_rollback(session.config, session.group, diverged, session.tracker.info)


def train_steps(run: Run) -> tuple[Quality, str]:
    """Train the remaining steps, then save and validate. Returns the final quality and the weights' digest.

    Raises Stopped, with everything saved, once any rank was asked to stop; Diverged if training has to roll back.
    """
    learner, done = run.learner, run.plan.steps
    for step in run.steps():
        run.recompute_statistics_if_due(step)
        run.save_if_due(step)
        if run.validate_if_due(step):
            done = step
            break
        run.poll_stop_and_save(step)
        run.stop_if_due(step)
        failpoint("train.step", step)

        lr = learning_rate(run.config, run.plan.epoch_at(step))
        means, update = train_step(learner, step, run.batches, lr)
        learner.update_ema(step + 1, run.plan.step_at(run.config.ema.start_epoch))
        run.record_step(step + 1, lr, means, update)
    run.settle()
    run.recompute_statistics_if_due(done)
    run.save(done)
    quality = run.validate(done)
    run.checkpoints.wait_or_raise()
    return quality, weights_digest(learner.state())


def train_step(
    learner: Learner, step: int, batches: Generator[Batch, None, None], lr: float
) -> tuple[dict[str, torch.Tensor], Update]:
    """One update from one batch of every lane. Returns the means of `loss` and `top1` over all lanes, each float [],
    and the outcome of the update."""
    config, strategy, statistics = learner.config, learner.strategy, learner.statistics
    statistics.begin_step()
    for number, (lane, split) in enumerate(learner.micro_batches):
        batch = mix_batch(next(batches), config, step, lane, split)
        torch.manual_seed(torch_seed(config.run.seed, Stream.FORWARD, step, lane, split))
        with strategy.micro_batch(number):
            loss, top1 = learner.execute(compute_micro_batch, batch)
        statistics.end_lane(loss=loss, top1=top1)
    update = strategy.update(lr)
    return statistics.end_step(update.applied), update


def compute_micro_batch(learner: Learner, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Accumulate the gradients of a micro-batch. Returns its mean loss and the fraction of top-1 hits, each float [].
    Of multi-label data, a hit is an image whose likeliest class is one of its labels; of mixed images, a class counts
    by its fraction."""
    images = normalize(batch.images, learner.config.data.mean, learner.config.data.std)
    logits = learner.strategy.forward(images)
    loss = learner.loss(logits, batch)
    learner.strategy.backward(loss)
    return loss.detach(), top1_hits(logits.detach(), batch.labels).float().mean()
