"""What a job asks of a shared file system and of each host, counted in real runs: it must not grow with the ranks."""

import mmap
import re
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from support.counting import few_open_files, record_operations
from support.processes import Result, train
from torch.distributed.checkpoint.state_dict_loader import load

from distrain.checkpoint import committed
from distrain.checkpoint.writing import share_of, write_metadata, write_share
from distrain.open_files import count_open_files

RANKS, NODES = 4, 2
MAINS = (0, 2)  # the first rank of each node


class Counted:
    """A run and what each of its ranks did, in order."""

    def __init__(self, folder: Path, *settings: str) -> None:
        prefix = folder.with_name(f"{folder.name}-operations-{len(list(folder.parent.iterdir()))}-")
        self.folder = folder
        self.result: Result = train(folder, *settings, ranks=RANKS, prepare=partial(record_operations, prefix, 2))
        assert self.result.code == 0, self.result.output
        self.operations = [Path(f"{prefix}{rank}").read_text().splitlines() for rank in range(RANKS)]

    def training(self, rank: int) -> list[str]:
        """The operations of a rank on the run's folder while it trains, without those of its first and last step and of
        saves."""
        operations = [line for line in self.operations[rank] if "/checkpoints" not in line]
        first, *_, last = (number for number, line in enumerate(operations) if line.startswith("step "))
        return [line.replace(f"{self.folder}/", "") for line in operations[first:last] if str(self.folder) in line]

    def values(self, name: str) -> list[int]:
        """The number that each rank recorded last under a name."""
        return [int([line for line in lines if f"{name} " in line][-1].split()[-1]) for lines in self.operations]


LIMITS = ("batch.lanes=4", "train.epochs=1", "checkpoint.every_steps=8", "resilience.patience=30")


@pytest.fixture(scope="module")
def run(settings, tmp_path_factory) -> Counted:
    return Counted(tmp_path_factory.mktemp("counted") / "run", *settings, *LIMITS)


def test_a_training_job_looks_at_its_folder_on_the_main_rank_alone(run):
    assert [run.training(rank) for rank in range(1, RANKS)] == [[]] * (RANKS - 1)
    steps = sum(line.startswith("step ") for line in run.operations[0])
    looks = [re.sub(r"\d{8}", "N", line) for line in run.training(0)]
    assert looks.count("stat stop") <= steps
    assert set(looks) - {"stat stop"} <= {
        "os.listdir attempts",
        "open attempts/N.json",  # every second
        "open attempts.jsonl",  # once
        "open metrics.jsonl",
        "stat quarantine.jsonl",
        "stat metrics.jsonl",  # every track.every_steps
    }


def test_a_restart_reads_the_checkpoint_once_per_node_and_keeps_no_copy(run, settings):
    before, newest = committed(run.folder / "checkpoints")
    shutil.rmtree(newest)
    size = sum(file.stat().st_size for file in before.iterdir())
    again = Counted(run.folder, *settings, *LIMITS)
    assert again.result.digest == run.result.digest
    read = again.values("restore read")
    assert [read[rank] < 1.2 * size for rank in MAINS] == [True] * NODES
    assert sum(read) < 1.2 * NODES * size
    assert max(again.values("memory")) <= mmap.PAGESIZE  # the heartbeats


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_the_tensors_that_each_rank_writes_follow_from_their_sizes(tmp_path):
    tensors = {f"layer{number}": torch.full((number % 50 + 1,), float(number)) for number in range(300)}
    tensors |= {"image": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last), "step": torch.tensor(7.0)}
    for world in (1, 3, 1024):
        shares = [share_of(rank, world, tensors) for rank in range(world)]
        assert sorted(name for share in shares for name in share) == sorted(tensors)
        sizes = [sum(tensors[name].nbytes for name in share) for share in shares if share]
        assert len(sizes) == min(world, 64)
        assert max(sizes) - min(sizes) <= max(tensor.nbytes for tensor in tensors.values())
    written = [write_share(tmp_path, rank, 3, tensors) for rank in range(3)]
    write_metadata(tmp_path, tensors, [file for file in written if file is not None])
    read = {name: torch.empty(tensor.shape) for name, tensor in tensors.items()}
    load(read, checkpoint_id=tmp_path, no_dist=True)  # by torch alone
    assert all(torch.equal(read[name], tensors[name]) for name in tensors)


def test_the_shards_are_looked_at_once_per_node(run):
    looks = [[line for line in lines if line.startswith("stat") and line.endswith(".tar")] for lines in run.operations]
    assert [len(set(found)) for found in looks] == [7 if rank in MAINS else 0 for rank in range(RANKS)]
    assert [len(found) for found in looks] == [len(set(found)) for found in looks]


def test_every_rank_has_fewer_sockets_than_are_counted(run):
    own = 6  # the store, listening ones, messages
    groups = 3 * (RANKS - 1)
    sockets = run.values("sockets")
    assert sockets[0] <= groups + RANKS + own
    assert max(sockets[1:]) <= groups + own
    assert count_open_files(1024) * 3 / 4 >= 3 * 1023 + 1024 + own


def test_a_limit_of_open_files_that_is_too_low_for_the_ranks_is_one_line(settings, tmp_path):
    refused = train(tmp_path / "run", *settings, "batch.lanes=1024", prepare=few_open_files)
    assert refused.code == 78
    assert refused.lines == [
        "1,024 ranks need 5,522 open files per process, and the hard limit (ulimit -Hn) here is 4,096: raise it on "
        "every host, in /etc/security/limits.conf or with LimitNOFILE= of the service"
    ]
