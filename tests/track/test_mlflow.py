"""Reports to a real MLflow store, the SQLite file that a run has by default."""

import base64
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import mlflow.pyfunc
import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from support.images import encoded
from support.processes import SMALL, Training, free_port, train

import distrain
from distrain import config
from distrain.errors import Stopped
from distrain.export.classifier import read_image
from distrain.export.predict_cli import classify
from distrain.sources import open_weights
from distrain.track import open_tracker
from distrain.track.models import log_models

# 102 steps, with a checkpoint every 25
LONGER = (*SMALL, "batch.lanes=2", "batch.per_lane=4", "train.epochs=4", "checkpoint.every_steps=25")


@pytest.fixture(scope="module")
def restarted(on_dataset, tmp_path_factory):
    """A run that was killed at step 60 or later and started again."""
    folder = tmp_path_factory.mktemp("runs") / "killed"
    training = Training(folder, *LONGER, *on_dataset, "track.uri=''", ranks=2)
    training.wait_for_step(60)
    training.kill()
    result = train(folder, *LONGER, *on_dataset, "track.uri=''", ranks=2)
    assert result.code == 0, result.output
    return result


@pytest.fixture(scope="module")
def client(restarted):
    return MlflowClient(f"sqlite:///{restarted.folder.parent}/mlflow.db")


@pytest.fixture(scope="module")
def run(client):
    (found,) = client.search_runs([client.get_experiment_by_name("distrain").experiment_id])
    return found


def test_a_restarted_job_continues_its_one_finished_run(run):
    assert (run.info.run_name, run.info.status) == ("killed", "FINISHED")


@pytest.mark.parametrize("metric", ["train/loss", "train/top1", "train/lr", "train/images_per_second"])
def test_every_step_is_logged_once(client, run, restarted, metric):
    history = client.get_metric_history(run.info.run_id, metric)
    assert [point.step for point in history] == list(range(1, 103))
    assert {point.step: point.value for point in history} == restarted.series(metric)
    times = {entry["step"]: entry["time"] for entry in restarted.metrics if metric in entry["metrics"]}
    assert {point.step: point.timestamp for point in history} == times


def test_validation_is_logged_once_per_epoch(client, run):
    history = client.get_metric_history(run.info.run_id, "val/top1")
    assert [point.step for point in history] == [25, 51, 76, 102]


def test_the_configuration_is_logged_as_parameters_and_as_an_artifact_beside_the_curves(client, run):
    assert run.data.params["batch.lanes"] == "2"
    assert run.data.params["model.name"] == "densenet_bc_10_4"
    artifacts = {artifact.path: artifact.file_size for artifact in client.list_artifacts(run.info.run_id)}
    assert artifacts.keys() == {"config.yaml", "curves.png"}
    assert min(artifacts.values()) > 500


def test_the_end_of_a_run_shows_how_to_view_it(restarted):
    assert f"mlflow ui --backend-store-uri sqlite:///{restarted.folder.parent}/mlflow.db" in restarted.output


def test_the_best_and_the_final_model_are_logged_once_with_where_they_come_from(client, run, restarted):
    logged = models_of(client, run)
    best, final = (open_weights(f"{restarted.folder}{which}", None) for which in ("", ":last"))
    expected = {"model": best} if best.sha256 == final.sha256 else {"model": best, "final": final}
    assert {name: model.tags["distrain.weights"] for name, model in logged.items()} == {
        name: weights.source for name, weights in expected.items()
    }
    assert list(log_models(client, run.info.run_id, restarted.folder, "")) == []  # as the same command does again
    assert models_of(client, run).keys() == logged.keys()


def test_a_logged_model_answers_what_predict_says(client, run, restarted, tmp_path):
    model = mlflow.pyfunc.load_model(models_of(client, run)["model"].artifact_location)
    photo = encoded(1, size=(20, 15))
    expected, _ = classify(distrain.load(restarted.folder), "", read_image(photo), 2)
    for image in (photo, base64.b64encode(photo).decode()):
        (found,) = model.predict([image], params={"top": 2}).to_dict("records")
        assert (found["classes"], found["scores"]) == (expected.classes, expected.scores)
        assert (found["label"], found["score"]) == (expected.classes[0], expected.scores[0])
    with pytest.raises(MlflowException, match="image 1: not a JPEG, PNG, WEBP image"):
        model.predict([photo, base64.b64encode(b"no image").decode()])
    assert model.metadata.metadata["classes"] == ["red", "green", "blue"]
    assert model.metadata.run_id == run.info.run_id


