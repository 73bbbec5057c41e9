"""The commit protocol: a committed checkpoint can be loaded, whatever failed on any rank."""

import errno
import json
import os
import pickle
import shutil
import signal
import socket
import time
import zlib
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.processes import Training, train, two_agents
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

from distrain.checkpoint import MANIFEST, Checkpointer, committed, distribution, read, verify
from distrain.checkpoint.files import (
    Snapshot,
    checksum_file,
    commit,
    read_best,
    read_manifest,
    tensors_in,
    write_best,
)
from distrain.checkpoint.metadata import METADATA, DamagedCheckpointError, Reader
from distrain.config import CheckpointConfig
from distrain.errors import TemporaryError
from distrain.files import read_json, write_json
from distrain.resilience.file_calls import Disturbance, FileCalls


@pytest.fixture(scope="module")
def uninterrupted(settings, tmp_path_factory):
    """A finished run on two ranks, with checkpoints every 7 steps and the best one of step 51."""
    result = train(tmp_path_factory.mktemp("uninterrupted") / "run", *settings, ranks=2)
    assert result.code == 0, result.output
    return result


@pytest.fixture
def run_folder(uninterrupted, tmp_path) -> Path:
    return shutil.copytree(uninterrupted.folder, tmp_path / "run")


def test_a_write_that_fails_on_one_rank_fails_on_all_and_the_next_one_is_whole(uninterrupted, settings, tmp_path):
    faults = "resilience.faults=[ioerror@checkpoint.manifest:14,ioerror@checkpoint.write:28/1]"
    result = train(tmp_path / "run", *settings, faults, "checkpoint.keep=9", "resilience.patience=20", ranks=2)
    assert result.code == 0, result.output
    assert result.output.count("could not be written") == 2
    steps = [int(path.name[-8:]) for path in committed(result.folder / "checkpoints")]
    assert steps == [7, 17, 21, 34, 35, 42, 49, 51]
    assert all(verify(path) and read(path).tensors for path in committed(result.folder / "checkpoints"))
    assert len((result.folder / "attempts.jsonl").read_text().splitlines()) == 1
    assert result.digest == uninterrupted.digest


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
def test_a_run_folder_that_hosts_do_not_share_never_commits(settings, tmp_path):
    rendezvous = two_agents()
    folder = tmp_path / "runs" / "run"
    own_disk = ("unshare", "--mount", "sh", "-c", f'mount -t tmpfs tmpfs {folder.parent} && exec "$@"', "-")
    one_epoch = (*settings, "train.epochs=1", "resilience.patience=0")
    first = Training(folder, *one_epoch, rendezvous=rendezvous)
    second = Training(folder, *one_epoch, rendezvous=rendezvous, host=own_disk)
    results = [agent.wait() for agent in (first, second)]
    assert all(result.code for result in results)
    output = "".join(result.output for result in results)
    assert "is not visible on the main rank's host: run.dir must be shared by all nodes" in output
    assert "the last checkpoint, of step 17, could not be written" in output
    assert committed(folder / "checkpoints") == []


@pytest.mark.parametrize("bit", [0, 300, 900])
def test_a_flipped_bit_in_a_manifest_is_found(run_folder, bit):
    newest = committed(run_folder / "checkpoints")[-1]
    content = bytearray((newest / MANIFEST).read_bytes())
    content[content.index(b'"step": ') + 8 + bit] ^= 1
    (newest / MANIFEST).write_bytes(content)
    with pytest.raises(DamagedCheckpointError, match=r"manifest\.json is not"):
        verify(newest)


def test_a_manifest_that_names_a_file_elsewhere_is_damaged(run_folder):
    newest = committed(run_folder / "checkpoints")[-1]
    manifest = read_json(newest / MANIFEST, "")
    content = (run_folder / "config.yaml").read_bytes()
    manifest["files"]["../../config.yaml"] = {"size": len(content), "crc32": zlib.crc32(content)}
    write_json(newest / MANIFEST, manifest)
    with pytest.raises(DamagedCheckpointError, match=r"manifest\.json is not as it was written"):
        verify(newest)


