"""The unmodified scripts of slurm/ on a real Slurm. Each run ends in the weights of an uninterrupted one."""

import json
import time
from pathlib import Path

import pytest
from support.processes import SMALL, digest_on_one_node, read_metrics
from support.simulated_hosts import Cluster

from distrain.sweep.sweep import Sweep

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

SCRIPT = "regnety_16gf.sh"
# 24 epochs of 203 samples, 16 per step, are 304 steps.
SETTINGS = (
    *SMALL, "batch.lanes=4", "batch.per_lane=4", "train.epochs=24", "checkpoint.every_steps=20", "augment.lighting=0",
    "evaluate.every_epochs=8", "resilience.patience=6", "optimizer.weight_decay=0",
)  # fmt: skip
STEPS = 304


class Run:
    """A run of the small test network in the folder that is a job's `RUN`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.log = folder.with_suffix(".log")

    def wait_for_step(self, step: int, timeout: float = 240) -> None:
        deadline = time.monotonic() + timeout
        while max((entry["step"] for entry in read_metrics(self.folder)), default=0) < step:
            assert time.monotonic() < deadline, f"step {step} not reached:\n{self.output}"
            time.sleep(0.02)

    def wait_for_attempt(self, number: int) -> None:
        """Until the run has begun so many times."""
        deadline = time.monotonic() + 400
        while len(self.attempts) < number:
            assert time.monotonic() < deadline, f"attempt {number} has not begun:\n{self.output}"
            time.sleep(0.02)

    def wait_for_progress(self) -> None:
        """Until a step later than any so far is reported."""
        self.wait_for_step(max(entry["step"] for entry in read_metrics(self.folder)) + 1)

    @property
    def output(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    @property
    def digest(self) -> str:
        done = [line for line in self.output.splitlines() if " done: top-1" in line]
        assert done, self.output
        return done[-1].rpartition("weights ")[2]

    @property
    def causes(self) -> list[str]:
        """Why each attempt except the last one ended."""
        return [entry["cause"] for entry in self.attempts if entry["cause"]]

    @property
    def attempts(self) -> list[dict]:
        return [json.loads(line) for line in (self.folder / "attempts.jsonl").read_text().splitlines()]


@pytest.fixture
def run(tmp_path) -> Run:
    return Run(tmp_path / "run")


@pytest.fixture(scope="module")
def extra(on_dataset) -> str:
    return " ".join(
        [*SETTINGS, *(setting for setting in on_dataset if not setting.startswith(("data.train=", "data.val=")))]
    )


@pytest.fixture(scope="module")
def uninterrupted(extra, dataset, tmp_path_factory) -> str:
    """The weights digest of the same run on the same number of ranks, uninterrupted."""
    data = (f"data.train={dataset}/train.parquet", f"data.val={dataset}/val.parquet")
    arguments = ("--config", "configs/regnety_16gf.yaml", *extra.split(), *data)
    return digest_on_one_node(tmp_path_factory.mktemp("uninterrupted"), *arguments, ranks=4)


def submit(cluster: Cluster, run: Run, extra: str, dataset: Path, *options: str, doctor: str = "0") -> str:
    """Submit on two nodes with two simulated GPUs each; `options` override that."""
    variables = {"RUN": str(run.folder), "EXTRA": extra, "DATA": str(dataset), "DOCTOR": doctor}
    return cluster.submit(SCRIPT, run.log, "--nodes=2", "--gpus-per-node=2", *options, **variables)


def test_two_nodes_train_one_run(run, extra, dataset, uninterrupted):
    database = f"sqlite:///{run.folder.parent}/mlflow.db"
    with Cluster(2) as cluster:
        job = submit(cluster, run, extra.replace("track.uri=none", f"track.uri={database}"), dataset, doctor="1")
        cluster.wait_for(job, "COMPLETED")
    assert run.digest == uninterrupted
    assert "all 2 hosts are healthy" in run.output
    logs = run.folder / "logs" / f"{job}.0.0"
    assert {path.stem for path in logs.glob("*.out")} == {"n1-0", "n1-1", "n2-2", "n2-3"}
    assert "done: top-1" in (logs / "n1-0.out").read_text()

    import mlflow

    mlflow.set_tracking_uri(database)
    (reported,) = mlflow.search_runs(search_all_experiments=True, output_format="list")
    assert reported.info.status == "FINISHED"
    assert reported.data.metrics["train/loss"] > 0


def test_a_job_survives_one_disturbance_after_the_other(run, extra, dataset, tmp_path):
    """A restarted controller and a short outage cost no work; a killed rank starts again on the same nodes; a warning
    before the time limit, to the step or to the batch script, and preemption save and requeue."""
    longer = f"{extra} train.epochs=48"
    data = (f"data.train={dataset}/train.parquet", f"data.val={dataset}/val.parquet")
    arguments = ("--config", "configs/regnety_16gf.yaml", *longer.split(), *data)
    uninterrupted = digest_on_one_node(tmp_path / "uninterrupted", *arguments, ranks=4)
    with Cluster(2) as cluster:
        job = submit(cluster, run, longer, dataset)
        run.wait_for_step(20)
        cluster.restart_controller()
        run.wait_for_step(80)
        cluster.disconnect("n2")
        time.sleep(1.5)
        cluster.restore("n2")
        run.wait_for_step(160)
        assert run.causes == []

        cluster.on("n2", "pkill", "-KILL", "--oldest", "--full", "[-]u -m distrain")
        run.wait_for_attempt(2)
        assert cluster.restarts(job) == 0
        for attempt, receiver in ((3, ()), (4, ("--batch",))):
            run.wait_for_progress()
            cluster.head("scancel", *receiver, "--signal=USR1", job)
            cluster.wait_for(job, "PENDING")
            run.wait_for_attempt(attempt)
        run.wait_for_progress()
        urgent = cluster.head("sbatch", "-p", "high", "-N2", "--exclusive", "-o/dev/null", "--wrap=sleep 2").split()[-1]
        cluster.wait_for(urgent, "COMPLETED")
        cluster.wait_for(job, "COMPLETED")
        assert cluster.restarts(job) == 3
    assert run.digest == uninterrupted
    assert "rank 2 on n2" in run.output
    assert "ended with signal 9" in run.output
    for start in ("0.0", "0.1", "1.0", "2.0", "3.0"):
        assert f"start {job}.{start} of" in run.output
    killed, *stopped = run.causes
    assert not killed.startswith("stopped by")
    assert len(stopped) == 3
    assert all(cause.startswith("stopped by ") for cause in stopped)  # a signal, or one to another rank
    lost = [attempt["lost_steps"] for attempt in run.attempts]
    assert lost[1] <= 2 * 20  # the newest checkpoint may not have been complete
    assert lost[2:] == [0, 0, 0]


def test_a_cancelled_job_stays_cancelled_and_has_saved(run, extra, dataset, uninterrupted):
    with Cluster(2) as cluster:
        job = submit(cluster, run, extra, dataset)
        run.wait_for_step(30)
        cluster.head("scancel", job)
        cluster.wait_for(job, "CANCELLED")
        time.sleep(8)  # longer than Slurm delays a requeued job
        assert cluster.state(job) == "CANCELLED"
        again = submit(cluster, run, extra, dataset)
        cluster.wait_for(again, "COMPLETED")
    assert run.digest == uninterrupted
    assert run.attempts[-1]["lost_steps"] == 0


@pytest.mark.parametrize("lost", [0, 1], ids=["batch-host", "worker-host"])
def test_a_dead_node_is_replaced_by_a_spare(run, extra, dataset, uninterrupted, lost):
    with Cluster(3) as cluster:
        job = submit(cluster, run, extra, dataset)
        run.wait_for_step(50)
        dead = cluster.hosts(job)[lost]
        cluster.kill(dead)
        cluster.wait_for(job, "COMPLETED")
        assert dead not in cluster.hosts(job)
        assert cluster.restarts(job) == 1
    assert run.digest == uninterrupted
    assert run.attempts[-1]["lost_steps"] <= 20 + 1


def test_without_a_spare_the_run_continues_on_fewer_nodes(run, extra, dataset):
    with Cluster(2) as cluster:
        job = submit(cluster, run, extra, dataset, "--no-kill")
        run.wait_for_step(50)
        worker_host = cluster.hosts(job)[1]
        cluster.kill(worker_host)
        cluster.wait_for(job, "COMPLETED")
        assert cluster.restarts(job) == 0
    assert f"start {job}.0.1 of {run.folder} on n1" in run.output
    # Steps that the lost node had reached are recorded again, as one node sums up in another order.
    steps = {entry["step"] for entry in read_metrics(run.folder) if "train/loss" in entry["metrics"]}
    assert steps == set(range(1, STEPS + 1))


def test_a_disconnected_survivor_cannot_overwrite_a_newer_attempt(run, extra, dataset, tmp_path):
    longer = f"{extra} train.epochs=200"  # Slurm takes 40 s to notice and restart the job
    with Cluster(2) as cluster:
        reference = Run(tmp_path / "reference")
        cluster.wait_for(submit(cluster, reference, longer, dataset, "--nodes=1"), "COMPLETED")

        job = submit(cluster, run, longer, dataset, "--nodes=1")
        run.wait_for_step(20)
        (lost,) = cluster.hosts(job)
        cluster.disconnect(lost)
        cluster.wait_for(job, "COMPLETED")
        assert cluster.hosts(job) != [lost]
        errors = "".join(path.read_text() for path in run.folder.glob(f"logs/{job}.0.0/*.err"))
    assert "has taken over" in errors
    assert run.digest == reference.digest


def test_a_sweep_is_a_job_array_with_one_run_per_learning_rate(tmp_path, extra, dataset):
    extra = extra.replace("optimizer.lr=0.05", "") + " train.epochs=2"
    with Cluster(2) as cluster:
        job = cluster.submit(
            "sweep_lr.sh", tmp_path / "%a.log", "--nodes=1", "--gpus-per-node=1", "--array=0-2%2",
            RUN=f"{tmp_path}/run", EXTRA=extra, DATA=str(dataset), DOCTOR="0",
        )  # fmt: skip
        for task in range(3):
            cluster.wait_for(f"{job}_{task}", "COMPLETED")
    for task, rate in enumerate((0.4, 0.8, 1.2)):
        assert f"lr: {rate}" in (tmp_path / f"run-{task}" / "config.yaml").read_text()


def test_a_task_of_a_design_space_sweep_continues_on_another_node_after_its_own_died(tmp_path, extra, dataset):
    out = tmp_path / "sweep"
    (tmp_path / "small.yaml").write_text(
        "network: regnet\nsample:\n  depth: {uniform: [2, 4]}\n  w0: {choice: [8, 16]}\n  wa: {uniform: [4, 12]}\n"
        "fixed: {stem: cifar, wm: 2.0, group_width: 4}\nkeep: [stages <= 3]\n"
    )
    extra = extra.replace("model.name=densenet_bc_10_4", "") + " train.epochs=8"
    with Cluster(2) as cluster:
        job = cluster.submit(
            "sweep.sh", tmp_path / "%a.log", "--gpus-per-node=1", "--cpus-per-task=1", "--array=0-2%2",
            SPACES=str(tmp_path / "small.yaml"), OUT=str(out), N="3", EXTRA=extra, DATA=str(dataset),
        )  # fmt: skip
        deadline = time.monotonic() + 400
        while not list(out.glob("runs/*/checkpoints/step-*")):
            assert time.monotonic() < deadline, (tmp_path / "0.log").read_text()
            time.sleep(0.02)
        cluster.kill(cluster.hosts(f"{job}_0")[0])
        for task in range(3):
            cluster.wait_for(f"{job}_{task}", "COMPLETED", timeout=800)
    members = Sweep.open(out).current()
    assert [member.status for member in members] == ["done"] * 3
    for member in members:
        steps = [
            entry["step"] for entry in read_metrics(out / "runs" / member.name) if "train/loss" in entry["metrics"]
        ]
        assert (steps, steps[-1]) == (sorted(set(steps)), 102)
    assert (out / "report" / "index.html").exists()


def test_a_user_error_ends_the_job_without_a_restart(run, extra, dataset):
    with Cluster(2) as cluster:
        job = submit(cluster, run, f"{extra} model.num_classes=10", dataset)
        cluster.wait_for(job, "FAILED")
        time.sleep(6)
        assert cluster.state(job) == "FAILED"
    assert "has 3 classes: set model.num_classes=3" in run.output
    assert run.output.count("launch: ") == 2
