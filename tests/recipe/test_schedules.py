import math

import pytest
import torch
from torch.optim import lr_scheduler

from distrain import config
from distrain.config import ScheduleConfig
from distrain.errors import UserError
from distrain.recipe.schedules import learning_rate, relative_rate

REQUIRED = ["run.name=a", "data.train=t.parquet", "data.val=v.parquet", "model.name=densenet121"]


def test_warm_up_is_linear_and_the_cosine_spans_the_run():
    schedule = ScheduleConfig(warmup_epochs=5, warmup_factor=0.1)
    rates = [relative_rate(schedule, epoch, 100) for epoch in (0, 2.5, 5, 50, 100)]
    # 0.1 x 1, then (0.1 + 0.9 / 2) x (1 + cos(0.025 pi)) / 2, ...
    assert rates == pytest.approx([0.1, 0.549152, 0.993844, 0.5, 0.0], abs=1e-6)


def test_a_constant_rate_has_a_warm_up_too():
    schedule = ScheduleConfig(name="constant", warmup_epochs=2, warmup_factor=0.0)
    assert [relative_rate(schedule, epoch, 10) for epoch in (0, 1, 2, 9)] == [0.0, 0.5, 1.0, 1.0]


def test_the_final_factor_is_where_the_cosine_ends():
    schedule = ScheduleConfig(warmup_epochs=0, final_factor=0.01)
    rates = [relative_rate(schedule, epoch, 10) for epoch in (0, 5, 10, 11)]
    assert rates == pytest.approx([1.0, 0.505, 0.01, 0.01])  # the last step of a run may start after its last epoch


def torch_rates(make_scheduler, epochs: int) -> list[float]:
    """The learning rate of every epoch by a scheduler of torch, of a peak of 1."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler, rates = make_scheduler(optimizer), []
    for _ in range(epochs):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize(
    ("settings", "make_scheduler"),
    [
        ({"name": "cosine", "final_factor": 0.1}, lambda o: lr_scheduler.CosineAnnealingLR(o, 20, eta_min=0.1)),
        ({"name": "linear", "final_factor": 0.2}, lambda o: lr_scheduler.LinearLR(o, 1.0, 0.2, total_iters=20)),
        ({"name": "polynomial", "power": 3}, lambda o: lr_scheduler.PolynomialLR(o, 20, power=3)),
        ({"name": "exponential", "gamma": 0.9}, lambda o: lr_scheduler.ExponentialLR(o, 0.9)),
        ({"name": "step", "step_epochs": 6}, lambda o: lr_scheduler.StepLR(o, 6)),
        (
            {"name": "multi_step", "milestones": [3.0, 11.0], "gamma": 0.5},
            lambda o: lr_scheduler.MultiStepLR(o, [3, 11], gamma=0.5),
        ),
        (
            {"name": "restarts", "cycle_epochs": 3, "cycle_factor": 2, "final_factor": 0.05},
            lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3, T_mult=2, eta_min=0.05),
        ),
    ],
    ids=lambda value: value["name"] if isinstance(value, dict) else "",
)
def test_every_shape_is_that_of_torch(settings, make_scheduler):
    schedule = ScheduleConfig(warmup_epochs=0, **settings)
    rates = [relative_rate(schedule, epoch, 20) for epoch in range(20)]
    assert rates == pytest.approx(torch_rates(make_scheduler, 20))
    assert 0 < rates[-1] < 1


def test_one_cycle_is_that_of_torch():
    # Of 20 steps torch lets 0.3 x 20 - 1 = 5 rise and 14 fall; its last one is at the final rate.
    schedule = ScheduleConfig(name="one_cycle", warmup_epochs=5, warmup_factor=1 / 25, final_factor=1 / 25e4)
    ours = [relative_rate(schedule, epoch, 19) for epoch in range(20)]

    def make_scheduler(optimizer):
        return lr_scheduler.OneCycleLR(optimizer, 1.0, total_steps=20, pct_start=0.3, cycle_momentum=False)

    assert ours == pytest.approx(torch_rates(make_scheduler, 20))


def test_the_shape_begins_after_the_warm_up_by_epochs_as_in_torchvisions_recipe():
    schedule = ScheduleConfig(warmup="before", per="epoch", warmup_epochs=5, warmup_factor=0.01)

    def make_scheduler(optimizer):
        rise = lr_scheduler.LinearLR(optimizer, 0.01, total_iters=5)
        fall = lr_scheduler.CosineAnnealingLR(optimizer, 15)
        return lr_scheduler.SequentialLR(optimizer, [rise, fall], [5])

    expected = torch_rates(make_scheduler, 20)
    assert [relative_rate(schedule, epoch, 20) for epoch in range(20)] == pytest.approx(expected)
    assert [relative_rate(schedule, epoch + 0.99, 20) for epoch in range(20)] == pytest.approx(expected)


@pytest.mark.parametrize("name", ["cosine", "linear", "polynomial", "one_cycle"])
def test_a_run_may_consist_of_its_warm_up(name):
    schedule = ScheduleConfig(name=name, warmup="before", warmup_epochs=2, warmup_factor=0.5)
    assert relative_rate(schedule, 1, 2) == pytest.approx(0.75)
    assert math.isfinite(relative_rate(schedule, 2, 2))


def test_the_peak_follows_the_batch_if_it_is_told_which_one_it_is_for():
    batch = ["batch.lanes=16", "batch.per_lane=64", "schedule.name=constant", "schedule.warmup_epochs=0"]
    for words, expected in (("optimizer.lr_batch=256",), 0.4), ((), 0.1):
        settings = config.load(None, [*REQUIRED, *batch, "optimizer.lr=0.1", *words])
        assert learning_rate(settings, 3.0) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "multi_step"}, "schedule.milestones and schedule.name=multi_step need each other"),
        ({"milestones": [3.0]}, "schedule.milestones and schedule.name=multi_step need each other"),
        (
            {"name": "multi_step", "milestones": [5.0, 3.0]},
            r"milestones=\[5.0, 3.0\] must be positive epochs",
        ),
        (
            {"name": "multi_step", "milestones": [0.0, 3.0]},
            r"milestones=\[0.0, 3.0\] must be positive epochs",
        ),
    ],
)
def test_milestones_are_checked(settings, message):
    with pytest.raises(UserError, match=message):
        ScheduleConfig(**settings)
