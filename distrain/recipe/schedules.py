"""The learning rate as a function of the position in the run."""

import math
from collections.abc import Callable

from distrain.config import Config, ScheduleConfig


def learning_rate(config: Config, epoch: float) -> float:
    """Return the learning rate of the step that starts at `epoch`, a fraction within a run of train.epochs."""
    return peak_rate(config) * relative_rate(config.schedule, epoch, config.train.epochs)


def peak_rate(config: Config) -> float:
    """optimizer.lr, scaled by the global batch if optimizer.lr_batch is set (Goyal et al. 2017, section 2.1)."""
    batch = config.optimizer.lr_batch
    return config.optimizer.lr * (config.batch.size / batch if batch else 1.0)


def relative_rate(schedule: ScheduleConfig, epoch: float, epochs: float) -> float:
    """Return the learning rate at `epoch` of `epochs` as a fraction of its peak.

    It rises linearly from warmup_factor (Goyal et al. 2017, section 2.2), in one_cycle by half a cosine, while the
    shape or after which it begins, as schedule.warmup says.
    """
    if schedule.per == "epoch":
        epoch = math.floor(epoch)
    warmup, factor = schedule.warmup_epochs, 1.0
    if epoch < warmup:
        rise = epoch / warmup
        if schedule.name == "one_cycle":
            rise = 1 - _half_cosine(rise)
        factor = schedule.warmup_factor + (1 - schedule.warmup_factor) * rise
    if schedule.warmup == "before" or schedule.name == "one_cycle":
        epoch, epochs = max(0.0, epoch - warmup), epochs - warmup
    return factor * _SHAPES[schedule.name](schedule, epoch, epochs)


def _half_cosine(progress: float) -> float:
    """From 1 to 0."""
    return 0.5 * (1 + math.cos(math.pi * progress))


def _progress(epoch: float, epochs: float) -> float:
    """The fraction that is done; the last step of a run may start after its last epoch."""
    return min(1.0, epoch / epochs) if epochs else 0.0


def _down_to(schedule: ScheduleConfig, remaining: float) -> float:
    return schedule.final_factor + (1 - schedule.final_factor) * remaining


def _cosine(schedule: ScheduleConfig, epoch: float, epochs: float) -> float:
    """Loshchilov and Hutter 2017, without restarts."""
    return _down_to(schedule, _half_cosine(_progress(epoch, epochs)))


def _restarts(schedule: ScheduleConfig, epoch: float, epochs: float) -> float:
    """Loshchilov and Hutter 2017, section 3: cycle_epochs is T_0, cycle_factor T_mult."""
    length = schedule.cycle_epochs
    while epoch >= length:
        epoch, length = epoch - length, length * schedule.cycle_factor
    return _down_to(schedule, _half_cosine(epoch / length))


def _multi_step(schedule: ScheduleConfig, epoch: float, epochs: float) -> float:
    return schedule.gamma ** sum(epoch >= milestone for milestone in schedule.milestones)


_SHAPES: dict[str, Callable[[ScheduleConfig, float, float], float]] = {
    "cosine": _cosine,
    "one_cycle": _cosine,  # Smith and Topin 2018, in the form of fastai: both halves are cosines
    "restarts": _restarts,
    "constant": lambda schedule, epoch, epochs: 1.0,
    "linear": lambda schedule, epoch, epochs: _down_to(schedule, 1 - _progress(epoch, epochs)),
    "polynomial": lambda schedule, epoch, epochs: _down_to(schedule, (1 - _progress(epoch, epochs)) ** schedule.power),
    "exponential": lambda schedule, epoch, epochs: schedule.gamma**epoch,
    "step": lambda schedule, epoch, epochs: schedule.gamma ** (epoch // schedule.step_epochs),
    "multi_step": _multi_step,
}
