"""Every strategy computes the same, and takes over what any other has left, on any number of ranks."""

import importlib
import itertools
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from support.processes import environment

from distrain.parallel.deepspeed_state import INSIDES

STRATEGIES = ("ddp", "zero0", "zero1", "zero2", "zero3")
DENSENET = ("model.name=densenet_bc_10_4",)
REGNET = (
    "model.name=regnet",
    "model.options={depth: 3, w0: 16, wa: 8, wm: 2.0, group_width: 8, se_ratio: 0.25, zero_gamma: true, "
    "stem: cifar, strides: [1, 2]}",
)
OPTIMIZERS = {
    "sgd": ("optimizer.name=sgd", "optimizer.lr=0.005"),
    "adamw": ("optimizer.name=adamw", "optimizer.lr=0.0003", "optimizer.eps=0.01"),
}
# Small steps: rounding that differs in the last bit grows to something else within tens of large ones.
COMMON = ("train.precision=fp32", "optimizer.weight_decay=0.001", "optimizer.clip_norm=0.5")


@dataclass
class Done:
    """What came of a task: see strategies_main.py."""

    losses: list[float]
    norms: list[float]
    applied: list[bool]
    state: dict[str, torch.Tensor]


def task(folder: Path, name: str, *settings: str, first: int = 0, last: int, **rest) -> dict:
    save = str(folder / f"{name}.pt")
    return {"settings": [*COMMON, *settings], "first": first, "last": last, "save": save, **rest}


def perform(tasks: list[dict], ranks: int, folder: Path) -> list[Done]:
    """Do them all in one process group of so many ranks."""
    file = folder / f"tasks-on-{ranks}.json"
    file.write_text(json.dumps(tasks))
    program = str(Path(__file__).parents[1] / "support" / "strategies_main.py")
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    ended = subprocess.run(
        [sys.executable, *torchrun, program, str(file)], capture_output=True, text=True, env=environment(), timeout=250
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    results = json.loads(file.with_suffix(".results").read_text())
    return [Done(**result, state=torch.load(one["save"])) for one, result in zip(tasks, results, strict=True)]


def assert_equal_states(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], **tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, msg=lambda text, name=name: f"{name}: {text}", **tolerance)


@pytest.fixture(scope="module")
def thirty_steps(tmp_path_factory) -> dict[tuple[str, str, str], Done]:
    """Both families under both optimizers and every strategy: two ranks of two lanes each."""
    folder = tmp_path_factory.mktemp("thirty")
    cases = list(itertools.product(("densenet", "regnet"), OPTIMIZERS, STRATEGIES))
    lanes = ("batch.lanes=4", "batch.per_lane=16")
    tasks = [
        task(
            folder, "-".join((family, optimizer, strategy)), f"parallel.strategy={strategy}", *lanes,
            *OPTIMIZERS[optimizer], *(DENSENET if family == "densenet" else REGNET), last=30,
        )
        for family, optimizer, strategy in cases
    ]  # fmt: skip
    return dict(zip(cases, perform(tasks, 2, folder), strict=True))


@pytest.mark.parametrize("strategy", STRATEGIES[1:])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("family", ["densenet", "regnet"])
def test_all_strategies_compute_the_same(thirty_steps, family, optimizer, strategy):
    plain, other = (thirty_steps[family, optimizer, name] for name in ("ddp", strategy))
    assert plain.losses[-1] < plain.losses[0]
    assert max(plain.norms) > 0.5  # or nothing was clipped
    np.testing.assert_allclose(other.losses, plain.losses, rtol=1e-5)
    np.testing.assert_allclose(other.norms, plain.norms, rtol=1e-4)
    weights, plain_weights = (
        {name: tensor for name, tensor in done.state.items() if name.startswith("model/")} for done in (other, plain)
    )
    assert_equal_states(weights, plain_weights, rtol=1e-5, atol=1e-5)
    assert other.state.keys() == plain.state.keys()


