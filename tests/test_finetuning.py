"""Runs that start from weights, and train a part of a network."""

import json
import re

import numpy as np
import pytest
import torch
from support.processes import README, SMALL, Training, train

from distrain.checkpoint import committed, read
from distrain.config import OptimizerConfig
from distrain.errors import UserError
from distrain.models import build, freeze, save_weights
from distrain.models.freezing import FrozenBatchNorm2d
from distrain.models.recomputation import set_recomputation
from distrain.recipe.losses import class_weights
from distrain.recipe.optimizers import group_parameters, lr_factors
from distrain.sources import open_weights

FROZEN = ("stem", "blocks.0")
TUNING = ("train.freeze=[stem, blocks.0]", "optimizer.head_lr_factor=10", "optimizer.layer_decay=0.8", "train.epochs=1")


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(3)
    return build("densenet_bc_10_4", 3, dropout=0.1)


@pytest.fixture(scope="module")
def source(network, tmp_path_factory):
    path = tmp_path_factory.mktemp("source") / "weights.safetensors"
    save_weights(network, path)
    return path


def weights_of(folder, step=None):
    checkpoints = {int(path.name[-8:]): path for path in committed(folder / "checkpoints")}
    tensors = read(checkpoints[max(checkpoints) if step is None else step]).tensors
    return {name.removeprefix("model/"): t for name, t in tensors.items() if name.startswith("model/")}


def is_frozen(name):
    return any(name.startswith(f"{part}.") for part in FROZEN)


@pytest.fixture(scope="module")
def tuned(settings, source, tmp_path_factory):
    """The same fine-tuning run under ddp and zero2, uninterrupted, on two ranks."""
    folder = tmp_path_factory.mktemp("tuned")
    both = (*settings, *TUNING, f"model.init={source}", "batch.lanes=2", "batch.per_lane=6")
    results = {name: train(folder / name, *both, f"parallel.strategy={name}", ranks=2) for name in ("ddp", "zero2")}
    assert [result.code for result in results.values()] == [0, 0], results
    return both, results


@pytest.mark.parametrize("strategy", ["ddp", "zero2"])
def test_frozen_parts_and_their_statistics_stay_and_the_rest_moves(tuned, network, strategy):
    before, after = network.state_dict(), weights_of(tuned[1][strategy].folder)
    assert before.keys() == after.keys()
    kept = {name for name in before if torch.equal(before[name], after[name])}
    assert kept == {name for name in before if is_frozen(name)}


@pytest.mark.parametrize("strategy", ["ddp", "zero2"])
def test_killed_fine_tuning_ends_in_the_same_bits_without_its_source(tuned, source, strategy, tmp_path):
    settings, results = tuned
    # The copy of the weights is gone after the first start.
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes(source.read_bytes())
    changed = (*settings, f"parallel.strategy={strategy}", f"model.init={copy}")
    training = Training(tmp_path / "killed", *changed, ranks=2)
    training.wait_for_step(12)
    training.kill()
    copy.unlink()
    resumed = train(tmp_path / "killed", *changed, ranks=2)
    assert resumed.code == 0, resumed.output
    assert resumed.digest == results[strategy].digest


def test_fine_tuning_moves_to_another_strategy_and_number_of_ranks(tuned, source, tmp_path):
    settings, results = tuned
    training = Training(tmp_path / "moved", *settings, ranks=2)
    training.wait_for_step(12)
    training.kill()
    resumed = train(tmp_path / "moved", *settings, "parallel.strategy=zero3", ranks=1)
    assert resumed.code == 0, resumed.output
    losses, expected = resumed.series("train/loss"), results["ddp"].series("train/loss")
    np.testing.assert_allclose(list(losses.values()), list(expected.values()), rtol=1e-5)


