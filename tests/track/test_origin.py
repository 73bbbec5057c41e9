"""Where a run comes from, as MLflow is told, and a server that refuses to be told."""

import subprocess
from types import SimpleNamespace

import pytest
from support.execution import settings as configured

from distrain import config
from distrain.config import own_settings
from distrain.data.storage.index_file import load_index
from distrain.track import origin
from distrain.track.annotations import Annotations
from distrain.track.description import describe
from distrain.track.mlflow_runs import connect, find_or_create_experiment, find_or_create_run
from distrain.track.origin import DataSource, Origin, origin_of


def of_checkout(monkeypatch, folder):
    monkeypatch.setattr(origin, "__file__", str(folder / "distrain" / "track" / "origin.py"))
    return {name.removeprefix("mlflow.source.git."): value for name, value in origin._git().items()}


def git(folder, *words):
    identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", f"safe.directory={folder}"]
    command = ["git", *identity, "-C", str(folder), *words]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_the_commit_of_the_code_is_known_and_whether_files_differ_from_it(monkeypatch, tmp_path):
    git(tmp_path, "init", "--initial-branch", "topic")
    (tmp_path / "file").write_text("a")
    git(tmp_path, "add", "file")
    git(tmp_path, "commit", "-m", "first")
    commit = git(tmp_path, "rev-parse", "HEAD")
    assert of_checkout(monkeypatch, tmp_path) == {"commit": commit, "branch": "topic", "dirty": "false"}
    (tmp_path / "new.py").touch()
    git(tmp_path, "checkout", "--detach")
    assert of_checkout(monkeypatch, tmp_path) == {"commit": commit, "branch": "", "dirty": "true"}


def test_a_repository_around_an_installed_package_is_not_that_of_the_code(monkeypatch, tmp_path):
    git(tmp_path, "init")
    (installed := tmp_path / ".venv" / "site-packages").mkdir(parents=True)
    assert set(of_checkout(monkeypatch, installed).values()) == {""}


def test_without_git_nothing_is_known_of_the_commit(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert set(origin._git().values()) == {""}


def test_no_secret_is_told(monkeypatch, group, dataset, tmp_path):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "it's/secret key")
    monkeypatch.setattr("sys.argv", ["distrain", "data.train=s3://me:pass-word@store/a", "x=it's/secret key"])
    index = load_index(f"{dataset}/train.parquet")
    loaded = configured(tmp_path, "data.train=s3://me:pass-word@store/a.parquet?X-Amz-Signature=0123456789ab")
    found = origin_of(loaded, group, (index, index), {"distrain.init": "https://me:pass-word@store/b"})
    told = repr((found, describe("net", found, "RUNNING", 1, {})))
    for secret in ("pass-word", "secret key", "0123456789ab"):
        assert secret not in told
    assert found.data[0].name == "a"


@pytest.mark.parametrize(("variable", "kind"), [("SLURM_JOB_ID", "JOB"), ("", "LOCAL")])
def test_a_job_of_a_scheduler_is_named(monkeypatch, variable, kind):
    for name in origin.JOB_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    if variable:
        monkeypatch.setenv(variable, "17")
    found = origin._source()
    assert (found["mlflow.source.type"], found["distrain.job"]) == (kind, "17" if variable else "")


def test_settings_that_differ_from_the_defaults_are_told_and_no_others(tmp_path):
    words = ["run.name=a", "data.train=t", "data.val=v", "model.name=densenet121", "optimizer.lr=0.3", "run.seed=0"]
    own = own_settings(config.load(None, words))
    assert own["optimizer.lr"] == 0.3
    assert own["model.name"] == "densenet121"
    assert not {"run.seed", "train.precision", "batch.lanes"} & own.keys()


def test_a_description_says_how_a_run_ended_and_fits_mlflow():
    data = [DataSource("training", "s3://" + "a" * 600, "0" * 64, 1_281_167, 1000, False)]
    many = Origin(
        {"distrain.hosts": "node," * 500}, data, {f"section.key{number}": "value" * 9 for number in range(200)}
    )
    text = describe("net", many, "SCHEDULED", 1200, {"val/top1": 0.76543, "val/loss": 1.0, "train/loss": 2.0})
    first = "**net**: stopped, to be resumed, step 1,200, top-1 76.54%, validation loss 1.0000"
    assert text.splitlines()[0] == first
    assert len(text) <= 5000
    assert text.splitlines()[-2].endswith("more, in config.yaml")
    assert text.splitlines()[-1] == "```"


@pytest.fixture
def run(tmp_path):
    """A client and the id of a run in an experiment without a kind."""
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    client = connect(uri)
    client.create_experiment("older", tags={"team": "vision"})
    return client, find_or_create_run(client, find_or_create_experiment(client, uri, "older", tmp_path), "a", "b", "c")


def test_a_restart_elsewhere_replaces_tags_and_keeps_the_data_sets(run):
    client, run_id = run
    data = DataSource("training", "/a/train.parquet", "0" * 64, 10, 3, False)
    first = Origin({"distrain.job": "17", "distrain.hosts": "n1"}, [data])
    Annotations(client, run_id, "net").refresh(first, {}, 0, "RUNNING")
    moved = DataSource("training", "/b/other.parquet", "0" * 64, 10, 3, False)
    Annotations(client, run_id, "net").refresh(
        Origin({"distrain.job": "", "distrain.hosts": "n2"}, [moved]), {}, 0, "R"
    )
    found = client.get_run(run_id)
    assert (found.data.tags["distrain.job"], found.data.tags["distrain.hosts"]) == ("", "n2")
    (given,) = found.inputs.dataset_inputs
    assert given.dataset.name == "train"
    tags = client.get_experiment(found.info.experiment_id).tags
    assert (tags["team"], tags["mlflow.experimentKind"]) == ("vision", "custom_model_development")


def test_a_description_is_sent_when_it_has_changed(run):
    client, run_id = run
    sent: list[str] = []
    counting = SimpleNamespace(
        get_run=client.get_run, get_experiment=client.get_experiment, log_batch=client.log_batch,
        set_experiment_tag=client.set_experiment_tag, set_tag=lambda _, name, value: sent.append(value),
    )  # fmt: skip
    annotations = Annotations(counting, run_id, "net")
    for newest, status in (
        ({}, "RUNNING"),
        ({}, "RUNNING"),
        ({"val/loss": 1.0}, "RUNNING"),
        ({"val/loss": 1.0}, "FAILED"),
    ):
        annotations.refresh(Origin(), newest, 1, status)
    assert [text.partition("\n")[0] for text in sent] == [
        "**net**: running, step 1",
        "**net**: running, step 1, validation loss 1.0000",
        "**net**: failed, step 1, validation loss 1.0000",
    ]
