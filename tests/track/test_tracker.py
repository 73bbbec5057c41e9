import json
import re
import subprocess
import sys
from base64 import b64encode
from pathlib import Path
from urllib.parse import quote

import pytest
from support.processes import SMALL, environment, train
from support.servers import serve

from distrain import config
from distrain.__main__ import main
from distrain.data.storage.index_file import load_index
from distrain.errors import Stopped, TemporaryError, UserError
from distrain.files import translated_errors
from distrain.models import build, save_weights
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
        ("SQLITE:///x.db", "is not a tracking URI"),
        ("uc:x", "is not a tracking URI"),
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


def test_a_folder_as_mlflow_no_longer_uses_is_refused_unless_that_is_allowed(monkeypatch, settings):
    settings.track.uri = "file:///runs"
    with pytest.raises(UserError, match=r"^track.uri=file:///runs: MLflow keeps no more runs in folders: write sqlite"):
        tracking_uri(settings)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    assert tracking_uri(settings) == "file:///runs"


def test_a_tilde_in_the_uri_of_a_database_is_the_home_folder(monkeypatch, settings):
    monkeypatch.setenv("HOME", "/home/ada")
    settings.track.uri = "sqlite:///~/a.db"
    assert tracking_uri(settings) == "sqlite:////home/ada/a.db"


def test_a_question_mark_in_the_folder_of_the_database_is_refused(monkeypatch, settings, tmp_path):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    settings.track.uri, settings.run.dir = "", f"{tmp_path}/why?"
    with pytest.raises(UserError, match=r"MLflow's database cannot be in a folder with '\?' or '%' in its path"):
        tracking_uri(settings)
    settings.run.dir = f"{tmp_path}/a b #1"
    assert tracking_uri(settings) == f"sqlite:///{tmp_path}/a b #1/mlflow.db"


# A rank whose crash has a URL in its text.
CRASH = """
import os
if os.environ.get("RANK"):
    import distrain.resilience.faults as faults
    faults.InjectedError.__str__ = lambda error: "at " + os.environ["CRASH_URL"]
"""


@pytest.fixture
def secrets(monkeypatch) -> dict[str, str]:
    """Secrets in the environment, and those that go into URLs."""
    found = {
        "AWS_SECRET_ACCESS_KEY": "wJalr/XUtnFEMI",
        "AWS_SESSION_TOKEN": "t0ken+s3cret",
        "MLFLOW_TRACKING_PASSWORD": "passw0rd",
        "MLFLOW_TRACKING_TOKEN": "mlf-t0ken",
        "data": "d4ta-p@ss",
        "init": "in1t-p@ss",
        "track": "tr4ck-p@ss",
    }
    for name, value in found.items():
        if name.isupper():
            monkeypatch.setenv(name, value)
    return found


def leaks(secrets, folder: Path, *printed: str) -> list[str]:
    """Where a secret occurs in files and output: as it is, as URLs have it, or in base64 as HTTP sends it."""
    texts = {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    texts |= {f"output {number}": text.encode() for number, text in enumerate(printed)}
    found = []
    for name, secret in secrets.items():
        plain = secret.encode()
        forms = [plain, quote(secret, "").encode(), *(b64encode(user + plain).rstrip(b"=") for user in (b"", b"ada:"))]
        found += [f"{name} in {where}" for where, text in texts.items() if any(form in text for form in forms)]
    return found


def with_login(url: str, secret: str) -> str:
    return url.replace("http://", f"http://ada:{quote(secret, '')}@")


def test_what_a_run_leaves_behind_has_none_of_its_secrets(secrets, on_dataset, dataset, tmp_path):
    small = (*SMALL, *on_dataset, "batch.lanes=2", "batch.per_lane=4", "train.epochs=0.2", "evaluate.batch=64")
    folder = tmp_path / "runs" / "run"
    with serve(dataset) as server:
        data = with_login(server.url, secrets["data"])
        urls = (f"data.train={data}/train.parquet", f"data.val={data}/val.parquet", f"download.cache={tmp_path}/cache")
        done = train(folder, *small, *urls, "track.uri=")
        server.faults["val.parquet"] = [403]
        failed = train(tmp_path / "failed", *small, *urls, f"track.uri={with_login('http://h', secrets['track'])}")
    assert (done.code, failed.code) == (0, 78), done.output + failed.output
    assert {"config.yaml", "mlflow.db", "metrics.jsonl", "manifest.json"} <= {p.name for p in folder.parent.rglob("*")}
    assert leaks(secrets, tmp_path, done.output, failed.output) == []
    assert (folder / "config.yaml").stat().st_mode & 0o777 == 0o600


@pytest.mark.slow
def test_logs_and_reports_of_a_crash_under_the_launcher_have_no_secrets(secrets, on_dataset, dataset, tmp_path):
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(CRASH)
    (tmp_path / "weights").mkdir()
    record = {"network": "densenet_bc_10_4", "classes": list(load_index(f"{dataset}/val.parquet").classes)}
    save_weights(build("densenet_bc_10_4", 3), tmp_path / "weights" / "net.safetensors", "distrain", record)
    with serve(dataset) as server, serve(tmp_path / "weights") as weights:
        data, init = with_login(server.url, secrets["data"]), with_login(weights.url, secrets["init"])
        paths = {"PYTHONPATH": f"{tmp_path}/site:{Path(__file__).parents[2]}", "TORCH_HOME": str(tmp_path)}
        env = environment() | paths | {"CRASH_URL": f"{data}/x"}
        command = [sys.executable, "-m", "launch", "local", "--ranks", "2", *SMALL, *on_dataset]
        command += ["batch.lanes=2", "batch.per_lane=4", "train.epochs=1", "checkpoint.every_steps=5"]
        command += [
            f"data.train={data}/train.parquet",
            f"data.val={data}/val.parquet",
            f"model.init={init}/net.safetensors",
        ]
        command += [
            f"track.uri={with_login('http://127.0.0.1:9', secrets['track'])}",
            f"download.cache={tmp_path}/cache",
        ]
        command += [f"run.dir={tmp_path}/runs", "run.name=run", "resilience.faults=[exception@train.step:12/1]"]
        done = subprocess.run(command, capture_output=True, text=True, env=env)
        run = f"{tmp_path}/runs/run"
        tools = [
            subprocess.run(
                [sys.executable, "-m", "distrain", *words], capture_output=True, text=True, env=env, cwd=tmp_path
            )
            for words in (
                ("export", f"{init}/net.safetensors", "--to", "safetensors", "--out", "exported.safetensors"),
                ("evaluate", f"{init}/net.safetensors", f"{data}/val.parquet", "--out", "report", "--against", run),
                ("checkpoints", "show", run),
            )
        ]
    printed = [text for process in (done, *tools) for text in (process.stdout, process.stderr)]
    assert [process.returncode for process in (done, *tools)] == [0, 0, 0, 0], printed
    assert "InjectedError: at http://***@127.0.0.1" in done.stderr
    assert leaks(secrets, tmp_path, *printed) == []
