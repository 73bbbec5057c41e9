import pytest

from launch.probe import judge

FIT = {
    "errors": [], "code": "c0de", "config": "c0f1", "data": "da7a", "torch": "2.14.1", "ranks": 8, "gpus": 8,
    "gpu": "NVIDIA H100", "driver": "580.65", "nccl": "2.29", "gflops": 300_000.0, "gpu_used": 0.01, "clock_s": 0.001,
    "link_gbps": 12.0, "all_reduce_gbps": 40.0, "run_free_gb": 900.0, "run_write_gbps": 1.0, "cache_free_gb": 900.0,
    "cache_write_gbps": 2.0,
}  # fmt: skip


def judge_third(**changes: object) -> dict[str, list[str]]:
    """What is said of four hosts, the third of which differs from the others so."""
    return judge([{**FIT, **(changes if number == 2 else {}), "host": f"n{number}"} for number in range(4)])


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"driver": "550.54"}, "other driver: 550.54, and elsewhere 580.65"),
        ({"gpus": 7, "ranks": 7}, "other gpus: 7, and elsewhere 8"),
        ({"nccl": "2.20"}, "other nccl: 2.20, and elsewhere 2.29"),
        ({"config": "other"}, "other config: other, and elsewhere c0f1"),
        ({"gflops": 100_000.0}, "slow GPU, 100,000 Gmul/s, and elsewhere 300,000"),
        ({"gpu_used": 0.4}, "40% of a GPU's memory is taken by others"),
        ({"clock_s": -3.0}, "clock is -3.0 s off"),
        ({"link_gbps": 0.01}, "slow network, 10 MB/s"),
        ({"run_free_gb": 0.2}, "run folder has 0.20 GB left"),
        ({"cache_write_gbps": 0.002}, "slow disk, cache folder takes 2 MB/s"),
        ({"errors": ["data: no such file"]}, "data: no such file"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_the_host_that_differs_is_named_with_the_reason(changes, reason):
    found = judge_third(**changes)
    assert list(found) == ["n2"]
    assert reason in found["n2"]


def test_hosts_that_are_alike_are_fit():
    assert judge_third() == {}
