import os

from launch.node_env import Node, rank_variables

NODE = Node(0, 1, "127.0.0.1", "job")


def test_the_cores_of_a_node_are_divided_among_its_ranks_unless_the_user_sets_the_threads(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS")
    cores = len(os.sched_getaffinity(0))
    assert [rank_variables(NODE, ranks)["OMP_NUM_THREADS"] for ranks in (1, 2 * cores)] == [str(cores), "1"]
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert "OMP_NUM_THREADS" not in rank_variables(NODE, 1)
