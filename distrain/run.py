"""A run in training: its components, and what the training loop calls between steps."""

import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any

import torch

from distrain.checkpoint import Checkpointer, check_identity
from distrain.config import Config, changeable_settings
from distrain.data.index import Index
from distrain.data.loading.autotune import choose_loader
from distrain.data.loading.crashes import quarantine_crashing
from distrain.data.loading.loader import Batch, Loader
from distrain.data.loading.quarantine import Quarantine
from distrain.data.loading.requests import train_requests
from distrain.data.loading.setup import make_loader, make_quarantine
from distrain.data.sampling.plan import Plan
from distrain.data.storage.remote import check_store
from distrain.errors import Stopped
from distrain.evaluate import Quality, evaluate
from distrain.failpoints import failpoint
from distrain.identity import format_versions, record_identity, run_manifest
from distrain.initial import InitialWeights
from distrain.learner import Learner, build_network, open_learner
from distrain.outcomes import LateReader, Outcome
from distrain.parallel.group import AsyncFlags, Group
from distrain.parallel.strategy import State, Update
from distrain.recipe.distillation import Teacher
from distrain.recipe.early_stopping import EarlyStopping
from distrain.recipe.losses import loss_name
from distrain.recipe.mixing import mix_batch
from distrain.recipe.sanity import SanityCheck, guessing_loss
from distrain.resilience.attempt import Attempt
from distrain.resilience.divergence import DivergenceDetector
from distrain.resilience.rollback import load_skipped_steps
from distrain.resilience.stopping import StopRequest
from distrain.rng import Stream, torch_seed
from distrain.track import Tracker

_SINCE_REPORT = "since_report"  # in a checkpoint's manifest
_MEANS = ("train/loss", "train/top1")


@dataclass(frozen=True, kw_only=True)
class Session:
    """What one start of a run keeps across rollbacks."""

    config: Config
    plan: Plan
    train_index: Index
    val_index: Index
    group: Group
    stop: StopRequest
    tracker: Tracker
    attempt: Attempt
    initial: InitialWeights | None
    """The weights to start from, if model.init names any."""
    teacher: Teacher | None
    """The classifier to learn from, if distill.teacher names any."""


