import itertools

import pytest

from distrain.errors import TemporaryError
from launch.node_env import Node
from launch.rendezvous import meet


def test_a_node_does_not_join_another_job_that_has_the_same_port():
    own = Node(0, 1, "127.0.0.1", "own-0")
    names = (f"other{number}-0" for number in itertools.count())
    other = next(node for name in names if (node := Node(1, 2, "127.0.0.1", name)).port == own.port)
    store = meet(own, timeout=10)
    with pytest.raises(TemporaryError, match=f"port {own.port} of 127.0.0.1 serves another job, 'own-0': not joined"):
        meet(other, timeout=10)
    del store


@pytest.mark.parametrize(
    ("job", "newer"),
    [("1_a-0", True), ("1_a-doctor", True), ("1_a-1", False), ("1_a-2", False), ("1_b-0", False), ("-0", False)],
)
def test_only_an_earlier_start_by_the_same_launcher_is_replaced(job, newer):
    assert Node(0, 1, "127.0.0.1", "1_a-1").is_newer_than(job) is newer
