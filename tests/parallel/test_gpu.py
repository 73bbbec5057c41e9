"""What needs a GPU: NCCL, fp16, and memory formats and compilation where they matter."""

import copy

import pytest
import torch
from support.execution import settings
from support.processes import SMALL, Training, train
from support.strategies import DENSENET, STRATEGIES, assert_equal_states, run_tasks, task
from support.waits import READS_OF_THE_HOST, count_waits

from distrain import models
from distrain.decisions import RunDecisions
from distrain.execution.compile import regions
from distrain.execution.fitting import fit_memory
from distrain.execution.prepare import prepare

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_killed_run_on_a_gpu_ends_in_the_same_bits(strategy, on_dataset, tmp_path):
    chosen = (*SMALL, *on_dataset, f"parallel.strategy={strategy}", "train.deterministic=true", "batch.lanes=2",
              "batch.per_lane=8", "train.epochs=3", "checkpoint.every_steps=5", "train.precision=bf16")  # fmt: skip
    uninterrupted = train(tmp_path / "uninterrupted", *chosen)
    assert uninterrupted.code == 0, uninterrupted.output
    training = Training(tmp_path / "killed", *chosen)
    training.wait_for_step(13)
    training.kill()
    assert train(tmp_path / "killed", *chosen).digest == uninterrupted.digest


@pytest.mark.parametrize("words", [(), ("train.precision=fp16",), ("ema.decay=0.9", "optimizer.clip_norm=1")])
def test_captured_micro_batches_train_as_uncaptured_ones_do(words, on_dataset, tmp_path):
    chosen = (*SMALL, *on_dataset, "train.deterministic=true", "batch.lanes=2", "batch.per_lane=8", "train.epochs=3",
              "data.size_schedule=[[0, 16], [1, 8]]", "model.options={dropout: 0.1}", *words)  # fmt: skip
    on, off = (train(tmp_path / setting, *chosen, f"train.graphs={setting}") for setting in ("on", "off"))
    assert (on.code, off.code) == (0, 0), on.output + off.output
    assert "not captured" not in on.output
    assert on.digest == off.digest


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_no_step_waits_for_a_gpu_but_inside_deepspeed(strategy, on_dataset, tmp_path):
    found = count_waits(
        tmp_path, *SMALL, *on_dataset, "batch.lanes=2", "batch.per_lane=8", "train.epochs=1",
        "checkpoint.every_steps=5", f"parallel.strategy={strategy}",
    )  # fmt: skip
    assert {place for place in found if not place[0].startswith("deepspeed")} <= READS_OF_THE_HOST


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_loss_scale_of_fp16_is_restored_after_a_restart_on_a_gpu(strategy, tmp_path):
    chosen = (f"parallel.strategy={strategy}", "batch.lanes=1", "batch.per_lane=8", "train.precision=fp16", *DENSENET)
    half, resumed, whole = run_tasks(
        [
            task(tmp_path, "half", *chosen, last=4, poison=2),
            task(tmp_path, "resumed", *chosen, first=4, last=5, load=str(tmp_path / "half.pt")),
            task(tmp_path, "whole", *chosen, last=5, poison=2),
        ],
        1,
        tmp_path,
    )
    assert half.applied == [True, True, False, True]
    assert whole.state["scale/growth_tracker"] == 2
    assert_equal_states(resumed.state, whole.state, rtol=1e-3, atol=1e-5)
    assert resumed.state["scale/value"] == whole.state["scale/value"]


def test_the_memory_format_is_measured_on_a_gpu(group, tmp_path):
    run = settings(tmp_path, "train.memory_format=auto", "train.precision=bf16")
    network = models.build("regnety_400mf", 5).to(group.device)
    lines = []
    prepare(run, network, group, lines.append)
    assert lines[0].startswith("train.memory_format=auto: ")
    assert RunDecisions(run.run.folder).get("memory_format", lambda: "") in ("channels_last", "contiguous")


def test_lanes_that_do_not_fit_a_gpu_are_split(group):
    network = models.build("regnety_16gf", 5).to(group.device)
    total = torch.cuda.get_device_properties(group.device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, 3e9 / total))
    try:
        images = torch.zeros(64, 3, 224, 224, device=group.device)
        lines = []
        splits = fit_memory(network, images, 1, group, lambda net, batch: net(batch).sum().backward(), lines.append)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert splits > 1
    assert lines[0].startswith("out of memory: recomputing all blocks")


def test_blocks_compiled_on_a_gpu_compute_the_same(group, tmp_path):
    plain = models.build("regnety_400mf", 5).to(group.device)
    compiled = copy.deepcopy(plain)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    prepare(settings(tmp_path, "train.compile=true"), compiled, group, print)
    images = torch.randn(8, 3, 64, 64, device=group.device)
    expected, found = (network(images) for network in (plain, compiled))
    assert ((found - expected).norm() / expected.norm()).item() < 1e-2  # TF32
    assert 0 < torch._dynamo.utils.counters["stats"]["unique_graphs"] < len(regions(compiled))