@dataclass(frozen=True, kw_only=True)
class Run(Session):
    """A run from a restored state on. Every rank has one and calls its methods at the same steps."""

    start: int
    """Number of updates that are already done."""
    skipped_steps: set[int]
    """Steps that rollbacks have excluded."""
    validation_steps: set[int]
    """Numbers of updates after which the network is validated; includes the end of the run."""
    manifest: dict[str, Any]
    """What every checkpoint records about the run: format, identity, versions."""
    learner: Learner
    checkpoints: Checkpointer
    batches: Generator[Batch, None, None]
    """Training micro-batches of this rank, from step `start` on."""
    loader_name: str
    """Which loader decodes the images."""
    val_loader: Loader
    quarantines: tuple[Quarantine, Quarantine]
    flags: AsyncFlags
    outcomes: LateReader
    divergence: DivergenceDetector
    early_stopping: EarlyStopping
    sanity: SanityCheck
    progress: "Progress"

    def steps(self) -> Iterator[int]:
        """Yield the remaining steps."""
        return (step for step in range(self.start, self.plan.steps) if step not in self.skipped_steps)

    def recompute_statistics_if_due(self, step: int) -> None:
        """Recompute the running statistics after `step` updates, if a validation follows, as
        evaluate.precise_bn_steps asks for."""
        if not self._is_validation_due(step):
            return
        last = range(max(0, step - self.config.evaluate.precise_bn_steps), step)
        if steps := [one for one in last if one not in self.skipped_steps]:
            self.learner.recompute_statistics(self._batches_again(steps, step))
            self.progress.restart_clock(step)

    def _batches_again(self, steps: Sequence[int], now: int) -> Iterator[Batch]:
        """Yield this rank's micro-batches of earlier steps as the network got them. `now`: the number of updates."""
        config, learner, lanes = self.config, self.learner, self.group.lanes(self.config.batch.lanes)
        requests = train_requests(config, self.plan, self.train_index, lanes, steps[0], self.skipped_steps)
        requests = islice(requests, len(steps) * len(lanes))
        opened = partial(make_loader, config, self.loader_name, self.train_index, self.quarantines[0])
        with (
            closing(opened(self.group.device, checked=True, recorded=False)) as loader,
            closing(split_batches(loader.stream(requests), learner.splits)) as batches,
        ):
            for step in steps:
                for lane, split in learner.micro_batches:
                    self.attempt.heartbeat("statistics", now)
                    batch = mix_batch(next(batches), config, step, lane, split)
                    torch.manual_seed(torch_seed(config.run.seed, Stream.FORWARD, step, lane, split))
                    yield batch

    def save_if_due(self, step: int) -> None:
        """Save a checkpoint if one is due, by steps or by minutes."""
        if self.checkpoints.is_due(step, self.progress.overdue):
            self.save(step)

    def save(self, step: int) -> None:
        """Save the state after `step` updates in the background."""
        self.checkpoints.save(step, self.learner.state(), self._extra)
        self.tracker.log(step, {"checkpoint/stall_seconds": self.checkpoints.stall})

    def validate_if_due(self, step: int) -> bool:
        """Validate if evaluate.every_epochs have passed, or train.stop_epoch. Returns whether the run ends early."""
        if not self._is_validation_due(step):
            return False
        is_over = self.early_stopping.observe(step, self.validate(step))
        if is_over:
            self.tracker.info(f"ends early: no new best in {self.config.evaluate.patience} validations")
        return is_over

    def validate(self, step: int) -> Quality:
        """Measure and report the quality after `step` updates, and save the checkpoint if it is the best so far.

        Raises Stopped, with everything saved, once any rank was asked to stop.
        """
        self.settle()
        before_batch = partial(self._before_validation_batch, step)
        network = self.learner.eval_model
        quality = evaluate(network, self.val_index, self.val_loader, self.config, self.group, before_batch)
        self.tracker.log(step, quality.metrics())
        self.sanity.check_validation(quality)
        if self.checkpoints.is_best(quality.score):
            self.checkpoints.save(step, self.learner.state(), self._extra, best=quality.score)
        self.progress.restart_clock(step)
        return quality

    def poll_stop_and_save(self, step: int) -> None:
        """Exchange the flags of all ranks: whether to stop, and whether a checkpoint is overdue.

        Raises Stopped, with everything saved, once any rank was asked to stop.
        """
        self.attempt.heartbeat("step-or-validation", step)
        is_overdue = self.group.is_main and self.checkpoints.is_overdue()
        stopping, self.progress.overdue = self.flags.exchange(bool(self.stop), is_overdue)
        if stopping:
            self._save_and_stop(step, self.stop.reason or "a signal to another rank")

    def stop_if_due(self, step: int) -> None:
        """Raises Stopped, with everything saved, after train.stop_epoch epochs."""
        if step >= step_to_stop(self.config, self.plan):
            self.stop.reason = f"train.stop_epoch={self.config.train.stop_epoch:g}"
            self._save_and_stop(step, self.stop.reason)

    def _save_and_stop(self, step: int, reason: str) -> None:
        self.settle()
        self.checkpoints.save(step, self.learner.state(), self._extra)
        self.checkpoints.wait_or_raise()
        raise Stopped(reason)

    def record_step(self, step: int, lr: float, means: Mapping[str, torch.Tensor], update: Update) -> None:
        """Record that `step` updates are done, and settle the step before.

        Raises Diverged if training has diverged at the step before.
        """
        self.attempt.record_step(step)
        self.tracker.advance(step)
        self.settle()
        self.checkpoints.start_write()  # now that all that was reported before it can be flushed with it
        metrics = {f"train/{name}": mean for name, mean in means.items()} | {"train/grad_norm": update.norm}
        known = {"train/lr": lr}
        if self._is_report_due(step):
            known["train/images_per_second"] = self.progress.images_per_second(step, self.plan.batch)
        self.outcomes.submit(step, metrics, update.applied, known)

    def settle(self) -> None:
        """Report the outcome of the last recorded step, if a report is due and it has not been settled yet.

        Raises Diverged if training has diverged there.
        """
        outcome = self.outcomes.read()
        if outcome is None:
            return
        self.progress.count(outcome)
        if self._is_report_due(outcome.step):
            self._report(outcome)
        self.divergence.check(outcome)

    def _report(self, outcome: Outcome) -> None:
        values = outcome.metrics | self.progress.take_means()
        self.sanity.check_report(outcome.step, values)
        if self.group.is_main:  # no other rank looks at the list of bad samples
            if self.progress.skipped_updates:
                values["train/skipped_updates"] = self.progress.skipped_updates
            if bad := sum(quarantine.count() for quarantine in self.quarantines):
                values["data/quarantined"] = bad
            self.tracker.log(outcome.step, values)

    def _extra(self) -> dict[str, Any]:
        return self.manifest | {_SINCE_REPORT: dict(self.progress.since_report)}

    def _is_validation_due(self, step: int) -> bool:
        return step in self.validation_steps or step == step_to_stop(self.config, self.plan)

    def _is_report_due(self, step: int) -> bool:
        return step % self.config.track.every_steps == 0 or step == self.plan.steps

    def _before_validation_batch(self, step: int) -> None:
        failpoint("evaluate.batch", step)
        self.poll_stop_and_save(step)


