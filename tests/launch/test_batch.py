"""launch/batch.sh with commands that stand in for Slurm's, for what a real one does only in minutes or by accident."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]

COMMANDS = {
    "srun": 'echo "srun $*" >>calls; read -r code <codes; sed -i 1d codes; exit "$code"',
    "squeue": """
        if [ -s failures ]; then
            sed -i 1d failures
            echo "slurm_load_jobs error: Unable to contact slurm controller (connect failure)" >&2
            exit 1
        fi
        case "${*: -1}" in
            %T) echo "$STATE" ;;
            *) [ -z "${SIGNAL:-}" ] || kill -TERM "$(cat pid)"; echo "$NODES" ;;
        esac""",
    "scontrol": """
        [ "$1" = requeue ] || { echo n1; exit; }
        echo "$*" >>calls
        [ ! -s refusals ] || { cat refusals; sed -i 1d refusals; exit 1; }""",
}


class Batch:
    """A job on two nodes whose step ends with one exit code after another."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        for name, script in COMMANDS.items():
            path = folder / name
            path.write_text(f"#!/usr/bin/env bash\n{script}\n")
            path.chmod(0o755)

    def run(self, *codes: int, failures: int = 0, refusals: tuple[str, ...] = (), **variables: str) -> int:
        """The exit code. The first `failures` calls of squeue fail, and scontrol requeue answers with `refusals`."""
        for name, lines in (("codes", codes), ("failures", range(failures)), ("refusals", refusals)):
            (self._folder / name).write_text("".join(f"{line}\n" for line in lines))
        env = {
            **os.environ, "PATH": f"{self._folder}:{os.environ['PATH']}", "PYTHONPATH": str(REPOSITORY),
            "PYTHON": sys.executable, "SLURM_SUBMIT_DIR": str(self._folder), "SLURM_JOB_NUM_NODES": "2",
            "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_ID": "7", "CONFIG": "a.yaml", "DOCTOR": "0", "STATE": "RUNNING",
            "NODES": "2 n[1-2]", **variables,
        }  # fmt: skip
        script = f"echo $$ >'{self._folder}/pid'; . '{REPOSITORY}/launch/batch.sh'"
        done = subprocess.run(["bash", "-c", script], env=env, capture_output=True, text=True, timeout=240)
        self.output = done.stdout + done.stderr
        return done.returncode

    @property
    def calls(self) -> list[str]:
        return (self._folder / "calls").read_text().splitlines()

    @property
    def requeues(self) -> int:
        return self.calls.count("requeue 7")

    @property
    def starts(self) -> list[str]:
        return [call for call in self.calls if call.startswith("srun")]


@pytest.fixture
def batch(tmp_path) -> Batch:
    return Batch(tmp_path)


def test_a_crash_while_the_controller_is_away_is_not_taken_for_a_cancelled_job(batch):
    assert batch.run(1, 0, failures=2) == 0, batch.output
    assert "the Slurm controller does not answer; waiting for it" in batch.output
    assert len(batch.starts) == 2
    assert batch.requeues == 0


def test_a_crash_of_a_cancelled_job_starts_nothing(batch):
    assert batch.run(1, STATE="COMPLETING") == 75
    assert (len(batch.starts), batch.requeues) == (1, 0)


def test_a_requeue_that_fails_is_tried_again(batch):
    assert batch.run(75, refusals=("Unable to contact slurm controller",)) == 75
    assert batch.requeues == 2


def test_a_job_that_cannot_be_requeued_says_so_and_exits_1(batch):
    assert batch.run(75, refusals=("Requested operation is presently disabled",)) == 1
    assert "NOT requeued: everything is saved, submit the job again to continue" in batch.output


def test_with_fewer_nodes_than_min_nodes_the_job_is_requeued(batch):
    assert batch.run(1, NODES="1 n2", MIN_NODES="2") == 75
    assert (len(batch.starts), batch.requeues) == (1, 1)


def test_with_as_many_nodes_as_min_nodes_the_run_continues_on_them(batch):
    assert batch.run(1, 0, NODES="1 n2", MIN_NODES="1") == 0
    assert "--nodes=2" in batch.starts[0]
    assert "--nodes=1" in batch.starts[1]
    assert batch.requeues == 0


