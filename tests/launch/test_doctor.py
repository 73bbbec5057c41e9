import subprocess
import sys

import pytest
from support.processes import SMALL, environment, free_port

from launch.doctor import find_unhealthy

HEALTHY = {
    "errors": [], "code": "c0de", "config": "c0f1", "data": "da7a", "torch": "2.14.1", "ranks": 8, "gpus": 8,
    "gpu": "NVIDIA H100", "driver": "580.65", "nccl": "2.29", "gmacs": 300_000.0, "gpu_used": 0.01, "clock_s": 0.001,
    "link_rate": 12e9, "all_reduce_rate": 40e9, "run_free": 900 * 10**9, "run_write_rate": 1e9,
    "cache_free": 900 * 10**9, "cache_write_rate": 2e9,
}  # fmt: skip


def check_with_third(**changes: object) -> dict[str, list[str]]:
    """The unhealthy ones of four hosts, of which the third has these changes."""
    return find_unhealthy(
        [{**HEALTHY, **(changes if number == 2 else {}), "host": f"n{number}"} for number in range(4)]
    )


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"driver": "550.54"}, "different driver: 550.54, other hosts have 580.65"),
        ({"gpus": 7, "ranks": 7}, "different gpus: 7, other hosts have 8"),
        ({"nccl": "2.20"}, "different nccl: 2.20, other hosts have 2.29"),
        ({"config": "other"}, "different config: other, other hosts have c0f1"),
        ({"gmacs": 100_000.0}, "slow GPU: 100,000 GMAC/s, the median is 300,000"),
        ({"gpu_used": 0.4}, "other processes use 40% of a GPU's memory"),
        ({"clock_s": -3.0}, "clock is -3.0 s off"),
        ({"link_rate": 1e7}, "slow network: 10.0 MB/s"),
        ({"run_free": 2 * 10**8}, "disk almost full: run folder has 200.0 MB free"),
        ({"cache_write_rate": 2e6}, "slow disk: cache folder writes 2.0 MB/s"),
        ({"run_shared": False}, "run.dir is not shared: a file that n0 writes to the run's folder is not there"),
        ({"errors": ["data: no such file"]}, "data: no such file"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_an_unhealthy_host_is_named_with_the_reason(changes, reason):
    found = check_with_third(**changes)
    assert list(found) == ["n2"]
    assert reason in found["n2"]


def test_equal_hosts_are_healthy():
    assert check_with_third() == {}


def rank_variables(number: int, port: int) -> dict[str, str]:
    """The environment of one of two ranks, each on a host of its own."""
    return {
        **environment(), "RANK": str(number), "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1",
        "GROUP_RANK": str(number), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "DISTRAIN_HOST": f"n{number}",
    }  # fmt: skip


def test_a_run_folder_on_the_disk_of_each_host_is_found_before_training(on_dataset, tmp_path):
    port, hosts = free_port(), []
    for number in range(2):
        (own := tmp_path / f"n{number}").mkdir()
        command = [sys.executable, "-m", "launch.check", *SMALL, *on_dataset, "run.dir=runs", "run.name=run"]
        options = {"cwd": own, "env": rank_variables(number, port), "text": True}
        hosts.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options))
    output = hosts[0].communicate(timeout=400)[0]
    assert "unhealthy: n1: run.dir is not shared: a file that n0 writes to the run's folder is not there" in output
    assert [host.wait(timeout=240) for host in hosts] == [78, 78]
    assert not list(tmp_path.glob("*/runs/run/.doctor-*"))


def test_a_host_that_does_not_answer_is_named_and_not_waited_for(on_dataset, tmp_path):
    # Patience is shortened from a minute, and the second host hangs once it is connected.
    program = (
        "import sys, time; from distrain.__main__ import entry; from launch import doctor\n"
        "doctor._PATIENCE_S = 2\n"
        "if sys.argv.pop(1) == 'hangs': doctor.Group._await_all_ranks = lambda group: time.sleep(600)\n"
        "entry(doctor.main)"
    )
    words, port = [*SMALL, *on_dataset, f"run.dir={tmp_path}", "run.name=run"], free_port()
    answering, hanging = (
        subprocess.Popen(
            [sys.executable, "-c", program, state, *words], env=rank_variables(number, port), text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for number, state in enumerate(("answers", "hangs"))
    )  # fmt: skip
    try:
        output = answering.communicate(timeout=400)[0]
    finally:
        hanging.kill()
        hanging.communicate()
    assert (answering.returncode, output.splitlines()[-1]) == (
        1,
        "distrain: rank 1 did not start within 2 s: this attempt ends",
    )


def test_a_path_with_an_equals_sign_is_a_configuration_and_not_an_override(on_dataset, tmp_path):
    path = tmp_path / "lr=0.1.yaml"
    path.write_text("run: {name: run}")
    command = [sys.executable, "-m", "launch", "doctor", "--ranks", "1", f"run.dir={tmp_path}", "--config", str(path)]
    done = subprocess.run([*command, *SMALL, *on_dataset], capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all 1 hosts are healthy" in done.stdout