@dataclass
class Progress:
    """What changes from step to step besides the learner."""

    skipped_updates: int = 0
    since_report: dict[str, list[float]] = field(default_factory=dict)
    """The metrics that are reported as means: the sum over the steps since the last report, and their number."""
    overdue: bool = False
    """Whether checkpoint.every_minutes asks for a checkpoint; equal on all ranks."""
    _step: int = 0
    _time: float = field(default_factory=time.monotonic)

    def count(self, outcome: Outcome) -> None:
        """Count a step."""
        self.skipped_updates += not outcome.applied
        for name in _MEANS:
            total, steps = self.since_report.get(name, (0.0, 0))
            self.since_report[name] = [total + outcome.metrics[name], steps + 1]

    def take_means(self) -> dict[str, float]:
        """The means since the last call."""
        means = {name: total / steps for name, (total, steps) in self.since_report.items()}
        self.since_report = {}
        return means

    def restart_clock(self, step: int) -> None:
        """Exclude what happened since the last measurement from the throughput."""
        self._step, self._time = step, time.monotonic()

    def images_per_second(self, step: int, batch: int) -> float:
        """The throughput of all ranks since the last call."""
        rate = (step - self._step) * batch / (time.monotonic() - self._time)
        self.restart_clock(step)
        return rate


@contextmanager
def open_run(session: Session) -> Iterator[Run]:
    """Restore the newest checkpoint, if there is one, and open loaders and checkpoints.

    Raises UserError if configuration, data and checkpoint do not belong together.
    """
    config, group, attempt, info = session.config, session.group, session.attempt, session.tracker.info
    splits = (("train", session.train_index), ("val", session.val_index))
    quarantine_crashing(config, splits, group.device)
    group.barrier()  # what any rank has found is in the file
    quarantines = [make_quarantine(config, index, split) for split, index in splits]
    name = group.on_main(partial(choose_loader, config, session.plan, session.train_index, group.device, info))
    with ExitStack() as stack:
        folder = config.run.folder / "checkpoints"
        checks = attempt.token, attempt.require_current, session.tracker.sync
        checkpoints = stack.enter_context(closing(Checkpointer(folder, group, config.checkpoint, *checks)))
        for _, index in splits:
            group.on_node_mains(partial(check_store, index))
        train_loader, val_loader = (
            stack.enter_context(closing(make_loader(config, name, index, quarantine, group.device, checked=True)))
            for (_, index), quarantine in zip(splits, quarantines, strict=True)
        )
        manifest = run_manifest(config, session.train_index, session.val_index, session.initial, session.teacher)
        attempt.heartbeat("restore", 0)
        start, saved, since_report = restore(session, checkpoints, manifest)
        learner = make_learner(session, saved)
        group.on_main(partial(begin_records, session, manifest))
        if saved is None and session.initial is not None:  # so that a restart does not need the source again
            checkpoints.save(0, learner.state(), lambda: manifest)
            checkpoints.wait_or_raise()
        del saved  # as large as the learner's own state
        attempt.restored(start)

        skipped_steps, lanes = load_skipped_steps(config, group), group.lanes(config.batch.lanes)
        requests = train_requests(config, session.plan, session.train_index, lanes, start, skipped_steps)
        batches = stack.enter_context(closing(split_batches(train_loader.stream(requests), learner.splits)))
        flags = AsyncFlags(group)
        stack.callback(flags.wait)
        progress = Progress(since_report=since_report)
        validated = session.plan.steps_every(config.evaluate.every_epochs)
        progress.restart_clock(start)
        yield Run(
            **vars(session),
            start=start,
            skipped_steps=skipped_steps,
            validation_steps=validated,
            manifest=manifest,
            learner=learner,
            checkpoints=checkpoints,
            batches=batches,
            loader_name=name,
            val_loader=val_loader,
            quarantines=(quarantines[0], quarantines[1]),
            flags=flags,
            outcomes=LateReader(group.device),
            divergence=DivergenceDetector(config.resilience),
            sanity=make_sanity_check(session),
            early_stopping=EarlyStopping(config.evaluate, config.run.folder, validated - skipped_steps, group),
            progress=progress,
        )


