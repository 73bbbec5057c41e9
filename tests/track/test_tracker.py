import json

import pytest

from distrain import config
from distrain.track import open_tracker


@pytest.fixture
def settings(on_dataset, tmp_path):
    return config.load(
        None, [*on_dataset, "model.name=densenet_bc_10_4", f"run.dir={tmp_path}", "run.name=run", "track.uri=none"]
    )


def report(settings, is_main: bool) -> str:
    with open_tracker(settings, is_main, steps=5) as tracker:
        tracker.info("a line")
        tracker.log(1, {"train/loss": 2.0})
        tracker.advance(1)
    return tracker.view_hint


def test_the_main_rank_prints_and_records_metrics(settings, tmp_path, capsys):
    assert report(settings, is_main=True) == f"see {tmp_path}/run/curves.png and metrics.jsonl"
    assert capsys.readouterr().out == "a line\nstep 1/5  loss 2.0000\n"
    (entry,) = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert (json.loads(entry)["step"], json.loads(entry)["metrics"]) == (1, {"train/loss": 2.0})


def test_other_ranks_report_nothing(settings, tmp_path, capsys):
    assert report(settings, is_main=False) == ""
    assert capsys.readouterr() == ("", "")
    assert not list(tmp_path.iterdir())