def test_a_temporary_read_error_is_not_taken_for_damage(run_folder, settings):
    newest = committed(run_folder / "checkpoints")[-1]
    data = next(newest.glob("*.distcp"))
    content = data.read_bytes()
    data.unlink()
    data.symlink_to(data)  # so that opening it fails
    with pytest.raises(TemporaryError, match=rf"{data}: cannot be read: .*; check the file system and run again"):
        verify(newest)
    failed = train(run_folder, *settings)
    assert failed.code == 1
    assert failed.output.strip().splitlines()[-1].startswith(f"distrain: {data}: cannot be read: ")
    data.unlink()
    data.write_bytes(content)
    assert train(run_folder, *settings).code == 0
    assert not list((run_folder / "checkpoints").glob("*.bad*"))


def test_a_best_accuracy_that_cannot_be_read_just_now_is_one_line(group, tmp_path):
    write_best(tmp_path, 7, 0.5)
    with closing(Checkpointer(tmp_path, group, CheckpointConfig())) as checkpoints, FileCalls(tmp_path) as files:
        files.disturb(Disturbance(("read",), errno.ESTALE, 1000.0))
        with pytest.raises(TemporaryError, match=f"^{tmp_path}: .*; free space or check its file system"):
            checkpoints.is_best(0.75)


def test_what_fails_once_a_checkpoint_is_committed_does_not_make_it_uncommitted(group, tmp_path, caplog):
    (tmp_path / "best.json").mkdir()  # so that it can neither be replaced nor read
    with closing(Checkpointer(tmp_path, group, CheckpointConfig())) as checkpoints:
        checkpoints.save(7, {"model/weight": torch.zeros(2)}, lambda: {"identity": {}, "versions": {}}, best=0.5)
        assert checkpoints.wait()
    assert "the best checkpoint cannot be recorded: Is a directory" in caplog.text
    assert "older checkpoints are not removed" in caplog.text


def test_a_folder_that_cannot_be_cleared_just_now_is_no_mistake(group, tmp_path):
    (tmp_path / "step-00000007.abc.tmp").mkdir()
    with FileCalls(tmp_path) as files:
        files.disturb(Disturbance(("rmdir", "unlink"), errno.ENOTEMPTY, 1000.0))
        with pytest.raises(TemporaryError, match=f"^{tmp_path}: the run's folder cannot be used: .*; free space or"):
            Checkpointer(tmp_path, group, CheckpointConfig())


@pytest.fixture
def draft(run_folder, tmp_path) -> tuple[Path, dict]:
    """A checkpoint that is about to be committed, and what the ranks report of it."""
    newest = committed(run_folder / "checkpoints")[-1]
    return shutil.copytree(newest, tmp_path / "draft"), read_manifest(newest)["files"]


def test_a_checkpoint_without_a_file_that_its_metadata_names_is_not_committed(draft, tmp_path):
    folder, files = draft
    files.pop(next(name for name in files if name != METADATA))
    with pytest.raises(OSError, match=r"the ranks wrote \['\.metadata', .*, but the metadata names"):
        commit(folder, tmp_path / "step-00000051", Snapshot(51, {}, {}), files)
    assert not (tmp_path / "step-00000051").exists()


def test_a_file_that_is_not_as_its_rank_wrote_it_is_found_damaged(draft, tmp_path):
    folder, files = draft
    name = next(name for name in files if name != METADATA)
    content = bytearray((folder / name).read_bytes())
    content[100] ^= 1
    (folder / name).write_bytes(content)
    commit(folder, tmp_path / "step-00000051", Snapshot(51, {}, {"identity": {}, "versions": {}, "format": 2}), files)
    with pytest.raises(DamagedCheckpointError, match=f"^{name} has "):
        verify(tmp_path / "step-00000051")


def test_metadata_that_names_a_file_elsewhere_is_damaged(run_folder):
    newest = committed(run_folder / "checkpoints")[-1]
    metadata = Reader(newest).read_metadata()
    key = next(iter(metadata.storage_data))
    metadata.storage_data[key] = replace(metadata.storage_data[key], relative_path="../../config.yaml")
    (newest / METADATA).write_bytes(pickle.dumps(metadata))
    with pytest.raises(DamagedCheckpointError, match=r"it names the file \.\./\.\./config\.yaml"):
        tensors_in(newest)


