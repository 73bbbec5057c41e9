import fcntl
import os
import shutil
import signal
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from s3fs import S3FileSystem
from support.cache_readers import exit_codes, open_at, start_reader_of, start_readers
from support.servers import use_s3, without_credentials

from distrain.config import DownloadConfig
from distrain.data.index import Index
from distrain.data.storage import client
from distrain.data.storage.download import Downloader, DownloadError, StoreClosed
from distrain.data.storage.index_file import load_index
from distrain.data.storage.remote import RemoteStore
from distrain.data.storage.retry import RetryPolicy
from distrain.data.storage.store import DataError, LocalStore
from distrain.errors import UserError

SAMPLES = 203
SHARD = "train-000001.tar"  # samples 41 to 81
IN_SHARD = 50


@pytest.fixture
def cache(tmp_path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def open_remote(cache):
    """Opens stores on the training shards at a URL; closes them at the end."""
    stores = []

    def open_one(url: str, **settings) -> RemoteStore:
        stores.append(open_at(url, cache, **settings))
        return stores[-1]

    yield open_one
    for store in stores:
        store.close()


def shard_sizes(folder):
    return [shard.size for shard in load_index(f"{folder}/train.parquet").shards]


def read_all(store):
    return [store.read(sample) for sample in range(SAMPLES)]


@pytest.mark.parametrize("protocol", ["http", "s3"])
def test_remote_samples_equal_local_ones(protocol, dataset, server, s3, open_remote):
    url = {"http": server.url, "s3": s3}[protocol]
    assert read_all(open_remote(url)) == read_all(LocalStore(load_index(f"{dataset}/train.parquet")))


def test_a_shard_read_by_many_processes_is_downloaded_once(server, cache):
    server.delay = 0.3
    assert exit_codes(start_readers(3, server.url, cache, SAMPLES)) == [0, 0, 0]
    assert {name: count for name, count in server.requests.items() if name.endswith(".tar")} == {
        f"train-00000{number}.tar": 1 for number in range(5)
    }


def test_the_cache_never_exceeds_its_bound(server, folder, cache):
    bound = max(shard_sizes(folder)) * 2 + 1000
    seen = []
    processes = start_readers(3, server.url, cache, SAMPLES, cache_gb=bound / 1e9)
    while any(process.is_alive() for process in processes):
        seen.append(cache_bytes(cache))
        time.sleep(0.001)
    assert exit_codes(processes) == [0, 0, 0]
    assert 0 < max(seen) <= bound
    assert len(set(seen)) > 2


def cache_bytes(cache):
    """The size of all files at one moment: the lock excludes files about to be evicted."""
    if not (cache / "lock").exists():
        return 0
    with (cache / "lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return sum(path.stat().st_size for path in cache.iterdir())


def test_the_least_recently_used_shard_is_evicted_first(server, folder, open_remote):
    sizes = shard_sizes(folder)
    store = open_remote(server.url, cache_gb=(sum(sizes[:3]) + 1000) / 1e9)
    first_samples = [0, 41, 82, 123]
    for number in (0, 1, 2, 0, 3, 0, 2, 1):
        store.read(first_samples[number])
    assert [server.requests[f"train-00000{number}.tar"] for number in range(4)] == [1, 2, 1, 1]


def test_a_shard_that_is_being_read_is_not_evicted(server, folder, open_remote, cache):
    sizes = shard_sizes(folder)
    store = open_remote(server.url, cache_gb=(max(sizes) + 1000) / 1e9)
    store.read(0)
    (held,) = cache.glob("*.shard")
    with lock_as_reader(held):
        reader = threading.Thread(target=store.read, args=[IN_SHARD])
        reader.start()
        reader.join(0.3)
        assert reader.is_alive()
        assert held.exists()
    reader.join(10)
    assert not held.exists()


def test_a_shard_evicted_before_its_reader_locks_it_is_downloaded_again(server, open_remote, cache):
    store = open_remote(server.url)
    store.read(0)
    (held,) = cache.glob("*.shard")
    with held.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        reader = threading.Thread(target=store.read, args=[0])
        reader.start()
        reader.join(0.3)
        held.unlink()
    reader.join(10)
    assert server.requests["train-000000.tar"] == 2


def lock_as_reader(path):
    file = path.open("rb")
    fcntl.flock(file, fcntl.LOCK_SH)
    return file


def test_prefetched_shards_are_downloaded_before_they_are_read(server, open_remote, cache):
    store = open_remote(server.url)
    store.prefetch(np.array([100, 50, 51, 101]))
    wait_for(lambda: len(list(cache.glob("*.shard"))) == 2)
    server.faults = {"train-000001.tar": [404], "train-000002.tar": [404]}
    store.read(50)
    store.read(100)
    assert [server.requests[f"train-00000{number}.tar"] for number in range(4)] == [0, 1, 1, 0]


def wait_for(condition):
    deadline = time.monotonic() + 100
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("fault", [500, 503, 429, "timeout", "truncate", "corrupt"])
def test_every_transient_fault_is_survived(fault, server, open_remote, folder, caplog):
    server.faults[SHARD] = [fault, fault]
    store = open_remote(server.url, timeout=0.2)
    assert store.read(IN_SHARD) == LocalStore(load_index(f"{folder}/train.parquet")).read(IN_SHARD)
    assert server.requests[SHARD] == 3
    assert len([message for message in caplog.messages if SHARD in message]) == 2


@pytest.mark.parametrize("fault", [500, 503, "timeout", "truncate", "corrupt"])
def test_every_transient_fault_of_s3_is_survived(fault, server, folder, cache, monkeypatch):
    use_s3(monkeypatch, server.url)
    server.faults["train-000000.tar"] = [fault, fault]
    store = open_copy(folder, "s3://a", cache, timeout=0.3)
    assert store.read(0) == LocalStore(load_index(f"{folder}/train.parquet")).read(0)
    assert server.requests["train-000000.tar"] == 3


def test_a_permanent_fault_is_one_line_that_names_the_shard(server, open_remote):
    server.faults[SHARD] = [503] * 9
    with pytest.raises(
        DownloadError, match=rf"^{server.url}/{SHARD}: 503, .*; tried 4 times in \d s; check the server and run again$"
    ):
        open_remote(server.url).read(IN_SHARD)
    assert server.requests[SHARD] == 4


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (404, "file not found; restore the shard or index the shards again"),
        (403, r"access denied \(403, .*\); set or renew the credentials, which are looked for in the URL .*netrc"),
        (401, r"access denied \(401, .*\); set or renew the credentials, which are looked for in the URL .*netrc"),
        (400, r"request rejected \(400, .*\); correct the URL or the server's settings"),
    ],
)
def test_a_rejected_request_is_one_line_that_names_the_shard_and_the_cure(status, message, server, open_remote):
    server.faults[SHARD] = [status] * 9
    with pytest.raises(UserError, match=rf"^{server.url}/{SHARD}: {message}$"):
        open_remote(server.url).read(IN_SHARD)
    assert server.requests[SHARD] == 1


