"""Weights of other libraries come in and go out under their names."""

import http.server
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn

from distrain.errors import UserError
from distrain.models import build, load_weights, save_weights

PYCLS_FIRST_BLOCK = {
    *("s1.b1.proj", "s1.b1.bn", "s1.b1.f.a", "s1.b1.f.a_bn", "s1.b1.f.b", "s1.b1.f.b_bn"),
    *("s1.b1.f.se.f_ex.0", "s1.b1.f.se.f_ex.2", "s1.b1.f.c", "s1.b1.f.c_bn"),
}
NAMINGS = [
    *[("densenet121", naming) for naming in ("distrain", "torchvision", "timm")],
    *[("regnety_200mf", naming) for naming in ("distrain", "torchvision", "timm", "pycls")],
]


@pytest.fixture(scope="module")
def regnet() -> nn.Module:
    torch.manual_seed(0)
    return build("regnety_200mf", 10)


@pytest.fixture
def fresh() -> nn.Module:
    """The same network with other weights."""
    torch.manual_seed(1)
    return build("regnety_200mf", 10)


@pytest.fixture
def website(tmp_path, monkeypatch) -> Iterator[str]:
    """Serves tmp_path; what is downloaded from it is not kept."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def differing(network: nn.Module, other: nn.Module) -> set[str]:
    mine, theirs = network.state_dict(), other.state_dict()
    return {name for name in mine if not torch.equal(mine[name], theirs[name])}


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize(("name", "naming"), NAMINGS)
def test_what_is_saved_under_any_names_is_loaded_back(name, naming, suffix, tmp_path):
    saved, loaded = build(name, 10), build(name, 10)
    path = tmp_path / f"weights.{suffix}"
    save_weights(saved, path, naming)
    line = load_weights(loaded, path)
    assert line.startswith(f"{path}: loaded {len(saved.state_dict())} tensors (")
    assert line.endswith("new: nothing")
    assert differing(loaded, saved) == set()


@pytest.mark.parametrize(
    ("name", "naming", "make"),
    [
        ("densenet121", "torchvision", partial(torchvision.models.densenet121, num_classes=10)),
        ("densenet121", "timm", partial(timm.create_model, "densenet121", num_classes=10)),
        ("regnety_400mf", "torchvision", partial(torchvision.models.regnet_y_400mf, num_classes=10)),
        ("regnety_400mf", "timm", partial(timm.create_model, "regnety_004", num_classes=10)),
    ],
)
def test_the_other_library_loads_what_is_saved_for_it(name, naming, make, tmp_path):
    ours, theirs = build(name, 10).eval(), make().eval()
    save_weights(ours, tmp_path / "weights.pth", naming)
    theirs.load_state_dict(torch.load(tmp_path / "weights.pth"))
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(theirs(images), ours(images), rtol=1e-5, atol=1e-6)


def test_pycls_files_have_its_names_and_its_order_of_colours(regnet, tmp_path):
    save_weights(regnet, tmp_path / "model.pyth", "pycls")
    tensors = torch.load(tmp_path / "model.pyth")["model_state"]
    assert {name.rpartition(".")[0] for name in tensors if name.startswith("s1.")} == PYCLS_FIRST_BLOCK
    assert {name.rpartition(".")[0] for name in tensors if name[:4] in ("stem", "head")} == {
        *("stem.conv", "stem.bn", "head.fc")
    }
    red_green_blue = torch.randn(1, 3, 32, 32)
    on_theirs = torch.conv2d(red_green_blue.flip(1), tensors["stem.conv.weight"], stride=2, padding=1)
    torch.testing.assert_close(on_theirs, regnet.stem.conv(red_green_blue))


def test_old_torchvision_densenets_are_understood(tmp_path):
    """Their files write norm.1 for norm1 and know no batch counters."""
    theirs, ours = torchvision.models.densenet121(num_classes=10), build("densenet121", 10)
    old = {
        name.replace(".norm1.", ".norm.1.").replace(".conv2.", ".conv.2."): tensor
        for name, tensor in theirs.state_dict().items()
        if "num_batches_tracked" not in name
    }
    torch.save(old, tmp_path / "old.pth")
    assert load_weights(ours, tmp_path / "old.pth").endswith("new: batch counters")
    assert torch.equal(ours.blocks[1][2].norm1.weight, theirs.features.denseblock2.denselayer3.norm1.weight)


@pytest.mark.parametrize(
    ("wrapper", "prefix"),
    [("model", "module."), ("state_dict", "_orig_mod."), ("model_state", "module._orig_mod.")],
)
def test_training_states_of_other_libraries_are_unwrapped(wrapper, prefix, regnet, fresh, tmp_path):
    tensors = {prefix + name: tensor for name, tensor in regnet.state_dict().items()}
    torch.save({wrapper: tensors, "epoch": 90}, tmp_path / "last.pth")
    load_weights(fresh, tmp_path / "last.pth")
    assert differing(fresh, regnet) == set()


def test_a_head_for_other_classes_is_new(regnet, tmp_path):
    network = build("regnety_200mf", 7)
    untouched = network.head.weight.clone()
    save_weights(regnet, tmp_path / "weights.pth")
    line = load_weights(network, tmp_path / "weights.pth")
    assert line.endswith("new: head (the file has 10 classes, the network 7)")
    assert torch.equal(network.head.weight, untouched)
    assert torch.equal(network.stem.conv.weight, regnet.stem.conv.weight)


def test_a_file_without_a_head_leaves_it_new(regnet, fresh, tmp_path):
    save_file({n: t for n, t in regnet.state_dict().items() if "head" not in n}, tmp_path / "trunk.safetensors")
    assert load_weights(fresh, tmp_path / "trunk.safetensors").endswith("new: head (the file has none)")
    assert differing(fresh, regnet) == {"head.weight"}  # biases start at zero


def test_weights_come_from_a_url_and_their_checksum_is_verified(regnet, fresh, website, tmp_path):
    save_weights(regnet, tmp_path / "net.safetensors")
    load_weights(fresh, f"{website}/net.safetensors")
    assert differing(fresh, regnet) == set()
    save_weights(regnet, tmp_path / "net-0123abcd.pth")
    with pytest.raises(UserError, match=r"net-0123abcd.pth: cannot be fetched: invalid hash"):
        load_weights(fresh, f"{website}/net-0123abcd.pth")


def lose_a_tensor(tensors: dict) -> dict:
    return {name: tensor for name, tensor in tensors.items() if name != "stages.1.0.norm2.bias"}


def add_a_tensor(tensors: dict) -> dict:
    return {**tensors, "stages.1.0.norm2.gain": torch.ones(1)}


def reshape_a_tensor(tensors: dict) -> dict:
    return {**tensors, "stem.conv.weight": torch.ones(32, 3, 7, 7)}


@pytest.mark.parametrize(
    ("change", "answer"),
    [
        (lose_a_tensor, "lacks stages.1.0.norm2.bias"),
        (add_a_tensor, "also holds stages.1.0.norm2.gain"),
        (reshape_a_tensor, "has another shape of stem.conv.weight"),
        (lambda tensors: {**tensors, "head.weight": torch.ones(())}, "has another shape of head.weight"),
        (lambda tensors: {}, "holds no tensors"),
        (lambda tensors: torch.ones(3), "holds a Tensor, not tensors by name"),
        (lambda tensors: build("regnety_400mf", 10).state_dict(), "not weights of this network"),
        (
            lambda tensors: build("densenet_bc_22_12").state_dict(),
            "not weights of any AnyNet: it holds stem.conv.weight",
        ),
    ],
)
def test_weights_that_do_not_fit_are_refused_in_one_line_and_nothing_is_loaded(change, answer, regnet, fresh, tmp_path):
    torch.save(change(regnet.state_dict()), tmp_path / "weights.pth")
    before = {name: tensor.clone() for name, tensor in fresh.state_dict().items()}
    with pytest.raises(UserError) as error:
        load_weights(fresh, tmp_path / "weights.pth")
    assert answer in str(error.value)
    assert "\n" not in str(error.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in fresh.state_dict().items())


@pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors"])
def test_a_file_that_is_missing_or_no_weights_is_named(name, fresh, tmp_path):
    with pytest.raises(UserError, match=f"{name}: no such file of weights"):
        load_weights(fresh, tmp_path / name)
    Path(tmp_path / name).write_text("<html>not found</html>")
    with pytest.raises(UserError, match=f"{name}: cannot be read as weights") as error:
        load_weights(fresh, tmp_path / name)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kept", [0, 1, 40, 500, 0.5, 0.99])
@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "pickle"])
def test_a_file_cut_short_is_refused_in_one_line(is_zip, kept, regnet, fresh, tmp_path):
    path = tmp_path / "weights.pth"
    torch.save(regnet.state_dict(), path, _use_new_zipfile_serialization=is_zip)
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content)) if isinstance(kept, float) else kept])
    with pytest.raises(UserError, match="cannot be read as weights") as error:
        load_weights(fresh, path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "options", "naming", "answer"),
    [
        ("densenet121", {}, "pycls", "pycls has no names for a DenseNet"),
        ("regnety_200mf", {}, "tim", "did you mean timm?"),
        ("regnety_200mf", {"head_width": 64}, "torchvision", "torchvision has no place for final.conv"),
    ],
)
def test_names_that_cannot_be_given_are_refused(name, options, naming, answer, tmp_path):
    with pytest.raises(UserError) as error:
        save_weights(build(name, 10, **options), tmp_path / "weights.pth", naming)
    assert answer in str(error.value)
