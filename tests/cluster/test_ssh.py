"""`launch ssh` and `launch doctor` on hosts with a real sshd."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.processes import SMALL, digest_on_one_node, read_metrics
from support.simulated_hosts import REPOSITORY, SCRIPT, Cluster, environment

from distrain.sweep.sweep import Sweep

_SSHD = "/usr/sbin/sshd"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(not Path(_SSHD).exists(), reason="needs openssh-server"),
]


@pytest.fixture
def cluster(tmp_path) -> Iterator[Cluster]:
    with Cluster(4) as cluster:
        set_up_ssh(cluster, tmp_path / "ssh")
        yield cluster


def set_up_ssh(cluster: Cluster, keys: Path) -> None:
    """Let root log in from every machine to every other with one key, mounted at /root/.ssh."""
    keys.mkdir()
    for name in ("id_ed25519", "host"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", keys / name], check=True)
    (keys / "id_ed25519.pub").rename(keys / "authorized_keys")
    (keys / "known_hosts").write_text(f"n* {(keys / 'host.pub').read_text()}")
    Path("/root/.ssh").mkdir(exist_ok=True, mode=0o700)
    Path("/run/sshd").mkdir(exist_ok=True)
    cluster.head("mount", "--bind", str(keys), "/root/.ssh")
    for node in cluster.nodes:
        cluster.on(node, "mount", "--bind", str(keys), "/root/.ssh")
        start_sshd(cluster, node, keys)


def start_sshd(cluster: Cluster, node: str, keys: Path, *options: str) -> None:
    words = ["-f", "/dev/null", "-h", str(keys / "host"), "-o", "StrictModes=no", "-o", "UsePAM=no"]
    for option in options:
        words += ["-o", option]
    cluster.on(node, _SSHD, *words)


def launch(cluster: Cluster, *words: str) -> "subprocess.CompletedProcess[str]":
    """Run the launcher on the head."""
    return subprocess.run(
        [SCRIPT, "exec", sys.executable, "-m", "launch", *words],
        cwd=REPOSITORY, capture_output=True, text=True, env={**environment(), "MC_DIR": str(cluster.folder)},
    )  # fmt: skip


@pytest.fixture(scope="module")
def settings(on_dataset) -> tuple[str, ...]:
    # For two ranks per host with one thread each on two cores: sums depend on the number of threads.
    return (
        *SMALL, *on_dataset, "batch.lanes=6", "batch.per_lane=4", "train.epochs=12", "checkpoint.every_steps=20",
        "evaluate.every_epochs=4", "resilience.patience=6",
    )  # fmt: skip


@pytest.fixture(scope="module")
def uninterrupted(settings, tmp_path_factory) -> str:
    return digest_on_one_node(tmp_path_factory.mktemp("uninterrupted"), *settings, ranks=6)


def test_three_hosts_train_one_run_and_restart_after_a_crash(cluster, settings, uninterrupted, tmp_path):
    words = ("ssh", "--hosts", "n1,n2,n3", "--ranks", "2", f"run.dir={tmp_path}", "run.name=run", *settings)
    done = launch(cluster, *words, "resilience.faults=[sigkill@train.step:40/2]")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all 3 hosts are healthy" in done.stdout
    assert done.stdout.strip().rpartition("weights ")[2] == uninterrupted
    assert "rank 2 on n2" in done.stderr
    assert "launch: starting again on n1, n2, n3" in done.stderr


def test_with_min_nodes_the_run_continues_without_a_lost_host(cluster, settings, tmp_path):
    words = ("ssh", "--no-doctor", "--hosts", "n1,n2,n3", "--min-nodes", "2", f"run.dir={tmp_path}", "run.name=run")
    settings = (*settings, "train.epochs=60")  # so that the host is lost in the middle of the run
    command = [SCRIPT, "exec", sys.executable, "-m", "launch", *words, *settings]
    variables = {**environment(), "MC_DIR": str(cluster.folder)}
    with subprocess.Popen(
        command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=variables
    ) as job:
        assert job.stdout is not None
        for line in job.stdout:
            if "step 40/" in line:
                cluster.kill("n3")
                break
        output = job.stdout.read()
        assert job.wait(timeout=600) == 0, output
    assert "launch: starting again on n1, n2\n" in output
    attempts = [json.loads(line) for line in (tmp_path / "run" / "attempts.jsonl").read_text().splitlines()]
    assert len(attempts) == 2


def test_a_sweep_is_finished_by_the_other_host_when_one_is_lost(cluster, settings, tmp_path):
    (tmp_path / "small.yaml").write_text(
        "network: densenet\nstages: 3\nsample: {growth_rate: {uniform: [4, 12]}}\n"
        "fixed: {stem: cifar, depth: 2, stem_width: 8}\n"
    )
    out = tmp_path / "sweep"
    settings = [word for word in settings if not word.startswith("model.name")]
    # Two workers, so that each has one of two cores: threads on cores that both hosts use wait for each other.
    words = ("sweep", "--hosts", "n1,n2", "--", str(tmp_path / "small.yaml"), "--n", "4", "--workers", "2")
    command = [SCRIPT, "exec", sys.executable, "-m", "launch", *words, "--out", str(out), *settings]
    variables = {**environment(), "MC_DIR": str(cluster.folder)}
    with subprocess.Popen(
        command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=variables
    ) as job:
        deadline = time.monotonic() + 400
        while not any(out.glob("runs/*/checkpoints/step-*")):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        cluster.kill("n2")
        assert job.stdout is not None
        output = job.stdout.read()
        assert job.wait(timeout=600) == 0, output
    assert "n1:0 small-" in output
    assert [member.status for member in Sweep.open(out).current()] == ["done"] * 4
    for run in (out / "runs").glob("small-*"):
        steps = [entry["step"] for entry in read_metrics(run) if "train/loss" in entry["metrics"]]
        assert steps == sorted(set(steps))


def test_the_doctor_names_every_unhealthy_host_with_a_mocked_clock(cluster, settings, tmp_path):
    cache = tmp_path / "cache"
    cache.mkdir()
    cluster.on(
        "n2", "tc", "qdisc", "add", "dev", "eth0", "root", "tbf", "rate", "50mbit", "burst", "64kb", "latency", "400ms"
    )
    cluster.on("n3", "mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(cache))
    other = tmp_path / "errors.py"
    other.write_text(f"{(REPOSITORY / 'distrain' / 'errors.py').read_text()}\n")
    cluster.on("n3", "mount", "--bind", str(other), str(REPOSITORY / "distrain" / "errors.py"))
    cluster.on("n4", "pkill", "sshd")
    # All hosts share the kernel's clock: shift Python's instead.
    (tmp_path / "sitecustomize.py").write_text("import time\nreal = time.time\ntime.time = lambda: real() + 30\n")
    start_sshd(cluster, "n4", tmp_path / "ssh", f"SetEnv=PYTHONPATH={tmp_path}")

    words = ("--hosts", "n1,n2,n3,n4", f"run.dir={tmp_path}", "run.name=run", f"download.cache={cache}", *settings)
    done = launch(cluster, "doctor", *words)
    assert done.returncode == 78, done.stdout + done.stderr
    unhealthy = [line.partition("unhealthy: ")[2] for line in done.stdout.splitlines() if "unhealthy: " in line]
    assert any(line.startswith("n2: slow network") for line in unhealthy)
    assert any(line.startswith("n3: cache_write_rate: ") and "No space left" in line for line in unhealthy)
    assert any(line.startswith("n3: different code") for line in unhealthy)
    assert any(line.startswith("n4: clock is +30.0 s off") for line in unhealthy)
    assert not any(line.startswith("n1") for line in unhealthy)
    assert not (tmp_path / "run" / "attempts").exists()


def test_an_unreachable_host_is_named(cluster, settings, tmp_path):
    cluster.kill("n2")
    done = launch(cluster, "doctor", "--hosts", "n1,n2", f"run.dir={tmp_path}", "run.name=run", *settings)
    assert done.returncode == 1
    assert "launch: lost n2" in done.stderr
