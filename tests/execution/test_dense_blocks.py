"""Whether dense blocks are fused: as configured, or measured once."""

import time
from types import SimpleNamespace

import pytest
import torch
from support.execution import settings

from distrain import models
from distrain.decisions import RunDecisions
from distrain.errors import UserError
from distrain.execution.dense_blocks import choose_dense_block
from distrain.execution.prepare import prepare
from distrain.models.fusion import Fusible

AUTO = "train.dense_block=auto"


def kinds(network: torch.nn.Module) -> set[tuple[bool, bool]]:
    """Whether the parts that can be are fused and compiled."""
    return {(part.is_fused, part.kernels.compiled_passes) for part in network.modules() if isinstance(part, Fusible)}


@pytest.mark.parametrize(("kind", "is_fused"), [("fused", True), ("plain", False)])
def test_dense_blocks_are_what_is_configured(network, group, tmp_path, kind, is_fused):
    prepare(settings(tmp_path, f"train.dense_block={kind}"), network, group, pytest.fail)
    assert kinds(network) == {(is_fused, False)}


def test_kernels_for_gpus_are_refused_on_a_cpu(network, group, tmp_path):
    with pytest.raises(UserError, match=r"dense_block=triton needs a GPU: set train\.dense_block=fused"):
        prepare(settings(tmp_path, "train.dense_block=triton"), network, group, print)


@pytest.mark.parametrize(
    ("capability", "precision", "missing"),
    [((9, 0), "fp32", "train.precision=bf16 or fp16"), ((7, 5), "bf16", "a GPU of compute capability 8.0")],
)
def test_what_kernels_cannot_compute_on_a_simulated_gpu_is_refused(
    monkeypatch, network, tmp_path, capability, precision, missing
):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    group = SimpleNamespace(is_main=True, device=torch.device("cuda"))
    with pytest.raises(UserError, match=rf"dense_block=triton_1x1 needs {missing}: set train\.dense_block=fused"):
        prepare(
            settings(tmp_path, "train.dense_block=triton_1x1", f"train.precision={precision}"), network, group, print
        )


def test_the_faster_kind_is_measured_once_and_kept(network, group, tmp_path):
    run, lines = settings(tmp_path, AUTO), []
    prepare(run, network, group, lines.append)
    chosen = RunDecisions(run.run.folder).get("dense_block", pytest.fail)
    assert kinds(network) == {(chosen == "fused", False)}
    (line,) = lines
    assert line.startswith(f"train.dense_block=auto: chose {chosen} (plain ")
    other = {"plain": "fused", "fused": "plain"}[chosen]
    RunDecisions(run.run.folder).set("dense_block", other)
    prepare(run, network, group, pytest.fail)
    assert kinds(network) == {(other == "fused", False)}


class Slow(Fusible):
    """A classifier that takes 30 ms longer if it is fused, or if it is not."""

    def __init__(self, when_fused: bool) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 5, 3)
        self._when_fused = when_fused

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if self.is_fused == self._when_fused:
            time.sleep(0.03)
        return self.conv(images).mean(dim=(2, 3))


@pytest.mark.parametrize(("when_fused", "faster"), [(True, "plain"), (False, "fused")])
def test_the_faster_kind_is_chosen(group, tmp_path, when_fused, faster):
    assert choose_dense_block(settings(tmp_path, AUTO), Slow(when_fused), group.device, print) == faster


@pytest.mark.parametrize(
    ("setting", "device", "reason"),
    [
        ("train.deterministic=true", "cpu", "of train.deterministic"),
        ("train.compile=true", "cpu", "of train.compile"),
        ("train.precision=bf16", "cuda", "fused dense blocks have not been tried on a GPU yet"),
    ],
)
def test_blocks_are_plain_where_nothing_is_measured_such_as_on_a_simulated_gpu(
    network, tmp_path, setting, device, reason
):
    lines: list[str] = []
    assert choose_dense_block(settings(tmp_path, AUTO, setting), network, torch.device(device), lines.append) == "plain"
    assert lines == [f"train.dense_block=auto: plain, not measured because {reason}"]


def test_a_run_that_an_earlier_release_has_started_keeps_its_plain_blocks(network, group, tmp_path):
    run = settings(tmp_path, AUTO)
    RunDecisions(run.run.folder).set("lane_splits", 1)
    prepare(run, network, group, pytest.fail)
    assert kinds(network) == {(False, False)}
    assert RunDecisions(run.run.folder).get("dense_block", pytest.fail) == "plain"


@pytest.mark.parametrize("recompute", ["none", "auto"])
def test_passes_of_fused_blocks_are_compiled_and_not_whole_blocks(network, group, tmp_path, monkeypatch, recompute):
    monkeypatch.setattr(torch.nn.Module, "compile", pytest.fail)
    words = ("train.dense_block=fused", "train.compile=true", f"train.recompute={recompute}", "train.activation_gb=1")
    prepare(settings(tmp_path, *words), network, group, print)
    assert kinds(network) == {(True, True)}


@pytest.mark.parametrize("kind", ["fused", "plain"])
def test_compiled_passes_of_fused_blocks_can_be_captured_as_cuda_graphs(network, group, tmp_path, monkeypatch, kind):
    monkeypatch.setattr(torch.nn.Module, "compile", lambda _: None)
    lines: list[str] = []
    run = settings(tmp_path, f"train.dense_block={kind}", "train.compile=true", "train.graphs=on")
    assert prepare(run, network, group, lines.append).graphs == (kind == "fused")
    assert lines == {"fused": [], "plain": ["train.graphs=on: no CUDA graphs: train.compile has its own kernels"]}[kind]


def test_the_images_of_fused_blocks_are_channels_last(network, group, tmp_path):
    lines: list[str] = []
    run = settings(tmp_path, "train.dense_block=fused", "train.memory_format=auto")
    assert prepare(run, network, group, lines.append).memory_format == torch.channels_last
    assert lines == ["train.memory_format=auto: channels_last, not measured because fused dense blocks are"]


def test_a_regnet_has_no_dense_blocks_to_decide_on(group, tmp_path):
    run = settings(tmp_path, AUTO, "model.name=regnety_200mf")
    prepare(run, models.build("regnety_200mf", 5), group, pytest.fail)
    assert RunDecisions(run.run.folder).get("dense_block", lambda: "") == ""
