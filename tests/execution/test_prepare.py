import copy
import time
from functools import partialmethod

import pytest
import torch
from support.execution import REQUIRED, settings

from distrain import config, models
from distrain.decisions import RunDecisions
from distrain.errors import UserError
from distrain.execution.compile import regions
from distrain.execution.memory_format import MEMORY_FORMATS, find_faster_format
from distrain.execution.prepare import prepare

REGNET = "{depth: 5, w0: 16, wa: 8, wm: 2.0, group_width: 8, se_ratio: 0.25, stem: cifar}"


def test_the_memory_format_is_measured_once_and_kept(network, group, tmp_path):
    run = settings(tmp_path, "train.memory_format=auto")
    lines = []
    chosen = prepare(run, network, group, lines.append).memory_format
    name = {torch.channels_last: "channels_last", torch.contiguous_format: "contiguous"}[chosen]
    assert lines[0].startswith(f"train.memory_format=auto: chose {name} (channels_last ")
    other = {"channels_last": "contiguous", "contiguous": "channels_last"}[name]
    RunDecisions(run.run.folder).set("memory_format", other)
    again = prepare(run, network, group, lines.append).memory_format
    assert again != chosen
    assert len(lines) == 1


class SlowWith(torch.nn.Module):
    """A classifier that takes 30 ms longer for images in one memory format."""

    def __init__(self, slow: torch.memory_format) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 5, 3)
        self._slow = slow

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if images.is_contiguous(memory_format=self._slow):
            time.sleep(0.03)
        return self.conv(images).mean(dim=(2, 3))


class FitsOnly(torch.nn.Module):
    """A classifier for which a simulated GPU has memory in some memory formats only."""

    def __init__(self, *formats: torch.memory_format) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 5, 3)
        self._formats = formats

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if not any(images.is_contiguous(memory_format=one) for one in self._formats):
            raise torch.OutOfMemoryError
        return self.conv(images).mean(dim=(2, 3))


@pytest.mark.parametrize(
    ("fitting", "chosen"), [((torch.contiguous_format,), "contiguous"), ((), "channels_last")], ids=["one", "none"]
)
def test_a_format_that_does_not_fit_a_simulated_gpu_is_not_measured(group, tmp_path, fitting, chosen):
    lines = []
    run = settings(tmp_path, "train.memory_format=auto")
    assert find_faster_format(run, FitsOnly(*fitting), group.device, lines.append) == chosen
    assert lines == [
        f"train.memory_format=auto: {chosen}, not measured: a lane does not fit the memory without recomputation"
    ]


def test_a_deterministic_run_measures_nothing_and_says_so_once(network, group, tmp_path):
    lines = []
    run = settings(tmp_path, "train.memory_format=auto", "train.deterministic=true")
    for _ in range(2):
        assert prepare(run, network, group, lines.append).memory_format == torch.channels_last
    assert lines == ["train.memory_format=auto: channels_last, not measured because of train.deterministic"]


@pytest.mark.parametrize(("slow", "fast"), [("channels_last", "contiguous"), ("contiguous", "channels_last")])
def test_the_faster_memory_format_is_chosen(group, tmp_path, slow, fast):
    run = settings(tmp_path, "train.memory_format=auto")
    assert find_faster_format(run, SlowWith(MEMORY_FORMATS[slow]), group.device, print) == fast


def test_sync_batch_norm_is_refused_on_cpus(network, group, tmp_path):
    with pytest.raises(UserError, match="works on GPUs only"):
        prepare(settings(tmp_path, "parallel.batch_norm=sync"), network, group, print)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "options"), [("densenet_bc_10_4", {}), ("regnet", None)])
def test_identical_blocks_are_compiled_once_and_compute_the_same(name, options, group, tmp_path):
    options = (
        config.load(None, [*REQUIRED, f"model.name={name}", f"model.options={REGNET}"]).model.options
        if options is None
        else options
    )
    torch.manual_seed(0)
    plain = models.build(name, 5, **options)
    compiled = copy.deepcopy(plain)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    run = settings(tmp_path, "train.compile=true", "parallel.strategy=ddp")
    prepare(run, compiled, group, print)
    images = torch.randn(4, 3, 16, 16)
    for network in (plain, compiled):
        network(images).logsumexp(dim=1).sum().backward()
    for (name, parameter), other in zip(plain.named_parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(other.grad, parameter.grad, rtol=1e-4, atol=1e-5, msg=name)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert 0 < graphs <= len(regions(compiled))


def test_no_block_is_left_uncompiled_in_training_or_in_validation_of_any_batch(group, tmp_path, monkeypatch):
    """More different blocks than torch's default limit of graphs: what exceeds it runs without being compiled."""
    monkeypatch.setattr(torch._dynamo.config, "fail_on_recompile_limit_hit", True)
    # The limit is that of tracing, and compiling what was traced takes minutes.
    monkeypatch.setattr(torch.nn.Module, "compile", partialmethod(torch.nn.Module.compile, backend="eager"))
    torch._dynamo.reset()
    network = models.build("regnet", 5, depth=10, w0=8, wa=8, wm=1.4, group_width=8, stem="cifar", strides=[1] * 7)
    assert len(network.stages) == 7
    prepare(settings(tmp_path, "train.compile=true"), network, group, print)
    network(torch.randn(4, 3, 8, 8)).sum().backward()
    network.eval()
    with torch.no_grad():
        for images in (4, 3, 0):
            assert network(torch.randn(images, 3, 8, 8)).shape == (images, 5)