def test_the_recipe_for_a_larger_test_resolution_trains_the_head_and_the_last_norms_only(on_dataset, tmp_path):
    sizes = ("data.image_size=16", "data.val_resize=16", "batch.lanes=1", "batch.per_lane=64", "train.epochs=1")
    options = {"depth": 5, "w0": 8, "wa": 8, "wm": 1.5, "group_width": 8, "stem": "cifar"}
    before = build("regnet", 3, **options).state_dict()
    torch.save(before, tmp_path / "weights.pth")
    recipe = ("--config", str(README.parent / "configs" / "regnety_400mf_fixres.yaml"))
    small = (*SMALL, *on_dataset, *sizes, "model.name=regnet", f"model.options={options}")
    done = train(tmp_path / "run", *recipe, *small, f"model.init={tmp_path}/weights.pth")
    assert done.code == 0, done.output
    after = weights_of(tmp_path / "run")
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    parts = {re.sub(r"\.\w+$", "", name) for name in moved}
    assert parts == {"head"} | {f"stages.3.{block}.norm3" for block in range(len(parts) - 1)}
    assert len(parts) > 1


def test_the_first_line_says_what_was_loaded_and_a_restart_needs_no_more_than_the_checkpoint(tuned, source):
    _, results = tuned
    assert f"{source}: loaded {len(build('densenet_bc_10_4', 3).state_dict())} tensors (distrain names)" in (
        results["ddp"].output
    )
    manifest = json.loads((committed(results["ddp"].folder / "checkpoints")[-1] / "manifest.json").read_text())
    assert manifest["classes"] == ["red", "green", "blue"]
    assert manifest["model.init"] == str(source)


def test_other_initial_weights_are_another_run(tuned, tmp_path):
    settings, results = tuned
    torch.manual_seed(9)
    save_weights(build("densenet_bc_10_4", 3), tmp_path / "other.safetensors")
    refused = train(results["ddp"].folder, *settings, f"model.init={tmp_path}/other.safetensors", ranks=2)
    assert refused.code == 78
    assert "model.init digest was" in refused.output


def test_a_run_starts_from_the_best_or_any_checkpoint_of_another(tuned, finished, tmp_path):
    settings, folder = finished[0], finished[1]
    newest = max(int(path.name[-8:]) for path in committed(folder / "checkpoints"))
    raw, ema = (open_weights(f"{folder}:last:{kind}", None) for kind in ("raw", "ema"))
    assert all(torch.equal(tensor, weights_of(folder)[name]) for name, tensor in raw.tensors.items())
    assert any(not torch.equal(tensor, raw.tensors[name]) for name, tensor in ema.tensors.items())
    assert ema.source == f"{folder}:{newest}:ema"
    assert ema.classes == ("red", "green", "blue")
    second = train(tmp_path / "second", *settings, f"model.init={folder}:last", "track.uri=none")
    assert second.code == 0, second.output
    assert f"{folder}:{newest}:ema: loaded" in second.output
    start = weights_of(tmp_path / "second", 0)
    assert all(torch.equal(tensor, start[name]) for name, tensor in ema.tensors.items())


@pytest.mark.parametrize(
    ("suffix", "message"),
    [
        (":12345", "no checkpoint of step 12345; found"),
        (":last:ema", "has no EMA: leave out :ema"),
    ],
)
def test_a_checkpoint_that_does_not_exist_is_named(tuned, suffix, message):
    with pytest.raises(UserError, match=message):
        open_weights(f"{tuned[1]['ddp'].folder}{suffix}", None)


def test_a_run_without_a_checkpoint_is_named(tmp_path):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(UserError, match="run: this run has no checkpoint yet"):
        open_weights(str(tmp_path / "run"), None)


@pytest.mark.parametrize(
    ("init", "message"),
    [
        ("missing.pth", "missing.pth: weights file not found"),
        ("torchvision", "torchvision has no densenet_bc_10_4"),
        ("timm:nothing", "timm has no weights of this name"),
        (".", "not the folder of a run"),
    ],
)
def test_initial_weights_that_do_not_exist_end_a_start_before_it_writes(settings, init, message, tmp_path):
    refused = train(tmp_path / "refused", *settings, f"model.init={init}")
    assert refused.code == 78
    assert message in refused.output
    assert not (tmp_path / "refused").exists()