@pytest.mark.parametrize("change", ["corrupt", "longer", "shorter"])
def test_a_shard_that_changed_since_it_was_indexed_is_named(change, server, folder, open_remote):
    store = open_remote(server.url)
    content = (folder / SHARD).read_bytes()
    changed = {"corrupt": content[:-1] + b"x", "longer": content + b"x", "shorter": content[:-512]}
    (folder / SHARD).write_bytes(changed[change])
    with pytest.raises(UserError, match=rf"/{SHARD}: content differs from the index; restore the original shard"):
        store.read(IN_SHARD)
    assert server.requests[SHARD] == 2


@pytest.mark.parametrize("chunk", [16 * 2**20, 4096])
@pytest.mark.parametrize("length", ["longer", "shorter", "a chunk shorter", "whole chunks", "empty"])
def test_a_shard_of_another_length_in_its_bucket_is_named(length, chunk, s3, folder, cache, monkeypatch):
    monkeypatch.setattr(client, "_CHUNK", chunk)
    content = (folder / "train-000000.tar").read_bytes()
    other = {"longer": content + b"x", "shorter": content[:-1], "a chunk shorter": content[:-4096]}
    other |= {"whole chunks": content[: 2 * 4096], "empty": b""}
    S3FileSystem().pipe_file("shards/other/train-000000.tar", other[length])
    with pytest.raises(UserError, match=r"^s3://shards/other/train-000000\.tar: content differs from the index"):
        open_copy(folder, f"{s3}/other", cache).read(0)


def test_a_shard_is_downloaded_from_its_bucket_in_many_chunks(s3, folder, cache, monkeypatch):
    monkeypatch.setattr(client, "_CHUNK", 4096)
    assert (folder / "train-000000.tar").stat().st_size > 3 * 4096
    assert open_copy(folder, s3, cache).read(0) == LocalStore(load_index(f"{folder}/train.parquet")).read(0)


def test_no_more_bytes_are_written_than_were_indexed(server, folder):
    ends = []
    downloader = Downloader(RetryPolicy(1, 0.01), 5.0, threading.Event())
    with pytest.raises(UserError):
        downloader.fetch(f"{server.url}/{SHARD}", 5000, 0, lambda data, offset: ends.append(offset + len(data)))
    assert max(ends, default=0) <= 5000 < (folder / SHARD).stat().st_size


def test_a_shard_missing_from_a_bucket_is_named(s3, folder, cache):
    with pytest.raises(UserError, match=r"^s3://shards/elsewhere/train-000000\.tar: file not found; restore"):
        open_copy(folder, f"{s3}/elsewhere", cache).read(0)


def test_expired_credentials_are_one_line_that_names_the_shard(server, folder, cache, monkeypatch):
    use_s3(monkeypatch, server.url)
    server.faults["train-000000.tar"] = [400] * 9
    with pytest.raises(UserError, match=r"^s3://b/train-000000\.tar: access denied \(The provided token has expired"):
        open_copy(folder, "s3://b", cache).read(0)
    assert server.requests["train-000000.tar"] == 1


