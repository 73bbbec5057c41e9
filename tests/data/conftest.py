import shutil
from pathlib import Path

import pytest
from support.servers import serve, serve_s3, use_s3

from distrain import config
from distrain.data.storage.index_file import load_index


@pytest.fixture
def train_index(dataset):
    return load_index(f"{dataset}/train.parquet")


@pytest.fixture
def configure(tmp_path, on_dataset):
    """configure(key=value, ...) -> the configuration of a run with two lanes of four images."""

    def make(*overrides):
        run = ("run.name=run", f"run.dir={tmp_path}", "model.name=densenet_bc_10_4", "train.epochs=5")
        batch = ("batch.lanes=2", "batch.per_lane=4", "schedule.warmup_epochs=0")
        return config.load(None, [*run, *batch, *on_dataset, *overrides])

    return make


@pytest.fixture
def folder(dataset, tmp_path) -> Path:
    return shutil.copytree(dataset, tmp_path / "served")


@pytest.fixture
def server(folder):
    with serve(folder) as server:
        yield server


@pytest.fixture(scope="session")
def s3_server(dataset):
    with serve_s3(dataset) as url:
        yield url


@pytest.fixture
def s3(s3_server, monkeypatch):
    use_s3(monkeypatch, s3_server)
    return "s3://shards"