def test_weights_of_another_network_are_named(tmp_path):
    save_weights(build("regnety_200mf", 12), tmp_path / "weights.pth", "timm")
    with pytest.raises(UserError, match=r"they look like those of regnety_200mf: set model\.name=regnety_200mf"):
        load(build("regnety_400mf", 12), tmp_path / "weights.pth")
    with pytest.raises(UserError, match="they look like those of regnety_200mf"):
        load(build("densenet121", 12), tmp_path / "weights.pth")


def load(network, path, classes=()):
    from distrain.models import load_weights

    return load_weights(network, path, classes)


def test_weights_that_are_not_finite_are_refused(network, tmp_path):
    tensors = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    tensors["head.weight"][0, 0] = float("nan")
    torch.save(tensors, tmp_path / "weights.pth")
    with pytest.raises(UserError, match=r"weights.pth: head.weight holds NaN or infinite values"):
        load(build("densenet_bc_10_4", 3), tmp_path / "weights.pth")


def test_the_classifier_is_kept_by_the_names_of_classes(network, tmp_path):
    save_weights(network, tmp_path / "weights.safetensors", record={"classes": ["red", "green", "blue"]})
    other = build("densenet_bc_10_4", 4)
    before = other.head.weight.detach().clone()
    line = load(other, tmp_path / "weights.safetensors", ["blue", "pink", "red", "gray"])
    assert line.endswith("newly initialized: 2 of 4 classes of the head")
    for row, expected in enumerate([network.head.weight[2], before[1], network.head.weight[0], before[3]]):
        assert torch.equal(other.head.weight[row], expected)


def test_a_classifier_of_none_of_the_classes_is_replaced(network, tmp_path):
    save_weights(network, tmp_path / "weights.safetensors", record={"classes": ["red", "green", "blue"]})
    line = load(build("densenet_bc_10_4", 3), tmp_path / "weights.safetensors", ["cat", "dog", "cow"])
    assert "head (none of its 3 classes is among the 3 of the file)" in line


def test_half_precision_weights_load_as_single_precision(network, tmp_path):
    half = {name: t.half() if t.is_floating_point() else t for name, t in network.state_dict().items()}
    torch.save(half, tmp_path / "half.pth")
    loaded = build("densenet_bc_10_4", 3)
    load(loaded, tmp_path / "half.pth")
    assert loaded.stem.conv.weight.dtype == torch.float32
    assert torch.equal(loaded.stem.conv.weight, network.stem.conv.weight.half().float())


def trained(network):
    return {name for name, parameter in network.named_parameters() if parameter.requires_grad}


def test_patterns_freeze_and_except():
    network = build("regnety_200mf", 10)
    freeze(network, ["*", "!head", "!stages.3.*.norm3"])
    last = {f"stages.3.{block}.norm3.{leaf}" for block in range(len(network.stages[3])) for leaf in ("weight", "bias")}
    assert trained(network) == last | {"head.weight", "head.bias"}


def test_a_frozen_normalization_uses_its_statistics_in_training_and_recomputation():
    network = build("densenet_bc_10_4", 3)
    for _ in range(5):
        network.train()(torch.randn(8, 3, 8, 8) + 0.5)
    freeze(network, ["*", "!head"])
    images = torch.randn(4, 3, 8, 8)
    expected = network.eval()(images)
    assert expected.std() > 0.01
    for mode in ("none", "full", "selective"):
        set_recomputation(network, mode)
        logits = network.train()(images)
        assert torch.equal(logits, expected)
        logits.sum().backward()
    assert all(not isinstance(m, torch.nn.BatchNorm2d) or isinstance(m, FrozenBatchNorm2d) for m in network.modules())