def test_the_best_model_is_registered_once(client, run, restarted):
    for _ in range(2):
        assert list(log_models(client, run.info.run_id, restarted.folder, "colors")) == []
    (version,) = client.search_model_versions("name = 'colors'")
    assert (version.run_id, version.source) == (run.info.run_id, models_of(client, run)["model"].artifact_location)


def test_a_store_without_a_registry_is_one_line(run, restarted):
    uri = f"sqlite:///{restarted.folder.parent}/mlflow.db"
    without = MlflowClient(uri, registry_uri="none://")
    (problem,) = log_models(without, run.info.run_id, restarted.folder, "colors")
    assert problem.startswith("track.register=colors: not registered: ")


def test_models_that_cannot_be_read_are_one_line(client, run, tmp_path):
    (problem,) = log_models(client, run.info.run_id, tmp_path, "colors")
    assert problem.startswith(f"the models of this run are not logged: {tmp_path}: this run has no checkpoint yet")


def models_of(client: MlflowClient, run) -> dict:
    """The logged models of a run by name."""
    found = client.search_logged_models([run.info.experiment_id], f"source_run_id = '{run.info.run_id}'")
    models = {model.name: model for model in found if str(model.status) == "READY"}
    assert len(models) == len(found)
    return models


@pytest.mark.slow
def test_a_server_answers_what_predict_says_without_the_libraries_of_training(run, restarted, tmp_path):
    (tmp_path / "photo.jpg").write_bytes(encoded(2, size=(20, 15)))
    (tmp_path / "sitecustomize.py").write_text(WITHOUT.format(names=TRAINING_ONLY))
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    environment["MLFLOW_TRACKING_URI"] = f"sqlite:///{restarted.folder.parent}/mlflow.db"
    port, tool = free_port(), Path(sys.executable).with_name("mlflow")
    words = ("models", "serve", "-m", f"runs:/{run.info.run_id}/model", "--env-manager", "local", "--port", str(port))
    server = subprocess.Popen([tool, *words], start_new_session=True, env=environment, cwd=tmp_path)
    try:
        deadline = time.monotonic() + 400
        while not reachable(port):
            assert time.monotonic() < deadline
            assert server.poll() is None
            time.sleep(0.2)
        image = base64.b64encode((tmp_path / "photo.jpg").read_bytes()).decode()
        found = invoke(port, {"inputs": [image]})
    finally:
        os.killpg(server.pid, signal.SIGKILL)
    words = (sys.executable, "-m", "distrain", "predict", restarted.folder, tmp_path / "photo.jpg", "--format", "jsonl")
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    expected = json.loads(done.stdout)
    assert found == {
        "label": expected["classes"][0],
        "score": expected["scores"][0],
        "classes": expected["classes"],
        "scores": expected["scores"],
    }


