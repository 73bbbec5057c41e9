from distrain.sweep.halving import Halving, wanted_rounds


def test_a_third_continues_once_all_have_finished_a_round():
    names = [f"m{number}" for number in range(9)]
    waiting = {name: [0.1 * number] for number, name in enumerate(names)} | {"m8": []}
    assert wanted_rounds(waiting, Halving((1, 3), 1 / 3)) == dict.fromkeys(names, 1)
    first = waiting | {"m8": [0.05]}
    assert wanted_rounds(first, Halving((1, 3), 1 / 3)) == dict.fromkeys(names, 1) | {"m0": 2, "m8": 2, "m1": 2}
    second = first | {"m0": [0.0, 0.3], "m8": [0.05, 0.2], "m1": [0.1, 0.4]}
    assert wanted_rounds(second, Halving((1, 3), 1 / 3)) == dict.fromkeys(names, 1) | {"m0": 2, "m8": 3, "m1": 2}


def test_a_failed_member_counts_but_does_not_continue():
    reached = {"a": [None], "b": [0.9], "c": [0.8], "d": [None]}
    assert wanted_rounds(reached, Halving((1,), 0.5)) == {"a": 1, "b": 2, "c": 2, "d": 1}
    assert wanted_rounds({"a": [None], "b": [None]}, Halving((1,), 0.5)) == {"a": 1, "b": 1}
    assert wanted_rounds({"a": [0.5, None], "b": [0.6]}, Halving((1,), 0.5)) == {"a": 2, "b": 1}


def test_without_halving_everyone_trains_to_the_end():
    assert wanted_rounds({"a": [], "b": [0.5]}, Halving()) == {"a": 1, "b": 1}
