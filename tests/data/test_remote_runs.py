"""An index behind a failing server, and whole runs on data behind one."""

import pytest
from support.forked_runs import train_forked
from support.processes import SMALL
from support.servers import use_s3, without_credentials

from distrain.config import DownloadConfig
from distrain.data.storage.download import DownloadError
from distrain.data.storage.index_file import load_index
from distrain.errors import UserError

SHARD = "train-000001.tar"

QUICK_RETRIES = DownloadConfig(retries=2, retry_wait=0.01, timeout=1.0)


@pytest.mark.parametrize("protocol", ["http", "s3"])
@pytest.mark.parametrize("fault", [503, "timeout", "truncate"])
def test_an_index_is_read_despite_transient_faults(fault, protocol, server, folder, monkeypatch):
    use_s3(monkeypatch, server.url)
    server.faults["train.parquet"] = [fault, fault]
    root = {"http": server.url, "s3": "s3://d"}[protocol]
    assert load_index(f"{root}/train.parquet", QUICK_RETRIES).digest == load_index(f"{folder}/train.parquet").digest
    assert server.requests["train.parquet"] == 3


@pytest.mark.parametrize("protocol", ["http", "s3"])
@pytest.mark.parametrize(
    ("status", "message", "attempts"),
    [
        (404, "index not found; create it with `python -m distrain shards` or correct data.train and data.val", 1),
        (403, r"access denied \(.*\); set or renew the credentials, which are looked for in .*", 1),
        (503, "(503|Service Unavailable).*; tried 3 times in . s; check the server and run again", 3),
    ],
)
def test_an_index_that_cannot_be_read_is_one_line(status, message, attempts, protocol, server, monkeypatch):
    use_s3(monkeypatch, server.url)
    server.faults["train.parquet"] = [status] * 9
    root = {"http": server.url, "s3": "s3://d"}[protocol]
    with pytest.raises((UserError, DownloadError), match=rf"^{root}/train\.parquet: {message}$"):
        load_index(f"{root}/train.parquet", QUICK_RETRIES)
    assert server.requests["train.parquet"] == attempts


def test_an_index_without_credentials_is_one_line(server, monkeypatch):
    use_s3(monkeypatch, server.url)
    without_credentials(monkeypatch)
    with pytest.raises(UserError, match=r"^s3://e/train\.parquet: access denied \(Unable to locate credentials\)"):
        load_index("s3://e/train.parquet", QUICK_RETRIES)


@pytest.fixture(scope="session")
def run_on(tmp_path_factory, on_dataset):
    """Trains on the shards at a path or URL, in the same order for all."""
    folder = tmp_path_factory.mktemp("runs")

    def run(name, root):
        where = (f"data.train={root}/train.parquet", f"data.val={root}/val.parquet", "data.shuffle=window")
        steps = ("batch.lanes=2", "batch.per_lane=8", "train.epochs=2", "data.loader=torch")
        downloads = (f"download.cache={folder}/{name}-cache", "download.retry_wait=0.01", "download.timeout=0.3")
        return train_forked(folder / name, *SMALL, *on_dataset, *where, *steps, *downloads)

    return run


@pytest.fixture(scope="session")
def local_digest(run_on, dataset):
    """The digest of the weights of a run from local disk."""
    result = run_on("local", dataset)
    assert result.code == 0, result.output
    return result.digest


def test_training_over_http_ends_in_the_same_weights_as_from_disk(run_on, local_digest, server):
    assert run_on("http", server.url).digest == local_digest


def test_training_from_s3_ends_in_the_same_weights_as_from_disk(run_on, local_digest, s3):
    assert run_on("s3", s3).digest == local_digest


FAULTS = {
    "train.parquet": [503, "truncate"],
    "val.parquet": ["timeout"],
    "train-000000.tar": ["corrupt", 503],
    "train-000001.tar": ["timeout", "truncate"],
    "train-000002.tar": [500, 503, 500],
    "train-000003.tar": ["truncate", "corrupt", "timeout"],
    "val-000000.tar": ["timeout", 503],
}


@pytest.mark.parametrize("protocol", ["http", "s3"])
def test_training_over_a_failing_server_ends_in_the_same_weights_as_from_disk(
    run_on, local_digest, server, protocol, monkeypatch
):
    use_s3(monkeypatch, server.url)
    server.faults = {name: list(faults) for name, faults in FAULTS.items()}
    root = {"http": server.url, "s3": "s3://f"}[protocol]
    assert run_on(f"faulty-{protocol}", root).digest == local_digest
    assert not any(server.faults.values())


def test_training_without_a_shard_ends_with_one_line(run_on, server, folder):
    (folder / SHARD).unlink()
    result = run_on("missing", server.url)
    assert result.code == 78
    assert result.lines == [f"{server.url}/{SHARD}: file not found; restore the shard or index the shards again"]
    assert "Traceback" not in result.output
