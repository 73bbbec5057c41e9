from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from distrain.data.plan import Plan, epoch_order

plans = st.builds(
    Plan,
    samples=st.integers(1, 200),
    lanes=st.integers(1, 7),
    per_lane=st.integers(2, 9),
    epochs=st.just(3.0),
    seed=st.integers(0, 2**63),
)


@given(plans)
def test_every_epoch_holds_every_sample_once(plan):
    steps = -(-3 * plan.samples // plan.batch)  # enough to end three epochs
    seen = Counter(
        (int(epoch), int(sample))
        for step in range(steps)
        for lane in range(plan.lanes)
        for sample, epoch in zip(*plan.lane_batch(step, lane), strict=True)
    )
    whole = {(epoch, sample): 1 for epoch in range(3) for sample in range(plan.samples)}
    assert {key: count for key, count in seen.items() if key[0] < 3} == whole
    assert sum(seen.values()) == steps * plan.batch


@given(plans, st.integers(0, 30), st.integers(1, 4))
def test_the_order_depends_on_nothing_but_seed_and_epoch(plan, step, factor):
    """Twice as many lanes of half the size are the same steps."""
    wide = Plan(plan.samples, plan.lanes * factor, plan.per_lane, plan.epochs, plan.seed)
    deep = Plan(plan.samples, plan.lanes, plan.per_lane * factor, plan.epochs, plan.seed)
    np.testing.assert_array_equal(
        np.concatenate([wide.lane_batch(step, lane).ids for lane in range(wide.lanes)]),
        np.concatenate([deep.lane_batch(step, lane).ids for lane in range(deep.lanes)]),
    )


def test_epochs_and_seeds_are_shuffled_differently():
    orders = [epoch_order(seed, epoch, 1000) for seed in (0, 1) for epoch in (0, 1)]
    for a in range(4):
        assert sorted(orders[a]) == list(range(1000))
        for b in range(a):
            assert np.mean(orders[a] == orders[b]) < 0.02


def test_steps_are_epochs_times_samples_over_batch_rounded():
    assert Plan(50_000, 2, 32, 2, 0).steps == 1562  # 1562.5, half to even
    assert Plan(203, 3, 4, 3, 0).steps == 51  # 50.75
    assert Plan(10, 8, 32, 1, 0).steps == 1


def test_boundaries_are_every_so_many_epochs_and_the_end():
    assert Plan(100, 2, 5, 2.5, 0).steps_every(1) == {10, 20, 25}
    assert Plan(100, 2, 5, 1, 0).steps_every(0.5) == {5, 10}
    assert Plan(100, 2, 5, 1, 0).steps_every(3) == {10}