HALF, END = 5, 9


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> tuple[Path, dict[str, Done]]:
    """Each strategy on two ranks: to the end, and halfway, where its state is saved."""
    folder = tmp_path_factory.mktemp("undisturbed")
    whole = [task(folder, f"{name}-end", *resumable(name), last=END) for name in STRATEGIES]
    halves = [task(folder, f"{name}-half", *resumable(name), last=HALF) for name in STRATEGIES]
    done = perform([*whole, *halves], 2, folder)
    return folder, dict(zip(STRATEGIES, done, strict=False))


def resumable(strategy: str) -> tuple[str, ...]:
    lanes = ("batch.lanes=6", "batch.per_lane=4")
    return f"parallel.strategy={strategy}", *lanes, *DENSENET, *OPTIMIZERS["adamw" if strategy == "zero2" else "sgd"]


@pytest.fixture(
    scope="module", params=[pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(3, marks=pytest.mark.slow)]
)
def resumed(request, uninterrupted, tmp_path_factory) -> tuple[int, dict[tuple[str, str], Done]]:
    """Every half-way state taken over by every strategy."""
    ranks, (saved, _), folder = request.param, uninterrupted, tmp_path_factory.mktemp("resumed")
    cases = list(itertools.product(STRATEGIES, STRATEGIES))
    tasks = [
        task(
            folder, f"{before}-{after}", *resumable(before), f"parallel.strategy={after}", first=HALF, last=END,
            load=str(saved / f"{before}-half.pt"),
        )
        for before, after in cases
    ]  # fmt: skip
    return ranks, dict(zip(cases, perform(tasks, ranks, folder), strict=True))


@pytest.mark.parametrize(("before", "after"), list(itertools.product(STRATEGIES, STRATEGIES)))
def test_a_state_goes_on_under_every_strategy_on_any_number_of_ranks(uninterrupted, resumed, before, after):
    expected = uninterrupted[1][before]
    ranks, done = resumed
    found = done[before, after]
    np.testing.assert_allclose(found.losses, expected.losses[HALF:], rtol=1e-5)
    assert_equal_states(found.state, expected.state, rtol=1e-4, atol=1e-5)
    if (ranks, before) == (2, after):
        assert found.losses == expected.losses[HALF:]
        assert_equal_states(found.state, expected.state, rtol=0, atol=0)


@pytest.fixture(scope="module")
def in_fp16(tmp_path_factory) -> dict[tuple[str, str], Done]:
    """Five steps in fp16, the third with an image of NaN, at once and with a restart after the fourth."""
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
        cases += [(name, part) for part in ("before", "poisoned", "half", "resumed", "whole")]
    return dict(zip(cases, perform(tasks, 2, folder), strict=True))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_gradient_that_is_not_finite_changes_nothing_but_the_loss_scale(in_fp16, strategy):
    before, after = in_fp16[strategy, "before"].state, in_fp16[strategy, "poisoned"].state
    assert in_fp16[strategy, "poisoned"].applied == [True, True, False]
    assert after["scale/value"] == before["scale/value"] / 2
    scale = {"scale/value", "scale/since"}
    assert_equal_states(
        {name: tensor for name, tensor in after.items() if name not in scale},
        {name: tensor for name, tensor in before.items() if name not in scale},
        rtol=0,
        atol=0,
    )


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_loss_scale_of_fp16_goes_on_after_a_restart(in_fp16, strategy):
    resumed, whole = in_fp16[strategy, "resumed"], in_fp16[strategy, "whole"]
    assert whole.state["scale/value"] == 2.0**15
    assert whole.state["scale/since"] == 2
    assert resumed.losses == whole.losses[4:]
    assert_equal_states(resumed.state, whole.state, rtol=0, atol=0)


@pytest.mark.parametrize(("place", "name"), [(place, name) for place, names in INSIDES.items() for name in names])
def test_deepspeed_has_the_insides_that_its_state_is_read_by(place, name):
    module, _, holder = place.rpartition(".")
    source = Path(importlib.import_module(module).__file__).read_text()
    assert hasattr(importlib.import_module(module), holder), f"DeepSpeed has no {place} any more"
    assert name in source, f"DeepSpeed's {holder} has no {name} any more: mend distrain/parallel/deepspeed_state.py"