TRAINING_ONLY = (
    "torchvision", "deepspeed", "nvidia.dali", "webdataset", "fsspec", "aiohttp", "braceexpand", "s3fs", "rich",
    "matplotlib", "timm", "onnx", "onnxruntime",
)  # fmt: skip
WITHOUT = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name in {names}:
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Missing())
"""


def invoke(port: int, body: dict) -> dict:
    """What a served model says of one image."""
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"http://127.0.0.1:{port}/invocations", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request) as response:
        (found,) = json.load(response)["predictions"]
    return found


def test_a_copied_run_folder_is_another_run_and_a_moved_one_is_not(restarted, client, on_dataset, tmp_path):
    uri = f"track.uri=sqlite:///{restarted.folder.parent}/mlflow.db"

    def begin(name: str) -> str:
        settings = config.load(None, [*LONGER, *on_dataset, f"run.dir={tmp_path}", f"run.name={name}", uri])
        settings.track.experiment = "copies"
        with open_tracker(settings, is_main=True, steps=5) as tracker:
            tracker.begin({})
            tracker.log(1, {"train/loss": 1.0})
        return json.loads((tmp_path / name / "run.json").read_text())["id"]

    original = begin("a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    copy = begin("b")
    assert copy != original
    (tmp_path / "a").rename(tmp_path / "c")
    assert [begin("b"), begin("c")] == [copy, original]
    found = client.search_runs([client.get_experiment_by_name("copies").experiment_id])
    assert sorted(run.data.tags["distrain.run"] for run in found) == sorted([copy, original])


def test_the_values_of_a_step_that_is_trained_again_are_sent_too(restarted, client, on_dataset, tmp_path):
    uri = f"track.uri=sqlite:///{restarted.folder.parent}/mlflow.db"
    settings = config.load(None, [*LONGER, *on_dataset, f"run.dir={tmp_path}", "run.name=again", uri])
    settings.track.experiment = "again"
    for loss in (3.0, 3.0, 2.0, float("inf"), float("inf")):
        with open_tracker(settings, is_main=True, steps=5) as tracker:
            tracker.begin({})
            tracker.log(1, {"train/loss": loss, "train/images_per_second": loss})
    (run,) = client.search_runs([client.get_experiment_by_name("again").experiment_id])
    history = {name: client.get_metric_history(run.info.run_id, name) for name in run.data.metrics}
    assert [point.value for point in history["train/loss"]][:2] == [3.0, 2.0]
    assert {name: len(points) for name, points in history.items()} == {"train/loss": 3, "train/images_per_second": 1}


@pytest.mark.parametrize(("error", "status"), [(Stopped("SIGTERM"), "SCHEDULED"), (RuntimeError("crash"), "FAILED")])
def test_a_run_that_stopped_or_failed_is_shown_as_that(client, restarted, on_dataset, tmp_path, error, status):
    where = (f"run.dir={tmp_path}", "run.name=run", f"track.experiment={status}")
    uri = f"track.uri=sqlite:///{restarted.folder.parent}/mlflow.db"
    settings = config.load(None, [*LONGER, *on_dataset, *where, uri])
    with pytest.raises(type(error)):
        end_with(error, settings)
    deadline = time.monotonic() + 400
    while (shown := statuses(client, status)) in ([], ["RUNNING"]) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert shown == [status]


def end_with(error: Exception, settings) -> None:
    """Begin to report a run, and end it with this error."""
    with open_tracker(settings, is_main=True, steps=5) as tracker:
        tracker.begin({})
        raise error


def statuses(client: MlflowClient, experiment: str) -> list[str]:
    """The status of every run in an experiment; none if there is no such experiment."""
    found = client.get_experiment_by_name(experiment)
    return [run.info.status for run in client.search_runs([found.experiment_id])] if found else []


@pytest.mark.slow
def test_a_kill_while_the_database_is_created_leaves_no_incomplete_one(on_dataset, tmp_path):
    folder = tmp_path / "early"
    settings = (*LONGER, *on_dataset, "track.uri=''", "train.epochs=0.5")
    training = Training(folder, *settings)
    while not list(tmp_path.glob(".mlflow.db-*/mlflow.db")):
        assert training.process.poll() is None
        time.sleep(0.001)
    time.sleep(0.1)
    training.kill()
    result = train(folder, *settings)
    assert result.code == 0
    assert "training continues" not in result.output
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    (found,) = client.search_runs([client.get_experiment_by_name("distrain").experiment_id])
    assert found.info.status == "FINISHED"


def test_an_unreachable_server_does_not_stop_training_and_gets_its_metrics_later(on_dataset, tmp_path):
    folder = tmp_path / "offline"
    settings = (*LONGER, *on_dataset, "train.epochs=1")
    result = train(folder, *settings, "track.uri=http://127.0.0.1:9")
    assert result.code == 0, result.output
    assert "training continues, metrics are kept" in result.output
    assert "has not received everything" in result.output

    assert train(folder, *settings, f"track.uri=sqlite:///{tmp_path}/back.db", "track.models=false").code == 0
    client = MlflowClient(f"sqlite:///{tmp_path}/back.db")
    (found,) = client.search_runs([client.get_experiment_by_name("distrain").experiment_id])
    history = client.get_metric_history(found.info.run_id, "train/loss")
    assert {point.step: point.value for point in history} == result.series("train/loss")
    assert models_of(client, found) == {}


def test_the_command_shown_at_the_end_serves_the_run(restarted):
    (line,) = [line for line in restarted.output.splitlines() if line.startswith("compare runs with: ")]
    port = free_port()
    tool = Path(sys.executable).with_name("mlflow")
    words = shlex.split(line.removeprefix("compare runs with: mlflow "))
    server = subprocess.Popen([tool, *words, "--port", str(port), "--workers", "1"], start_new_session=True)
    try:
        client = MlflowClient(f"http://127.0.0.1:{port}")
        deadline = time.monotonic() + 400
        while not reachable(port):
            assert time.monotonic() < deadline
            assert server.poll() is None
            time.sleep(0.2)
        assert client.get_experiment_by_name("distrain") is not None
    finally:
        os.killpg(server.pid, signal.SIGKILL)


def reachable(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
