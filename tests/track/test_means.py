"""Loss and accuracy are reported as their means since the last report."""

from itertools import pairwise

import numpy as np
import pytest
from support.processes import train


@pytest.fixture(scope="module")
def every_step(settings, tmp_path_factory):
    result = train(tmp_path_factory.mktemp("every-step") / "run", *settings)
    assert result.code == 0, result.output
    return result


def means(values: dict[int, float], ends: list[int]) -> list[float]:
    """The mean of the steps up to each of `ends` since the one before."""
    return [float(np.mean([values[step] for step in range(a + 1, b + 1)])) for a, b in pairwise([0, *ends])]


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_report_is_the_mean_of_the_steps_since_the_last_one(every_step, settings, tmp_path, ranks):
    result = train(tmp_path / "run", *settings, "track.every_steps=10", ranks=ranks)
    ends = [10, 20, 30, 40, 50, 51]
    for name in ("train/loss", "train/top1"):
        reported = result.series(name)
        assert list(reported) == ends
        assert list(reported.values()) == pytest.approx(means(every_step.series(name), ends), rel=1e-4)


def test_a_crash_between_two_reports_does_not_change_the_mean(every_step, settings, tmp_path):
    chosen = (*settings, "track.every_steps=10")
    crashed = train(tmp_path / "run", *chosen, "resilience.faults=[exception@train.step:27]")
    assert crashed.code not in (0, 78)
    result = train(tmp_path / "run", *chosen)  # from the checkpoint of step 21
    assert "resuming at step 21" in result.output
    expected = means(every_step.series("train/loss"), [10, 20, 30, 40, 50, 51])
    assert list(result.series("train/loss").values()) == pytest.approx(expected, rel=1e-6)
