from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from distrain.checkpoint.files import choose_kept, tmp_checkpoint_path


def test_the_newest_the_best_and_every_nth_are_kept():
    assert choose_kept({5, 10, 15, 20, 25}, newest=2, every=10, best=5) == {5, 10, 20, 25}
    assert choose_kept({5, 10, 15, 20, 25}, newest=1, every=0, best=None) == {25}


@given(st.sets(st.integers(1, 1000), min_size=1), st.integers(1, 5), st.integers(0, 50), st.integers(1, 1000))
def test_the_newest_is_always_kept(steps, newest, every, best):
    assert max(steps) in choose_kept(steps, newest, every, best)


def test_drafts_of_two_attempts_at_a_step_never_share_a_folder():
    final = Path("checkpoints/step-00000007")
    assert tmp_checkpoint_path(final, "a" * 32) != tmp_checkpoint_path(final, "b" * 32)