def test_metadata_of_bytes_or_tensors_that_are_not_there_is_damaged(run_folder):
    newest = committed(run_folder / "checkpoints")[-1]
    content = (newest / METADATA).read_bytes()

    def refused(change) -> str:
        metadata = Reader(newest).read_metadata()
        change(metadata)
        (newest / METADATA).write_bytes(pickle.dumps(metadata))
        with pytest.raises(DamagedCheckpointError) as found:
            Reader(newest).read_metadata()
        (newest / METADATA).write_bytes(content)
        return str(found.value)

    def entry(**changes):
        def change(metadata):
            key = next(iter(metadata.storage_data))
            old = metadata.storage_data[key]
            size = (newest / old.relative_path).stat().st_size
            new = {name: value(old, size) for name, value in changes.items()}
            metadata.storage_data[key] = replace(old, **new)

        return change

    def tensor(**changes):
        def change(metadata):
            name = max(metadata.state_dict_metadata, key=lambda name: len(metadata.state_dict_metadata[name].size))
            old = metadata.state_dict_metadata[name]
            new = {name: value(old) for name, value in changes.items()}
            metadata.state_dict_metadata[name] = replace(old, **new)

        return change

    assert "past the end" in refused(entry(offset=lambda old, size: -1))
    assert "past the end" in refused(entry(length=lambda old, size: -1))
    assert "past the end" in refused(entry(offset=lambda old, size: size - old.length + 1))
    assert "past the end" in refused(entry(length=lambda old, size: size - old.offset + 1))
    assert "is larger than the files" in refused(tensor(size=lambda old: torch.Size([1 << 40])))
    assert "are not all of it" in refused(tensor(chunks=lambda old: []))
    moved = ChunkStorageMetadata(torch.Size([7]), torch.Size([1]))
    assert "is in no file" in refused(tensor(chunks=lambda old: [*old.chunks, moved]))


def test_a_checkpoint_is_overdue_after_every_minutes_and_saved_once(group, tmp_path, monkeypatch):
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    often = CheckpointConfig(every_steps=1000, every_minutes=2)
    with closing(Checkpointer(tmp_path, group, often)) as checkpoints:
        now += 119
        assert not checkpoints.is_overdue()
        now += 2
        assert checkpoints.is_overdue()
        assert checkpoints.is_due(7, overdue=True)
        checkpoints.save(7, {"model/weight": torch.zeros(2)}, lambda: {"identity": {}, "versions": {}})
        assert not checkpoints.is_overdue()
        assert [checkpoints.is_due(step, overdue=True) for step in (8, 9, 10)] == [False, False, True]
    with closing(Checkpointer(tmp_path, group, CheckpointConfig())) as checkpoints:
        now += 1_000_000
        assert not checkpoints.is_overdue()


def test_a_save_does_not_wait_for_the_device_and_writes_once_it_is_told_to(group, tmp_path, monkeypatch):
    """On a GPU the copy would be in the queue of kernels, and its file begun while the next step runs."""
    blocking, copy = [], torch.Tensor.copy_

    def recorded_copy(self, source, non_blocking=False):
        blocking.append(not non_blocking)
        return copy(self, source)

    monkeypatch.setattr(torch.Tensor, "copy_", recorded_copy)
    with closing(Checkpointer(tmp_path, group, CheckpointConfig(keep=3))) as checkpoints:
        for step in (7, 8):
            checkpoints.save(step, {"model/weight": torch.zeros(2)}, lambda: {"identity": {}, "versions": {}})
            assert blocking == [False]
            blocking.clear()
            time.sleep(0.1)
            assert [path.name for path in tmp_path.glob("step-*")] == ["step-00000007"] * (step - 7)
            checkpoints.start_write()
            assert checkpoints.wait()
        checkpoints.save(9, {"model/weight": torch.zeros(2)}, lambda: {"identity": {}, "versions": {}})
    assert [path.name[-1] for path in committed(tmp_path)] == ["7", "8", "9"]


def read_other_bytes() -> None:
    """Make this rank, before it starts, the only one of a node whose disk or memory damages what rank 1 reads."""
    os.environ["LOCAL_RANK"] = "0"
    if os.environ["RANK"] == "1":
        distribution._require_equal = raise_damage  # type: ignore[assignment]


