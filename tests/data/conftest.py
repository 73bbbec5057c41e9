import shutil
from pathlib import Path

import pytest
from support.servers import serve, serve_s3, use_s3


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