def restore(
    session: Session, checkpoints: Checkpointer, manifest: dict[str, Any]
) -> tuple[int, State | None, dict[str, list[float]]]:
    """Load the newest checkpoint, if there is one. Returns the number of updates done, the state after them, and
    Progress.since_report.

    Raises UserError if the checkpoint belongs to another run.
    """
    snapshot, config, info = checkpoints.restore(), session.config, session.tracker.info
    if snapshot is None:
        return 0, None, {}
    check_identity(snapshot.extra, manifest, changeable_settings(config), config.run.change)
    info(f"resuming at step {snapshot.step} of {session.plan.steps}")
    if snapshot.extra["versions"] != manifest["versions"]:
        info(f"saved by {format_versions(snapshot.extra)}, resumed by {format_versions(manifest)}")
    return snapshot.step, snapshot.tensors, snapshot.extra.get(_SINCE_REPORT, {})


def make_sanity_check(session: Session) -> SanityCheck:
    """What warns if the run is broken."""
    index, plan = session.train_index, session.plan
    loss = None
    if session.teacher is None:
        loss = guessing_loss(loss_name(session.config.loss, index), len(index.classes))
    first = plan.step_at(1.0 + session.config.schedule.warmup_epochs)
    return SanityCheck(len(index.classes), first, loss, session.tracker.info)


def step_to_stop(config: Config, plan: Plan) -> int:
    """Number of updates after which this start ends: those of train.stop_epoch epochs, or of all."""
    epochs = config.train.stop_epoch
    return min(plan.step_at(epochs), plan.steps) if epochs else plan.steps


def open_stop_request(config: Config, group: Group) -> StopRequest:
    """The stop request of this rank. Only the main rank looks for the file, and all ranks learn of it."""
    return StopRequest(config.run.folder if group.is_main else None, config.train.max_minutes)


def make_learner(session: Session, saved: State | None) -> Learner:
    """Build the learner from a saved state, from the weights that model.init names, or from random ones."""
    config, group = session.config, session.group
    network = build_network(config, group.device)
    if saved is None and session.initial is not None:
        session.initial.load_into(network, group, session.tracker.info)
    return open_learner(config, group, network, saved, session.tracker.info, session.train_index, session.teacher)


def begin_records(session: Session, manifest: dict[str, Any]) -> None:
    """Record what the run is, and begin to report.

    Raises UserError or TemporaryError if the run's folder cannot be written.
    """
    record_identity(session.config.run.folder, manifest)
    initial = session.initial
    tags = {} if initial is None else {"distrain.init": initial.source, "distrain.init_sha256": initial.sha256}
    session.tracker.begin(tags)


def split_batches(batches: Generator[Batch, None, None], splits: int) -> Generator[Batch, None, None]:
    """Split each batch into `splits` smaller ones."""
    with closing(batches):
        for images, labels in batches:
            yield from map(Batch, images.chunk(splits), labels.chunk(splits))
