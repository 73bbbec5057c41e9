import json

import pytest
from support.execution import kept_bytes, modes, settings

from distrain.errors import UserError
from distrain.execution.prepare import prepare
from distrain.execution.recomputation import blocks_of, set_level


def test_every_level_recomputes_more_and_keeps_less(network):
    blocks = blocks_of(network)
    sizes = []
    for level in range(2 * len(blocks) + 1):
        set_level(blocks, level)
        sizes.append(kept_bytes(network, 2))
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) == len(sizes)
    set_level(blocks, 2)
    assert modes(network) == ["selective"] * 2 + ["none"] * 7
    set_level(blocks, 11)
    assert modes(network) == ["full"] * 2 + ["selective"] * 7


def test_auto_recomputes_the_least_that_fits_the_budget(network, group, tmp_path):
    budget = 0.7 * kept_bytes(network, 4)
    config = settings(tmp_path, "train.recompute=auto", f"train.activation_gb={budget / 1e9}")
    lines = []
    prepare(config, network, group, lines.append)
    assert kept_bytes(network, 4) <= budget
    level = json.loads((tmp_path / "run" / "decisions.json").read_text())["recompute_level"]
    set_level(blocks_of(network), level - 1)
    assert kept_bytes(network, 4) > budget
    assert lines[0].startswith(f"train.recompute=auto: recomputing {level} of 9 blocks; activations take ")


def test_a_budget_that_nothing_fits_is_one_line(network, group, tmp_path):
    config = settings(tmp_path, "train.recompute=auto", "train.activation_gb=0.0001")
    with pytest.raises(UserError, match=r"train\.activation_gb=0\.0001 is too small: .* raise it, or lower batch"):
        prepare(config, network, group, print)
