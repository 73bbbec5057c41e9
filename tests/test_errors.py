import pytest

from distrain import errors
from distrain.errors import nearest


def test_exit_codes_are_those_that_launchers_and_scripts_decide_by():
    assert (errors.EXIT_DONE, errors.EXIT_STOPPED, errors.EXIT_USER) == (0, 75, 78)


@pytest.mark.parametrize(
    ("known", "shown", "phrase"),
    [
        (["lanes", "per_lane"], None, "did you mean lanes?"),
        (["z", "y"], None, "known: y, z"),
        (["z", "y"], ["w"], "known: w"),
        ("abcdefghijkl", None, "known: a, b, c, d, e, f, g, h, i, j, k, l"),
        ("abcdefghijklm", None, "known: a, b, c, d, e, f, g, h, i, j, k, l, ..."),
    ],
    ids=str,
)
def test_a_misspelled_name_is_answered_by_the_nearest_one_or_by_those_there_are(known, shown, phrase):
    assert nearest("lane", known, shown) == phrase
