"""Two nodes in network namespaces, with a network between them that can be disconnected."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from support.processes import SMALL, digest_on_one_node, environment, read_metrics

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        os.geteuid() != 0 or shutil.which("ip") is None, reason="needs root and iproute2 to create network namespaces"
    ),
]

ADDRESSES = {"a": "10.99.0.1", "b": "10.99.0.2"}


class Hosts:
    """Hosts `a` and `b`, which reach each other."""

    def __init__(self) -> None:
        self.names = {host: f"distrain-{os.getpid()}-{host}" for host in ADDRESSES}
        for name in self.names.values():
            ip("netns", "add", name)
        ip("link", "add", "eth0", "netns", self.names["a"], "type", "veth", "peer", "eth0", "netns", self.names["b"])
        for host, address in ADDRESSES.items():
            ip("-n", self.names[host], "addr", "add", f"{address}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                ip("-n", self.names[host], "link", "set", device, "up")

    def set_link(self, state: str) -> None:
        ip("-n", self.names["b"], "link", "set", "eth0", state)

    def processes(self) -> list[psutil.Process]:
        listed = [ip("netns", "pids", name).split() for name in self.names.values()]
        return [psutil.Process(int(pid)) for pids in listed for pid in pids if psutil.pid_exists(int(pid))]

    def close(self) -> None:
        for process in self.processes():
            process.kill()
        for name in self.names.values():
            ip("netns", "del", name)


class Nodes:
    """`launch node` on both hosts, for one start of a run."""

    def __init__(self, hosts: Hosts, folder: Path, settings: tuple[str, ...], job: str) -> None:
        self._log = folder.with_suffix(f".{job}.log")
        self.processes = {}
        with self._log.open("w") as log:
            for number, host in enumerate(ADDRESSES):
                self.processes[host] = subprocess.Popen(
                    [
                        "ip", "netns", "exec", hosts.names[host], sys.executable, "-m", "launch", "node",
                        "--nodes", "2", "--node-rank", str(number), "--head", ADDRESSES["a"], "--job", job,
                        "--name", host, "--",
                        f"run.dir={folder.parent}", f"run.name={folder.name}", *settings,
                    ],
                    stdout=log, stderr=subprocess.STDOUT, env=environment(),
                )  # fmt: skip

    @property
    def output(self) -> str:
        return self._log.read_text()

    def wait(self) -> list[int]:
        """The exit codes of both."""
        return [process.wait(timeout=240) for process in self.processes.values()]


def ip(*words: str) -> str:
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True).stdout


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    hosts = Hosts()
    yield hosts
    hosts.close()


@pytest.fixture(scope="module")
def settings(on_dataset) -> tuple[str, ...]:
    return (
        *SMALL, *on_dataset, "batch.lanes=2", "batch.per_lane=4", "train.epochs=8", "checkpoint.every_steps=10",
        "evaluate.every_epochs=4", "resilience.patience=5",
    )  # fmt: skip


@pytest.fixture(scope="module")
def uninterrupted(settings, tmp_path_factory) -> str:
    return digest_on_one_node(tmp_path_factory.mktemp("uninterrupted"), *settings, ranks=2)


def wait_for_step(folder: Path, step: int, nodes: Nodes) -> None:
    deadline = time.monotonic() + 400
    while max((entry["step"] for entry in read_metrics(folder)), default=0) < step:
        assert time.monotonic() < deadline, nodes.output
        time.sleep(0.01)


def finish(hosts: Hosts, folder: Path, settings: tuple[str, ...], uninterrupted: str) -> None:
    """The same command resumes and ends in the same weights, and neither start leaves a process running."""
    nodes = Nodes(hosts, folder, settings, "again")
    assert nodes.wait() == [0, 0], nodes.output
    assert nodes.output.strip().rpartition("weights ")[2] == uninterrupted
    assert "resuming at step" in nodes.output
    assert hosts.processes() == []


def test_a_network_partition_ends_both_sides_and_the_run_resumes_after_it(hosts, settings, uninterrupted, tmp_path):
    folder = tmp_path / "partition"
    nodes = Nodes(hosts, folder, settings, "first")
    wait_for_step(folder, 25, nodes)
    hosts.set_link("down")
    assert nodes.wait() == [1, 1], nodes.output
    assert "made no progress for 5 s" in nodes.output
    assert hosts.processes() == []
    hosts.set_link("up")
    finish(hosts, folder, settings, uninterrupted)


@pytest.mark.parametrize("host", ["a", "b"])
def test_a_killed_agent_leaves_no_process_running_on_either_side(hosts, settings, uninterrupted, tmp_path, host):
    folder = tmp_path / "lost"
    nodes = Nodes(hosts, folder, settings, "first")
    wait_for_step(folder, 25, nodes)
    nodes.processes[host].kill()
    codes = dict(zip(ADDRESSES, nodes.wait(), strict=True))
    assert codes.pop(host) == -9
    assert list(codes.values()) == [1], nodes.output
    deadline = time.monotonic() + 100
    while (left := hosts.processes()) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert left == []
    finish(hosts, folder, settings, uninterrupted)
