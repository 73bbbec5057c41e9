"""The small files that a restart reads: written atomically, and one line if they are unreadable."""

import os
import shutil

import pytest
from support.processes import train

from distrain.errors import UserError
from distrain.files import read_json, write_atomically, write_json
from distrain.resilience.claim import newest_attempt


def fail(*arguments, **options):
    raise OSError("injected")


@pytest.mark.parametrize("call", ["replace", "fsync"])
@pytest.mark.parametrize("existing", [True, False])
def test_a_failed_write_leaves_the_old_content_and_no_other_file(tmp_path, monkeypatch, call, existing):
    path = tmp_path / "file.json"
    if existing:
        path.write_text("old")
    monkeypatch.setattr(os, call, fail)
    with pytest.raises(OSError, match="injected"):
        write_atomically(path, "new")
    assert [(file, file.read_text()) for file in tmp_path.iterdir()] == ([(path, "old")] if existing else [])


def test_the_new_content_is_in_place_before_the_folder_is_flushed(tmp_path, monkeypatch):
    path = tmp_path / "file.json"
    path.write_text("old")
    monkeypatch.setattr("distrain.files.sync_folder", fail)
    with pytest.raises(OSError, match="injected"):
        write_atomically(path, b"new")
    assert [(file, file.read_text()) for file in tmp_path.iterdir()] == [(path, "new")]


def test_the_content_is_flushed_before_it_replaces_the_old_one(tmp_path, monkeypatch):
    calls = []
    for name in ("fsync", "replace"):
        original = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args, _name=name, _call=original: calls.append(_name) or _call(*args))
    write_atomically(tmp_path / "durable", "content")
    assert calls == ["fsync", "replace", "fsync"]
    calls.clear()
    write_atomically(tmp_path / "temporary", "content", durable=False)
    assert calls == ["replace"]


def test_json_reads_back_as_written_and_a_missing_file_as_empty(tmp_path):
    content = {"id": "a", "steps": [[1, 2]], "best": None}
    write_json(tmp_path / "file.json", content)
    assert read_json(tmp_path / "file.json", "delete it") == content
    assert read_json(tmp_path / "missing.json", "delete it") == {}


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "not readable as JSON"),
        (b"\0" * 64, "not readable as JSON"),
        (b'{"step": 3', "not readable as JSON"),
        (b"\xff\xfe", "not readable as JSON"),
        (b"[1, 2]", "expected a JSON object"),
        (b"null", "expected a JSON object"),
    ],
)
def test_an_unreadable_file_is_one_line_with_the_cure(tmp_path, content, problem):
    path = tmp_path / "file.json"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_json(path, "delete it")
    assert str(caught.value) == f"{path}: {problem}: delete it"


def test_another_value_than_was_written_is_one_line_with_the_cure(tmp_path):
    path = tmp_path / "file.json"
    write_json(path, {"step": 14})
    with pytest.raises(UserError, match=f"^{path}: lacks top1: delete it$"):
        read_json(path, "delete it", {"step": int, "top1": float})
    path.write_text(path.read_text().replace("14", "15"))
    with pytest.raises(UserError, match=f"^{path}: not as it was written: delete it$"):
        read_json(path, "delete it")


def test_a_fifo_in_place_of_a_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "file.json")
    with pytest.raises(OSError, match="Not a regular file"):
        read_json(tmp_path / "file.json", "delete it")


@pytest.fixture
def damage(finished, tmp_path):
    """Run the run's command again after a power loss has emptied one of its files."""

    def resume(name: str, content: bytes = b""):
        folder = shutil.copytree(finished[1], tmp_path / "run")
        assert (folder / name).exists()
        (folder / name).write_bytes(content)
        return folder, train(folder, *finished[0])

    return resume


def test_a_run_with_an_empty_best_json_is_refused_in_one_line_and_resumes_after_the_cure(damage, finished):
    name = "checkpoints/best.json"
    folder, refused = damage(name)
    assert refused.code == 78
    assert "Traceback" not in refused.output
    (error,) = [line for line in refused.output.splitlines() if line.startswith("distrain: ")]
    assert error.startswith(f"distrain: {folder / name}: not readable as JSON: delete it")
    (folder / name).unlink()
    assert train(folder, *finished[0]).code == 0


def test_an_empty_record_of_an_attempt_does_not_stop_training(damage):
    folder, result = damage("attempts/00000001.json")
    assert result.code == 0, result.output
    assert newest_attempt(folder).number == 2


def test_an_empty_run_json_is_reported_and_does_not_stop_training(damage):
    folder, result = damage("run.json")
    assert result.code == 0, result.output
    assert f"{folder}/run.json: not readable as JSON: delete it" in result.output
    assert "Traceback" not in result.output


def test_metrics_that_a_power_loss_filled_with_zeros_do_not_stop_the_run(damage, finished):
    intact = (finished[1] / "metrics.jsonl").read_bytes()
    folder, result = damage("metrics.jsonl", intact + bytes(64) + b"\n")
    assert result.code == 0, result.output
    assert f"distrain: {folder}/metrics.jsonl: skipped 1 unreadable lines" in result.output
