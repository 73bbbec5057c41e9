import copy
import json

import pytest
import torch

from distrain import config, models
from distrain.decisions import RunDecisions
from distrain.errors import UserError
from distrain.execution.prepare import climb, count_kept_bytes, fit_memory, prepare, regions
from distrain.models.recomputation import Block

REGNET = "{depth: 5, w0: 16, wa: 8, wm: 2.0, group_width: 8, se_ratio: 0.25, stem: cifar}"
REQUIRED = ("run.name=run", "data.train=none", "data.val=none", "data.image_size=16", "data.val_resize=16")


@pytest.fixture
def network() -> torch.nn.Module:
    return models.build("densenet_bc_22_12", 5)


def settings(tmp_path, *overrides: str) -> config.Config:
    small = ("batch.per_lane=4", "train.precision=fp32", "train.memory_format=contiguous")
    return config.load(
        None,
        [*REQUIRED, *small, f"run.dir={tmp_path}", "model.name=densenet_bc_22_12", "model.num_classes=5", *overrides],
    )


def modes(network: torch.nn.Module) -> list[str]:
    return [module.recomputation for module in network.modules() if isinstance(module, Block)]


def kept(network: torch.nn.Module, images: int) -> int:
    return count_kept_bytes(copy.deepcopy(network), torch.randn(images, 3, 16, 16))


def test_every_rung_computes_more_again_and_keeps_less(network):
    blocks = [module for module in network.modules() if isinstance(module, Block)]
    sizes = []
    for rung in range(2 * len(blocks) + 1):
        climb(blocks, rung)
        sizes.append(kept(network, 2))
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) == len(sizes)
    climb(blocks, 2)
    assert modes(network) == ["selective"] * 2 + ["none"] * 7
    climb(blocks, 11)
    assert modes(network) == ["full"] * 2 + ["selective"] * 7


def test_auto_recomputes_the_least_that_fits_the_budget(network, group, tmp_path):
    budget = 0.7 * kept(network, 4)
    run = settings(tmp_path, "train.recompute=auto", f"train.activation_gb={budget / 1e9}")
    said = []
    prepare(run, network, group, said.append)
    assert kept(network, 4) <= budget
    (rung,) = (json.loads((tmp_path / "run" / "decisions.json").read_text())[name] for name in ["recompute"])
    climb([module for module in network.modules() if isinstance(module, Block)], rung - 1)
    assert kept(network, 4) > budget
    assert said[0].startswith(f"train.recompute=auto: {rung} of 9 blocks are computed again, for ")


def test_a_budget_that_nothing_fits_is_one_line(network, group, tmp_path):
    run = settings(tmp_path, "train.recompute=auto", "train.activation_gb=0.0001")
    with pytest.raises(UserError, match=r"train\.activation_gb=0\.0001 is too little: .* raise it, or lower batch"):
        prepare(run, network, group, print)


def test_the_memory_format_is_measured_once_and_kept(network, group, tmp_path):
    run = settings(tmp_path, "train.memory_format=auto")
    said = []
    chosen = prepare(run, network, group, said.append).memory_format
    name = {torch.channels_last: "channels_last", torch.contiguous_format: "contiguous"}[chosen]
    assert said[0].startswith(f"train.memory_format=auto: {name}, of channels_last ")
    other = {"channels_last": "contiguous", "contiguous": "channels_last"}[name]
    RunDecisions(run.run.folder).set("memory_format", other)
    again = prepare(run, network, group, said.append).memory_format
    assert again != chosen
    assert len(said) == 1


def mock_of_a_device_that_holds(limit: int):
    """Stands in for a training step on a GPU that has memory for so many kept bytes."""

    def attempt(network, images):
        if count_kept_bytes(network, images) > limit:
            raise torch.OutOfMemoryError

    return attempt


def test_what_fits_a_mock_device_is_left_as_it_is(network, group):
    images = torch.randn(8, 3, 16, 16)
    assert fit_memory(network, images, 1, group, mock_of_a_device_that_holds(10**9), print) == 1
    assert modes(network) == ["none"] * 9


def test_on_a_small_mock_device_blocks_are_computed_again_before_lanes_are_cut(network, group):
    images, said = torch.randn(8, 3, 16, 16), []
    little = kept(network, 8) // 2
    assert fit_memory(network, images, 1, group, mock_of_a_device_that_holds(little), said.append) == 1
    assert modes(network) == ["full"] * 9
    less = kept(network, 8) - 1
    assert fit_memory(network, images, 1, group, mock_of_a_device_that_holds(less), said.append) == 2
    assert [line.partition(":")[2][:20] for line in said] == [" all blocks are comp", " each lane is cut in"]


def test_a_mock_device_that_holds_nothing_is_one_line(network, group):
    with pytest.raises(UserError, match=r"batch\.per_lane=8 does not fit the memory of the device"):
        fit_memory(network, torch.randn(8, 3, 16, 16), 1, group, mock_of_a_device_that_holds(0), lambda line: None)


def test_batch_statistics_of_all_ranks_are_refused_where_torch_has_none(network, group, tmp_path):
    if group.device.type == "cuda":
        pytest.skip("GPUs have them")
    with pytest.raises(UserError, match="works on GPUs only"):
        prepare(settings(tmp_path, "parallel.batch_norm=sync"), network, group, print)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "options"), [("densenet_bc_10_4", {}), ("regnet", None)])
def test_blocks_that_are_alike_are_compiled_once_and_compute_the_same(name, options, group, tmp_path):
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
