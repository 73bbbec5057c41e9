"""When training counts as diverged: updates without a finite gradient, and loss spikes."""

import pytest
from support.processes import SMALL, train

from distrain.config import ResilienceConfig
from distrain.errors import Diverged
from distrain.outcomes import Outcome
from distrain.resilience.divergence import DivergenceDetector


def observe(detector: DivergenceDetector, first: int, losses: list[float], applied: list[bool] | None = None) -> None:
    """Observe these losses at the steps from `first` on."""
    for number, loss in enumerate(losses):
        taken = applied is None or applied[number]
        detector.check(Outcome(first + number + 1, {"train/loss": loss}, taken))


def test_updates_that_are_skipped_in_a_row_diverge():
    detector = DivergenceDetector(ResilienceConfig(bad_steps=3))
    observe(detector, 10, [1.0] * 3, [True, False, False])
    with pytest.raises(Diverged, match=r"^3 updates in a row had no finite gradient, up to step 13$") as diverged:
        observe(detector, 13, [1.0], [False])
    assert diverged.value.step == 13


def test_skipped_updates_with_good_ones_between_them_never_diverge():
    detector = DivergenceDetector(ResilienceConfig(bad_steps=2))
    observe(detector, 0, [1.0] * 30, [False, True] * 15)


def test_skipped_updates_never_diverge_if_bad_steps_is_0():
    observe(DivergenceDetector(ResilienceConfig(bad_steps=0)), 0, [1.0] * 50, [False] * 50)


def test_a_loss_above_a_multiple_of_the_median_of_the_last_100_is_a_spike():
    detector = DivergenceDetector(ResilienceConfig(spike=2.0))
    observe(detector, 0, [8.0] * 100 + [4.0] * 51 + [8.0])  # 4 is the median of the last 100, neither mean nor all
    with pytest.raises(Diverged, match=r"the loss rose to 8\.1, more than 2 times its median, up to step 152") as spike:
        observe(detector, 152, [8.1])
    assert spike.value.step == 152


def test_a_spike_is_not_recognized_among_fewer_than_100_losses():
    observe(DivergenceDetector(ResilienceConfig(spike=2.0)), 0, [1.0] * 99 + [50.0, 1.0])


def test_losses_of_skipped_updates_do_not_count_as_history():
    detector = DivergenceDetector(ResilienceConfig(spike=2.0, bad_steps=0))
    observe(detector, 0, [100.0] * 300, [False] * 300)
    observe(detector, 300, [1.0] * 100)
    with pytest.raises(Diverged):
        observe(detector, 400, [2.5])


def test_spikes_are_ignored_by_default():
    observe(DivergenceDetector(ResilienceConfig()), 0, [1.0] * 100 + [1e6, 1.0])


def test_a_run_rolls_back_after_a_spike_and_skips_the_steps_that_led_to_it(on_dataset, tmp_path):
    """A thousandth of the median is exceeded once there is one, which takes 100 losses, and a rollback forgets them."""
    settings = (*SMALL, *on_dataset, "batch.lanes=2", "batch.per_lane=2", "train.epochs=2.1", "resilience.spike=0.001")
    result = train(tmp_path / "run", *settings, "checkpoint.every_steps=40", "evaluate.every_epochs=9")
    assert result.code == 0, result.output
    (line,) = [line for line in result.output.splitlines() if "more than 0.001 times its median" in line]
    assert line.endswith("up to step 100: rolling back to step 80 and continuing from there at step 101")
    assert set(range(1, 108)) - result.series("train/loss").keys() <= {101}
    assert "done: top-1" in result.output