@pytest.mark.parametrize(
    ("patterns", "message"),
    [(["stage.0"], "train.freeze: stage.0 names no part"), (["*"], "leaves nothing to train: add '!head'")],
)
def test_patterns_that_cannot_be_meant_are_refused(patterns, message):
    with pytest.raises(UserError, match=message.replace("*", r"\*")):
        freeze(build("regnety_200mf", 10), patterns)


def test_learning_rates_fall_from_layer_to_layer_towards_the_stem():
    network = build("densenet_bc_10_4", 3)  # three blocks of one layer
    factors = lr_factors(network, OptimizerConfig(layer_decay=0.5, head_lr_factor=10.0))
    layers = ["stem", "blocks.0.0", "transitions.0", "blocks.1.0", "transitions.1", "blocks.2.0", "norm"]
    expected = {layer: 0.5 ** (len(layers) - number) for number, layer in enumerate(layers)} | {"head": 10.0}
    for name, factor in factors.items():
        assert factor == next(value for layer, value in expected.items() if name.startswith(f"{layer}."))


def test_groups_cover_every_trained_parameter_once():
    network = build("regnety_200mf", 10)
    freeze(network, ["stem", "stages.0"])
    groups = group_parameters(network, OptimizerConfig(layer_decay=0.9, decay_norms=False))
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in network.parameters() if p.requires_grad)
    assert all(p.ndim > 1 or group["weight_decay"] == 0 for group in groups for p in group["params"])


def test_balanced_weights_give_every_class_the_same_share():
    weights = class_weights("balanced", ["a", "b", "c"], np.array([10, 30, 60]))
    np.testing.assert_allclose(weights * [10, 30, 60], [100 / 3] * 3, rtol=1e-6)
    with pytest.raises(UserError, match=r"data\.train has no sample of b: remove it"):
        class_weights("balanced", ["a", "b", "c"], np.array([10, 0, 60]))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"a": 1}', "has no weight of b"),
        ('{"a": 1, "b": 2, "x": 1}', "x is none of the classes"),
        ('{"a": 1, "b": "2"}', "the weight of b is '2'"),
        ('{"a": 1, "b": true}', "the weight of b is True"),
        ('{"a": -1, "b": 1}', "the weight of a is -1"),
        ('{"a": 1, "b": Infinity}', "the weight of b is inf"),
        ("[1, 2]", "not a JSON object"),
        ("{", "not valid JSON"),
    ],
)
def test_a_file_of_class_weights_is_checked(content, message, tmp_path):
    (tmp_path / "weights.json").write_text(content)
    with pytest.raises(UserError, match=message):
        class_weights(f"{tmp_path}/weights.json", ["a", "b"], np.array([1, 1]))
    (tmp_path / "weights.json").write_text('{"b": 2.5, "a": 0}')
    assert class_weights(f"{tmp_path}/weights.json", ["a", "b"], np.array([1, 1])).tolist() == [0.0, 2.5]


def test_class_weights_change_the_loss_as_in_torch(settings, tmp_path):
    (tmp_path / "weights.json").write_text('{"red": 5, "green": 1, "blue": 1}')
    chosen = (*settings, "train.epochs=0.1", "model.options={}", "batch.lanes=1", "batch.per_lane=203")
    plain = train(tmp_path / "plain", *chosen)
    weighted = train(tmp_path / "weighted", *chosen, f"loss.class_weights={tmp_path}/weights.json")
    assert weighted.code == 0, weighted.output
    assert weighted.series("train/loss") != plain.series("train/loss")
    (tmp_path / "weights.json").write_text('{"red": 4, "green": 1, "blue": 1}')
    refused = train(tmp_path / "weighted", *chosen, f"loss.class_weights={tmp_path}/weights.json")
    assert refused.code == 78
    assert "loss.class_weights digest was" in refused.output