def test_absent_credentials_are_one_line_that_names_the_shard(server, folder, cache, monkeypatch):
    use_s3(monkeypatch, server.url)
    without_credentials(monkeypatch)
    with pytest.raises(UserError, match=r"^s3://c/train-000000\.tar: access denied \(Unable .*\); .* AWS_PROFILE"):
        open_copy(folder, "s3://c", cache).read(0)


def open_copy(folder, root, cache, timeout=5.0):
    """A store on the shards of `folder` that reads them from `root`."""
    built = load_index(f"{folder}/train.parquet")
    download = DownloadConfig(cache=str(cache), retries=2, retry_wait=0.01, timeout=timeout)
    return RemoteStore(Index(**{**vars(built), "root": root}), download)


def test_a_cache_size_smaller_than_a_shard_is_an_error_that_names_the_setting(server, open_remote):
    with pytest.raises(UserError, match=r"^download\.cache_gb=1e-05 cannot hold train-000000\.tar of .* GB: raise it"):
        open_remote(server.url, cache_gb=1e-5)


def test_a_full_disk_is_one_line_that_names_the_folder(server, open_remote, cache, small_disk):
    cache.symlink_to(small_disk)
    store = open_remote(server.url)
    (small_disk / "filler").write_bytes(bytes(2**21 - 4096))
    with pytest.raises(UserError, match=rf"^{cache}: disk full: .* MB; free some space or set download\.cache"):
        store.read(0)
    assert not list(cache.glob("*.part"))


def test_the_cache_shrinks_when_others_fill_the_disk(server, folder, open_remote, cache, monkeypatch):
    store = open_remote(server.url)
    store.read(0)
    store.read(IN_SHARD)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Disk(10**12, free_unless_cached(cache)))
    store.read(100)
    assert len(list(cache.glob("*.shard"))) == 1


class Disk(NamedTuple):
    total: int
    free: int


def free_unless_cached(cache):
    return 0 if list(cache.glob("*.shard")) else 10**12


def test_a_folder_that_cannot_be_written_is_named(server, open_remote, cache):
    cache.write_text("a file where the folder should be")
    with pytest.raises(UserError, match=rf"^{cache}: cannot cache shards: File exists; set download\.cache"):
        open_remote(server.url)


def test_partial_files_of_killed_downloads_are_removed_and_active_downloads_continue(server, cache, open_remote):
    server.faults = {"train-000000.tar": ["timeout"], "train-000001.tar": ["timeout"]}
    killed, active = (start_reader_of(sample, server.url, cache) for sample in (0, IN_SHARD))
    wait_for(lambda: server.requests["train-000000.tar"] == server.requests[SHARD] == 1)
    assert len(list(cache.glob("*.part"))) == 2
    os.kill(killed.pid, signal.SIGKILL)
    killed.join()
    store = open_remote(server.url)
    assert len(list(cache.glob("*.part"))) == 1
    server.release.set()
    assert exit_codes([active]) == [0]
    store.read(IN_SHARD)
    store.read(0)
    assert server.requests == Counter(
        {"train-000000.tar": 2, SHARD: 1, "train.parquet": server.requests["train.parquet"]}
    )


def test_a_shard_damaged_in_the_cache_is_downloaded_again(server, open_remote, cache):
    store = open_remote(server.url)
    expected = store.read(IN_SHARD)
    (cached,) = cache.glob("*.shard")
    cached.write_bytes(bytes(cached.stat().st_size))
    assert store.read(IN_SHARD) == expected
    assert server.requests[SHARD] == 2


def test_a_bad_sample_of_a_good_shard_is_an_error_of_that_sample_only(server, folder, cache):
    built = load_index(f"{server.url}/train.parquet")
    built.crc32[IN_SHARD] ^= 1
    store = RemoteStore(built, DownloadConfig(cache=str(cache)))
    with pytest.raises(DataError, match=rf"{SHARD}: the \d+ bytes at offset \d+ do not match the index"):
        store.read(IN_SHARD)
    store.read(IN_SHARD + 1)
    assert server.requests[SHARD] == 1
    store.close()


def test_closing_ends_a_wait_for_the_next_attempt(server, open_remote):
    server.faults[SHARD] = [503] * 9
    store = open_remote(server.url, retry_wait=60.0)
    with ThreadPoolExecutor() as pool:
        reading = pool.submit(store.read, IN_SHARD)
        wait_for(lambda: server.requests[SHARD] == 1)
        store.close()
        with pytest.raises(StoreClosed):
            reading.result(5)


def test_closing_ends_a_wait_for_the_download_of_another(server, open_remote):
    server.faults[SHARD] = ["timeout"]
    downloading, waiting = open_remote(server.url), open_remote(server.url)
    with ThreadPoolExecutor() as pool:
        slow = pool.submit(downloading.read, IN_SHARD)
        wait_for(lambda: server.requests[SHARD] == 1)
        reading = pool.submit(waiting.read, IN_SHARD)
        time.sleep(0.2)
        waiting.close()
        try:
            with pytest.raises(StoreClosed):
                reading.result(2)
        finally:
            server.release.set()
        assert slow.result(5)
