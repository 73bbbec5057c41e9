import time

import pytest

from distrain.data.shards.interrupts import Canceled, map_threads


def test_an_error_cancels_what_is_running_and_what_has_not_begun():
    begun, canceled = [], []

    def work(item, poll):
        begun.append(item)
        if item == 0:
            time.sleep(0.1)  # until the other thread has its item
            raise ValueError("damaged")
        for _ in range(500):
            time.sleep(0.01)
            try:
                poll()
            except Canceled:
                canceled.append(item)
                raise

    with pytest.raises(ValueError, match="damaged"):
        list(map_threads(work, range(20), 2))
    assert sorted(canceled) == sorted(begun)[1:]
    assert len(begun) <= 3  # the failed thread may begin one more
