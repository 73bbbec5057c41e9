import resource

import pytest

from distrain.track.spool import Spool


def test_a_step_that_is_trained_again_is_recorded_again_where_its_values_differ(tmp_path):
    first = Spool(tmp_path / "m.jsonl")
    assert first.append(1, {"loss": 3.0})
    assert first.append(2, {"loss": 2.0, "grad": float("nan"), "train/images_per_second": 80.0})
    second = Spool(tmp_path / "m.jsonl")
    assert not second.append(2, {"loss": 2.0, "grad": float("nan"), "train/images_per_second": 70.0})
    assert second.append(2, {"loss": 9.0, "top1": 0.5})
    assert not second.append(2, {"loss": 9.0})
    assert second.append(3, {"loss": 1.0})
    for spool in (second, Spool(tmp_path / "m.jsonl")):
        shown = [(entry.step, entry.metrics.get("loss"), entry.metrics.get("top1")) for entry in spool.entries()]
        assert shown == [(1, 3.0, None), (2, 2.0, None), (2, 9.0, 0.5), (3, 1.0, None)]
    assert [entry.step for entry in second.entries(2)] == [2, 3]


def test_a_line_truncated_by_a_kill_is_dropped_and_its_step_recorded_again(tmp_path):
    path = tmp_path / "m.jsonl"
    Spool(path).append(1, {"loss": 3.0})
    complete = path.read_bytes()
    path.write_bytes(complete + b'{"step": 2, "ti')
    spool = Spool(path)
    spool.append(2, {"loss": 2.0})
    assert path.read_bytes().startswith(complete + b'{"step": 2, "time"')
    assert [entry.step for entry in Spool(path).entries()] == [1, 2]


def test_unreadable_lines_are_skipped(tmp_path, caplog):
    path = tmp_path / "m.jsonl"
    Spool(path).append(1, {"loss": 3.0})
    path.write_bytes(path.read_bytes() + bytes(64) + b"\n[]\n")
    spool = Spool(path)
    spool.append(2, {"loss": 2.0})
    assert f"{path}: skipped 2 unreadable lines" in caplog.text
    assert [entry.step for entry in Spool(path).entries()] == [1, 2]


@pytest.mark.parametrize("room", [0, 5])
def test_metrics_that_a_full_disk_rejects_are_written_once_there_is_room(tmp_path, caplog, room):
    spool = Spool(tmp_path / "metrics.jsonl")
    spool.append(1, {"a": 1.0})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, ((tmp_path / "metrics.jsonl").stat().st_size + room, limits[1]))
    try:
        spool.append(2, {"a": 2.0})
        with pytest.raises(OSError, match=r"metrics\.jsonl: metrics cannot be written"):
            spool.sync()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "metrics cannot be written" in caplog.text
    assert [entry.step for entry in Spool(tmp_path / "metrics.jsonl").entries()] == [1]
    spool.sync()
    assert [entry.step for entry in Spool(tmp_path / "metrics.jsonl").entries()] == [1, 2]