def test_a_job_that_is_gone_starts_nothing(batch):
    assert batch.run(1, NODES="") == 75
    assert "integer expression" not in batch.output
    assert (len(batch.starts), batch.requeues) == (1, 0)


def test_a_signal_between_two_starts_requeues_without_a_second(batch):
    assert batch.run(1, SIGNAL="1") == 75
    assert (len(batch.starts), batch.requeues) == (1, 1)


@pytest.fixture
def pauses(tmp_path) -> Path:
    """A file of the seconds that the job slept, instead of sleeping."""
    sleep = tmp_path / "sleep"
    sleep.write_text(f"#!/bin/sh\necho $1 >>{tmp_path}/pauses\n")
    sleep.chmod(0o755)
    return tmp_path / "pauses"


def test_starts_that_crash_before_training_are_given_up_after_growing_pauses(batch, pauses):
    assert batch.run(1, 1, 1, 0) == 1
    assert len(batch.starts) == 3
    assert "giving up: 3 starts in a row crashed before training began" in batch.output
    assert pauses.read_text().split() == ["1", "2"]


def test_a_run_that_its_stop_file_ended_is_not_requeued(batch, tmp_path):
    attempts = tmp_path / "runs" / "a" / "attempts"
    attempts.mkdir(parents=True)
    srun = (tmp_path / "srun").read_text()
    record = '{"number": 1, "end": "stopped by file stop", "committed": 5}'
    (tmp_path / "srun").write_text(srun.replace("read -r", f"echo '{record}' >{attempts}/00000001.json; read -r"))
    assert batch.run(75) == 75
    assert "stopped by the stop file; submit the job again to continue" in batch.output
    assert batch.requeues == 0


@pytest.mark.parametrize(("code", "starts"), [(78, 1), (0, 2)])
def test_training_begins_only_on_healthy_hosts(batch, code, starts):
    assert batch.run(code, 0, DOCTOR="") == code
    assert len(batch.starts) == starts
    assert "--doctor" in batch.starts[0]
    assert ("fix the unhealthy hosts" in batch.output) == (code == 78)


def test_the_number_of_ranks_reaches_every_node(batch):
    assert batch.run(0, RANKS="3") == 0
    assert " --ranks 3 " in batch.starts[0]


@pytest.mark.parametrize(("code", "expected", "requeues"), [(0, 0, 0), (78, 78, 0), (75, 75, 1), (1, 1, 0)])
def test_without_an_answer_of_the_restart_policy_the_exit_code_decides(
    batch, pauses, tmp_path, code, expected, requeues
):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexit 1\n")
    python.chmod(0o755)
    assert batch.run(code, PYTHON=str(python)) == expected, batch.output
    assert batch.requeues == requeues


def test_every_word_of_extra_is_a_setting(batch):
    assert batch.run(0, EXTRA=" optimizer.lr=1\n\ttrain.epochs=2  a='*'\n") == 0
    assert batch.starts[0].endswith(" optimizer.lr=1 train.epochs=2 a='*'")


@pytest.mark.parametrize("setting", ["run.name=x", "run.dir=/x"])
def test_the_folder_of_a_run_is_not_set_in_extra(batch, setting):
    assert batch.run(0, EXTRA=f"train.epochs=2 {setting}") == 78
    assert batch.output == f"launch: EXTRA: {setting}: set RUN, the folder of the run, instead\n"


@pytest.mark.parametrize(
    ("run", "folder"),
    [
        ("-rf/a b", "./-rf/a b"),
        ("-x", "./-x"),
        ("~/a", "HOME/a"),
        ("'q'/$(touch x)", "'q'/$(touch x)"),
        ("[a]*/#?", "[a]*/#?"),
    ],
)
def test_batch_and_ranks_have_the_same_idea_of_the_runs_folder(batch, tmp_path, run, folder):
    assert batch.run(0, RUN=run, HOME=f"{tmp_path}/HOME") == 0, batch.output
    (start,) = batch.starts
    used = (tmp_path / folder).resolve()
    assert used.is_dir()
    words = start.partition(" -- --config=a.yaml run.dir=")[2]
    parent, _, name = words.partition("' run.name=")
    assert (tmp_path / parent.removeprefix("'") / name).resolve() == used
    assert not (tmp_path / "x").exists()