def raise_damage(name: str, *checksums: object) -> None:
    raise DamagedCheckpointError(f"{name} has another checksum")


def test_simulated_damage_on_a_node_without_the_main_rank_sets_nothing_aside(run_folder, settings):
    before = committed(run_folder / "checkpoints")
    failed = train(run_folder, *settings, ranks=2, prepare=read_other_bytes)
    assert failed.code == 1
    assert failed.lines == [
        f"{before[-1]}: intact as rank 0 reads it, and damaged as rank 1 on {socket.gethostname()} does: .metadata has "
        "another checksum; check the memory of that host and how it mounts the folder, and run again"
    ]
    assert committed(run_folder / "checkpoints") == before


def test_a_run_whose_every_checkpoint_is_damaged_does_not_start_over(run_folder, settings):
    for path in committed(run_folder / "checkpoints"):
        (path / MANIFEST).write_text("{}")
    refused = [train(run_folder, *settings) for _ in range(2)]
    assert [result.code for result in refused] == [78, 78]
    assert "every checkpoint of this run is damaged (step-000000" in refused[1].output
    assert "or delete the folder to train from the beginning" in refused[1].output


def test_the_best_checkpoint_is_recorded_only_once_it_is_committed(settings, tmp_path):
    killed = train(tmp_path / "run", *settings, "resilience.faults=[sigkill@checkpoint.rename:17]")
    assert killed.code == -9
    assert read_best(killed.folder / "checkpoints") is None
    assert train(tmp_path / "run", *settings).code == 0
    best = read_best(killed.folder / "checkpoints")
    assert best is not None
    assert best[0] in [int(path.name[-8:]) for path in committed(killed.folder / "checkpoints")]


def test_a_refused_start_leaves_the_live_run_alone(settings, tmp_path):
    live = Training(tmp_path / "run", *settings, "train.epochs=60", "optimizer.lr=0.05", fresh=True)
    live.wait_for_step(20)
    before = [(tmp_path / "run" / name).read_bytes() for name in ("attempts/00000001.json", "config.yaml")]
    refused = train(tmp_path / "run", *settings, "train.epochs=60", "optimizer.lr=0.06")
    after = [(tmp_path / "run" / name).read_bytes() for name in ("attempts/00000001.json", "config.yaml")]
    assert refused.code == 78
    assert "optimizer.lr was 0.05 when this run began and is 0.06 now" in refused.output
    assert after == before
    again = train(tmp_path / "run", *settings, "train.epochs=60", "optimizer.lr=0.05")
    assert again.code == 78
    assert again.lines[-1] == (
        f"{tmp_path}/run: attempt 1 of this run is alive, as process {live.process.pid} on "
        f"{socket.gethostname()}: wait for it, stop it with touch {tmp_path}/run/stop, or use another run.name"
    )
    assert live.process.poll() is None
    live.signal_workers(signal.SIGTERM)
    assert live.wait().code == 75


class _Malicious:
    """Runs a command when it is unpickled."""

    def __init__(self, command: str) -> None:
        self._command = command

    def __reduce__(self):
        return os.system, (self._command,)


def test_code_in_a_checkpoint_is_not_run(run_folder, settings, tmp_path):
    newest = committed(run_folder / "checkpoints")[-1]
    (newest / METADATA).write_bytes(pickle.dumps(_Malicious(f"touch {tmp_path}/ran")))
    manifest = json.loads((newest / MANIFEST).read_text())
    manifest["files"][METADATA] = checksum_file(newest / METADATA)
    del manifest["crc32"]
    (newest / MANIFEST).write_text(
        json.dumps({**manifest, "crc32": zlib.crc32(json.dumps(manifest, sort_keys=True).encode())})
    )
    for load in (verify, read, tensors_in):
        with pytest.raises(DamagedCheckpointError, match=r"\.metadata is not valid: it names posix\.system"):
            load(newest)
    assert train(run_folder, *settings).code == 0
    assert (newest.with_name(f"{newest.name}.bad") / "reason.txt").exists()
    assert not (tmp_path / "ran").exists()
