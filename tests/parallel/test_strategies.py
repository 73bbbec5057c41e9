"""Every strategy computes the same, and resumes the state of any other on any number of ranks."""

import importlib
import itertools
import tokenize
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from support.strategies import DENSENET, STRATEGIES, Outcome, assert_equal_states, run_tasks, task

from distrain.parallel.deepspeed_state import INTERNALS

REGNET = (
    "model.name=regnet",
    "model.options={depth: 3, w0: 16, wa: 8, wm: 2.0, group_width: 8, se_ratio: 0.25, zero_gamma: true, "
    "stem: cifar, strides: [1, 2]}",
)
OPTIMIZERS = {
    "sgd": ("optimizer.name=sgd", "optimizer.lr=0.005"),
    "adamw": ("optimizer.name=adamw", "optimizer.lr=0.0003", "optimizer.eps=0.01"),
}


@pytest.fixture(scope="module")
def fifteen_steps(tmp_path_factory) -> dict[tuple[str, str, str], Outcome]:
    """Both families under both optimizers and every strategy: two ranks of two lanes each."""
    folder = tmp_path_factory.mktemp("fifteen")
    cases = list(itertools.product(("densenet", "regnet"), OPTIMIZERS, STRATEGIES))
    lanes = ("batch.lanes=4", "batch.per_lane=16")
    tasks = [
        task(
            folder, "-".join((family, optimizer, strategy)), f"parallel.strategy={strategy}", *lanes,
            *OPTIMIZERS[optimizer], *(DENSENET if family == "densenet" else REGNET), last=15,
        )
        for family, optimizer, strategy in cases
    ]  # fmt: skip
    return dict(zip(cases, run_tasks(tasks, 2, folder), strict=True))


@pytest.mark.parametrize("strategy", STRATEGIES[1:])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("family", ["densenet", "regnet"])
def test_all_strategies_compute_the_same(fifteen_steps, family, optimizer, strategy):
    plain, other = (fifteen_steps[family, optimizer, name] for name in ("ddp", strategy))
    assert plain.losses[-1] < plain.losses[0]
    assert max(plain.norms) > 0.5  # or nothing was clipped
    np.testing.assert_allclose(other.losses, plain.losses, rtol=1e-5)
    np.testing.assert_allclose(other.norms, plain.norms, rtol=1e-4)
    weights, plain_weights = (
        {name: tensor for name, tensor in outcome.state.items() if name.startswith("model/")}
        for outcome in (other, plain)
    )
    assert_equal_states(weights, plain_weights, rtol=1e-5, atol=1e-5)
    assert other.state.keys() == plain.state.keys()


def test_fused_dense_blocks_train_the_same_under_every_strategy(tmp_path):
    settings = ("batch.lanes=4", "batch.per_lane=8", *DENSENET, *OPTIMIZERS["sgd"])
    # DeepSpeed does not partition small weights: here those of the 1x1 convolutions are large enough.
    wide = ("model.name=densenet", "model.options={depths: [2], growth_rate: 48, stem_width: 600, stem: cifar}")
    fused, zero3 = "train.dense_block=fused", "parallel.strategy=zero3"
    plain, plain_wide, fused_wide, *others = run_tasks(
        [
            task(tmp_path, "plain", *settings, last=6),
            task(tmp_path, "plain-wide", *settings, *wide, last=2),
            task(tmp_path, "fused-wide", *settings, *wide, fused, zero3, last=2),
            *(task(tmp_path, name, *settings, fused, f"parallel.strategy={name}", last=6) for name in STRATEGIES),
            task(tmp_path, "flat", *settings, fused, "train.graphs=on", last=6),
        ],
        2,
        tmp_path,
    )
    np.testing.assert_allclose(fused_wide.losses, plain_wide.losses, rtol=1e-5)
    for other in others:
        np.testing.assert_allclose(other.losses, plain.losses, rtol=1e-4)
        weights, expected = (
            {name: tensor for name, tensor in outcome.state.items() if name.startswith("model/")}
            for outcome in (other, plain)
        )
        assert_equal_states(weights, expected, rtol=1e-4, atol=1e-5)
    assert others[0].losses != plain.losses  # or nothing was fused


