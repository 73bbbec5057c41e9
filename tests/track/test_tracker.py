import json
import re
from pathlib import Path

import pytest
from support.processes import SMALL, train

from distrain import config
from distrain.__main__ import main
from distrain.errors import Stopped, TemporaryError, UserError
from distrain.files import translated_errors
from distrain.track import open_tracker
from distrain.track.uri import tracking_uri


@pytest.fixture
def settings(on_dataset, tmp_path):
    return config.load(
        None, [*on_dataset, "model.name=densenet_bc_10_4", f"run.dir={tmp_path}", "run.name=run", "track.uri=none"]
    )


def report(settings, is_main: bool) -> str:
    with open_tracker(settings, is_main, steps=5) as tracker:
        tracker.begin({})
        tracker.info("a line")
        tracker.log(1, {"train/loss": 2.0})
        tracker.advance(1)
    return tracker.view_hint


def test_the_main_rank_prints_and_records_metrics(settings, tmp_path, capsys):
    assert report(settings, is_main=True) == f"see {tmp_path}/run/curves.png and metrics.jsonl"
    assert capsys.readouterr().out == "a line\nstep 1/5  loss 2.0000\n"
    (entry,) = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert (json.loads(entry)["step"], json.loads(entry)["metrics"]) == (1, {"train/loss": 2.0})


def test_without_a_configured_server_the_environments_is_used(settings, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "none")
    settings.track.uri = ""
    assert report(settings, is_main=True).startswith("see ")


def test_a_configured_server_is_used_rather_than_the_environments(settings, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    assert report(settings, is_main=True).startswith("see ")


def test_other_ranks_report_nothing(settings, tmp_path, capsys):
    assert report(settings, is_main=False) == ""
    assert capsys.readouterr() == ("", "")
    assert not list(tmp_path.iterdir())


def test_text_is_printed_as_it_is(settings, capsys):
    with open_tracker(settings, True, steps=5) as tracker:
        tracker.info("run [b]:smile:[/b] at http://me:s3cret@host")
    assert capsys.readouterr().out == "run [b]:smile:[/b] at http://***@host\n"


def test_the_command_to_view_a_run_has_no_password(settings):
    settings.track.uri = "http://me:s3cret@host"
    assert open_tracker(settings, True, steps=5).view_hint == "compare runs at http://***@host"


def test_curves_that_cannot_be_written_do_not_hide_how_a_run_ended(settings, tmp_path, capsys):
    (tmp_path / "run" / "curves.png").mkdir(parents=True)
    with pytest.raises(Stopped):
        stop_at_once(settings)
    assert f"{tmp_path}/run/curves.png cannot be written: Is a directory" in capsys.readouterr().out


def stop_at_once(settings) -> None:
    with open_tracker(settings, True, steps=5) as tracker:
        tracker.begin({})
        tracker.log(1, {"train/loss": 2.0})
        raise Stopped


@pytest.mark.parametrize("folder", ["/proc/nowhere", "/etc/passwd/x", "/proc/self"])
def test_a_run_folder_that_cannot_be_created_is_the_users_mistake_in_one_line(on_dataset, folder):
    loaded = config.load(None, [*on_dataset, "model.name=densenet_bc_10_4", f"run.dir={folder}", "run.name=x"])
    with pytest.raises(UserError, match=rf"^{folder}/x: the run's folder cannot be used: .*; set run.dir to a folder"):
        open_tracker(loaded, True, steps=5).begin({})


def test_a_disk_that_is_full_at_the_start_may_be_free_later():
    message = "full-disk: the run's folder cannot be used: No space left on device"
    with (
        pytest.raises(TemporaryError, match=message),
        translated_errors(Path("full-disk")),
        Path("/dev/full").open("wb", buffering=0) as full,
    ):
        full.write(b"x")


@pytest.mark.parametrize(
    ("uri", "reason"),
    [
        ("off", "is not a tracking URI"),
        ("htp://host", "is not a tracking URI"),
        ("./mlruns", "is not a tracking URI"),
        ("http://", "is not a valid URL"),
        ("http://host:port", "is not a valid URL"),
        ("http://a host:80", "is not a valid URL"),
        ("sqlite://", "names no database that outlasts the run"),
        ("sqlite:///:memory:", "names no database that outlasts the run"),
        ("sqlite:runs.db", "names no database that outlasts the run"),
        ("sqlite:///why?.db", "names no database that outlasts the run"),
        ("postgresql:", "names no database that outlasts the run"),
    ],
)
def test_a_tracking_uri_that_can_never_work_is_refused(monkeypatch, settings, uri, reason):
    settings.track.uri = uri
    with pytest.raises(UserError, match=f"^{re.escape(f'track.uri={uri} {reason}')}"):
        tracking_uri(settings)
    settings.track.uri = ""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with pytest.raises(UserError, match=f"^{re.escape(f'MLFLOW_TRACKING_URI={uri} {reason}')}"):
        tracking_uri(settings)


def test_a_tracking_uri_that_can_never_work_is_refused_before_any_work(monkeypatch, capsys, settings, tmp_path):
    settings.track.uri = "off"
    (tmp_path / "run.yaml").write_text(config.to_yaml(settings))
    monkeypatch.setattr("sys.argv", ["distrain", "--config", f"{tmp_path}/run.yaml", "--print-config"])
    assert main() == 78
    assert capsys.readouterr().err.startswith("distrain: track.uri=off is not a tracking URI")


@pytest.mark.parametrize(
    "uri",
    ["sqlite:///a b.db?timeout=30", "sqlite:////a/b.db", "postgresql://u:p@h/db", "databricks", "http://u:p@h:5/path"],
)
def test_a_tracking_uri_that_may_work_is_used_as_it_is(settings, uri):
    settings.track.uri = uri
    assert tracking_uri(settings) == uri


def test_a_question_mark_in_the_folder_of_the_database_is_refused(monkeypatch, settings, tmp_path):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    settings.track.uri, settings.run.dir = "", f"{tmp_path}/why?"
    with pytest.raises(UserError, match=r"MLflow's database cannot be in a folder with '\?' or '%' in its path"):
        tracking_uri(settings)
    settings.run.dir = f"{tmp_path}/a b #1"
    assert tracking_uri(settings) == f"sqlite:///{tmp_path}/a b #1/mlflow.db"


def test_what_a_run_leaves_behind_has_none_of_its_secrets(monkeypatch, on_dataset, dataset, tmp_path):
    secrets = {
        "AWS_SECRET_ACCESS_KEY": "wJalr/XUtnFEMI",
        "AWS_SESSION_TOKEN": "t0ken+s3cret",
        "MLFLOW_TRACKING_PASSWORD": "passw0rd",
    }
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    folder = tmp_path / "runs" / "run"
    settings = (*SMALL, *on_dataset, "batch.lanes=2", "batch.per_lane=4", "train.epochs=0.2", "evaluate.batch=64")
    done = train(folder, *settings, "track.uri=", "download.cache=http://me:s3cr3t-pw@host/x")
    assert done.code == 0, done.output
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"config.yaml", "mlflow.db", "metrics.jsonl", "manifest.json"} <= {path.name for path in files}
    kept = {path: path.read_bytes() for path in files}
    found = [
        f"{path.name}: {secret}"
        for path, content in kept.items()
        for secret in (*secrets.values(), "s3cr3t-pw")
        if secret.encode() in content
    ]
    assert found == []
    assert (folder / "config.yaml").stat().st_mode & 0o777 == 0o600
