import pytest

from distrain.config import ScheduleConfig
from distrain.recipe.schedules import learning_rate


def test_warm_up_is_linear_and_the_cosine_spans_the_run():
    schedule = ScheduleConfig(warmup_epochs=5, warmup_factor=0.1)
    rates = [learning_rate(0.8, schedule, epoch, 100) for epoch in (0, 2.5, 5, 50, 100)]
    # 0.08 x 1, then 0.8 (0.1 + 0.9 / 2) x (1 + cos(0.025 pi)) / 2, ...
    assert rates == pytest.approx([0.08, 0.439322, 0.795075, 0.4, 0.0], abs=1e-6)


def test_a_constant_rate_has_a_warm_up_too():
    schedule = ScheduleConfig(name="constant", warmup_epochs=2, warmup_factor=0.0)
    assert [learning_rate(1.0, schedule, epoch, 10) for epoch in (0, 1, 2, 9)] == [0.0, 0.5, 1.0, 1.0]


def test_the_final_factor_is_where_the_cosine_ends():
    schedule = ScheduleConfig(warmup_epochs=0, final_factor=0.01)
    rates = [learning_rate(2.0, schedule, epoch, 10) for epoch in (0, 5, 10, 11)]
    assert rates == pytest.approx([2.0, 1.01, 0.02, 0.02])  # the last step of a run may start after its last epoch
