"""The learning rate as a function of the position in the run."""

import math

from distrain.config import ScheduleConfig


def learning_rate(peak: float, schedule: ScheduleConfig, epoch: float, epochs: float) -> float:
    """Return the learning rate of the step that starts at `epoch` of `epochs`.

    Linear warm-up from warmup_factor x peak (Goyal et al. 2017, section 2.2), then half a cosine down to
    final_factor x peak over the whole run (Loshchilov and Hutter 2017, without restarts), or constant.
    """
    if epoch < schedule.warmup_epochs:
        progress = epoch / schedule.warmup_epochs
        warmup = schedule.warmup_factor + (1 - schedule.warmup_factor) * progress
    else:
        warmup = 1.0
    if schedule.name == "constant":
        return peak * warmup
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, epoch / epochs)))
    return peak * warmup * (schedule.final_factor + (1 - schedule.final_factor) * cosine)
