"""The commit protocol: a committed checkpoint can be loaded, whatever failed on any rank."""

import errno
import json
import os
import pickle
import shutil
import signal
import socket
import zlib
from contextlib import closing
from pathlib import Path

import pytest
from support.processes import Training, train, two_agents

from distrain.checkpoint import MANIFEST, Checkpointer, committed, distribution, read, verify
from distrain.checkpoint.files import checksum_file, read_best, tensors_in, write_best
from distrain.checkpoint.metadata import METADATA, DamagedCheckpointError
from distrain.config import CheckpointConfig
from distrain.errors import TemporaryError
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
    manifest = json.loads((newest / MANIFEST).read_text())
    manifest["files"]["../../config.yaml"] = {"size": 1, "crc32": 1}
    (newest / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(DamagedCheckpointError):
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