HALF, END = 3, 5


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> tuple[Path, dict[str, Outcome]]:
    """Each strategy on two ranks: to the end, and to half-way, where its state is saved."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    whole = [task(folder, f"{name}-end", *resumable(name), last=END) for name in STRATEGIES]
    halves = [task(folder, f"{name}-half", *resumable(name), last=HALF) for name in STRATEGIES]
    outcomes = run_tasks([*whole, *halves], 2, folder)
    return folder, dict(zip(STRATEGIES, outcomes, strict=False))


def resumable(strategy: str) -> tuple[str, ...]:
    lanes = ("batch.lanes=6", "batch.per_lane=4")
    return f"parallel.strategy={strategy}", *lanes, *DENSENET, *OPTIMIZERS["adamw" if strategy == "zero2" else "sgd"]


Pair = tuple[str, str]
PAIRS = list(itertools.product(STRATEGIES, STRATEGIES))
FOLLOWING = dict(zip(STRATEGIES, (*STRATEGIES[1:], STRATEGIES[0]), strict=True))
NEIGHBORS = [(before, after) for before, after in PAIRS if after in (before, FOLLOWING[before])]


def resume(pairs: list[Pair], ranks: int, saved: Path, folder: Path) -> dict[Pair, Outcome]:
    """Half-way states of the first strategy of each pair, resumed by the second."""
    tasks = [
        task(
            folder, f"{before}-{after}", *resumable(before), f"parallel.strategy={after}", first=HALF, last=END,
            load=str(saved / f"{before}-half.pt"),
        )
        for before, after in pairs
    ]  # fmt: skip
    return dict(zip(pairs, run_tasks(tasks, ranks, folder), strict=True))


def assert_continued(found: Outcome, expected: Outcome) -> None:
    np.testing.assert_allclose(found.losses, expected.losses[HALF:], rtol=1e-5)
    assert_equal_states(found.state, expected.state, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def resumed_on_two(uninterrupted, tmp_path_factory) -> dict[Pair, Outcome]:
    return resume(PAIRS, 2, uninterrupted[0], tmp_path_factory.mktemp("resumed"))


@pytest.mark.parametrize(("before", "after"), PAIRS)
def test_a_state_resumes_under_every_strategy(uninterrupted, resumed_on_two, before, after):
    found, expected = resumed_on_two[before, after], uninterrupted[1][before]
    assert_continued(found, expected)
    if before == after:
        assert found.losses == expected.losses[HALF:]
        assert_equal_states(found.state, expected.state, rtol=0, atol=0)


@pytest.fixture(scope="module", params=[1, 3])
def resumed_on_other_ranks(request, uninterrupted, tmp_path_factory) -> dict[Pair, Outcome]:
    return resume(NEIGHBORS, request.param, uninterrupted[0], tmp_path_factory.mktemp("resumed"))


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), NEIGHBORS)
def test_a_state_resumes_on_other_numbers_of_ranks(uninterrupted, resumed_on_other_ranks, before, after):
    assert_continued(resumed_on_other_ranks[before, after], uninterrupted[1][before])


@pytest.mark.parametrize("ranks", [1, 2, pytest.param(3, marks=pytest.mark.slow)])
def test_gradients_in_one_tensor_as_cuda_graphs_need_them_train_the_same(ranks, tmp_path):
    """On one or two ranks bit for bit; the order of a sum over three depends on where in a message a number is."""
    exact = ranks < 3
    precision = "train.precision=bf16" if exact else "train.precision=fp32"  # in bf16 the last bit is 0.4 %
    settings = ("batch.lanes=5", "batch.per_lane=4", precision, *DENSENET, *OPTIMIZERS["sgd"])
    plain, flat = run_tasks(
        [task(tmp_path, name, *settings, f"train.graphs={name}", last=4, poison=2) for name in ("off", "on")],
        ranks,
        tmp_path,
    )
    assert flat.applied == plain.applied == [True, True, False, True]
    np.testing.assert_allclose(flat.losses, plain.losses, rtol=0 if exact else 1e-5)
    assert_equal_states(flat.state, plain.state, rtol=0 if exact else 1e-4, atol=0 if exact else 1e-5)


@pytest.fixture(scope="module")
def in_fp16(tmp_path_factory) -> dict[tuple[str, str], Outcome]:
    """Five steps in fp16, the third with an image of NaN: uninterrupted, and with a restart after the fourth."""
    folder = tmp_path_factory.mktemp("fp16")
    cases, tasks = [], []
    for name in STRATEGIES:
        settings = (f"parallel.strategy={name}", "batch.lanes=2", "batch.per_lane=4", "train.precision=fp16", *DENSENET)
        tasks += [
            task(folder, f"{name}-before", *settings, last=2),
            task(folder, f"{name}-poisoned", *settings, last=3, poison=2),
            task(folder, f"{name}-half", *settings, last=4, poison=2),
            task(folder, f"{name}-resumed", *settings, first=4, last=5, load=str(folder / f"{name}-half.pt")),
            task(folder, f"{name}-whole", *settings, last=5, poison=2),
        ]
        cases += [(name, stage) for stage in ("before", "poisoned", "half", "resumed", "whole")]
    return dict(zip(cases, run_tasks(tasks, 2, folder), strict=True))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_gradient_that_is_not_finite_changes_only_the_loss_scale(in_fp16, strategy):
    before, after = in_fp16[strategy, "before"].state, in_fp16[strategy, "poisoned"].state
    assert in_fp16[strategy, "poisoned"].applied == [True, True, False]
    assert after["scale/value"] == before["scale/value"] / 2
    scale = {"scale/value", "scale/growth_tracker"}
    assert_equal_states(
        {name: tensor for name, tensor in after.items() if name not in scale},
        {name: tensor for name, tensor in before.items() if name not in scale},
        rtol=0,
        atol=0,
    )


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_loss_scale_of_fp16_is_restored_after_a_restart(in_fp16, strategy):
    resumed, whole = in_fp16[strategy, "resumed"], in_fp16[strategy, "whole"]
    assert whole.state["scale/value"] == 2.0**15
    assert whole.state["scale/growth_tracker"] == 2
    assert resumed.losses == whole.losses[4:]
    assert_equal_states(resumed.state, whole.state, rtol=0, atol=0)


@pytest.mark.parametrize(("path", "name"), [(path, name) for path, names in INTERNALS.items() for name in names])
def test_deepspeed_has_the_internals_that_its_state_is_read_by(path, name):
    module, _, owner = path.rpartition(".")
    assert hasattr(importlib.import_module(module), owner), f"DeepSpeed no longer has {path}"
    used = names_in(Path(importlib.import_module(module).__file__))
    assert name in used, f"DeepSpeed's {owner} no longer has {name}: fix distrain/parallel/deepspeed_state.py"


@cache
def names_in(source: Path) -> set[str]:
    """The names that occur in the code of a file, not in its comments and texts."""
    with tokenize.open(source) as file:
        return {token.string for token in tokenize.generate_tokens(file.readline) if token.type == tokenize.NAME}
