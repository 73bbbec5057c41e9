"""Weights are converted from and to other libraries."""

import argparse
import base64
import hashlib
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
from distrain.models.weight_files import read_weights
from distrain.models.weights import translate_names

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


class Website(http.server.SimpleHTTPRequestHandler):
    """Serves a folder. Sends only half of a file with 'truncated' in its path, and private/ to ada only."""

    def do_GET(self):
        login = "Basic " + base64.b64encode(b"ada:p@ss-w0rd").decode()
        if self.path.startswith("/private/") and self.headers["Authorization"] != login:
            self.send_error(401)
        else:
            super().do_GET()

    def copyfile(self, source, outputfile):
        content = source.read()
        outputfile.write(content[: len(content) // 2] if "truncated" in self.path else content)


@pytest.fixture
def website(tmp_path, monkeypatch) -> Iterator[str]:
    """Serve tmp_path; downloads go to tmp_path/cache."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    handler = partial(Website, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def list_files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def differing(network: nn.Module, other: nn.Module) -> set[str]:
    first, second = network.state_dict(), other.state_dict()
    return {name for name in first if not torch.equal(first[name], second[name])}


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize(("name", "naming"), NAMINGS)
def test_weights_saved_in_any_naming_load_back(name, naming, suffix, tmp_path):
    saved, loaded = build(name, 10), build(name, 10)
    path = tmp_path / f"weights.{suffix}"
    save_weights(saved, path, naming)
    line = load_weights(loaded, path)
    assert line.startswith(f"{path}: loaded {len(saved.state_dict())} tensors (")
    assert line.endswith("newly initialized: none")
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
def test_other_libraries_load_what_is_saved_for_them(name, naming, make, tmp_path):
    ours, reference = build(name, 10).eval(), make().eval()
    save_weights(ours, tmp_path / "weights.pth", naming)
    reference.load_state_dict(torch.load(tmp_path / "weights.pth"))
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(reference(images), ours(images), rtol=1e-5, atol=1e-6)


def test_pycls_files_have_its_names_and_its_channel_order(regnet, tmp_path):
    save_weights(regnet, tmp_path / "model.pyth", "pycls")
    tensors = torch.load(tmp_path / "model.pyth")["model_state"]
    assert {name.rpartition(".")[0] for name in tensors if name.startswith("s1.")} == PYCLS_FIRST_BLOCK
    assert {name.rpartition(".")[0] for name in tensors if name[:4] in ("stem", "head")} == {
        *("stem.conv", "stem.bn", "head.fc")
    }
    rgb = torch.randn(1, 3, 32, 32)
    outputs = torch.conv2d(rgb.flip(1), tensors["stem.conv.weight"], stride=2, padding=1)
    torch.testing.assert_close(outputs, regnet.stem.conv(rgb))


def test_old_torchvision_densenets_load(tmp_path):
    """Their files name norm1 norm.1 and have no num_batches_tracked."""
    reference, ours = torchvision.models.densenet121(num_classes=10), build("densenet121", 10)
    old = {
        name.replace(".norm1.", ".norm.1.").replace(".conv2.", ".conv.2."): tensor
        for name, tensor in reference.state_dict().items()
        if "num_batches_tracked" not in name
    }
    torch.save(old, tmp_path / "old.pth")
    assert load_weights(ours, tmp_path / "old.pth").endswith("newly initialized: num_batches_tracked")
    assert torch.equal(ours.blocks[1][2].norm1.weight, reference.features.denseblock2.denselayer3.norm1.weight)


@pytest.mark.parametrize(
    ("wrapper", "prefix"),
    [("model", "module."), ("state_dict", "_orig_mod."), ("model_state", "module._orig_mod.")],
)
def test_training_checkpoints_of_other_libraries_are_unwrapped(wrapper, prefix, regnet, fresh, tmp_path):
    tensors = {prefix + name: tensor for name, tensor in regnet.state_dict().items()}
    torch.save({wrapper: tensors, "epoch": 90}, tmp_path / "last.pth")
    assert load_weights(fresh, tmp_path / "last.pth").endswith("newly initialized: none")
    assert differing(fresh, regnet) == set()


@pytest.mark.parametrize(
    ("library", "wrapper", "ema_key"),
    [
        ("torchvision", "model", "model_ema"),
        ("timm", "state_dict", "state_dict_ema"),
        ("pycls", "model_state", "ema_state"),
    ],
)
def test_a_full_training_checkpoint_loads_and_ignored_ema_weights_are_reported(
    library, wrapper, ema_key, regnet, fresh, tmp_path
):
    """As written by the library's training script: with optimizer, schedule and arguments."""
    names = translate_names(regnet, library)
    tensors = {names[name]: tensor for name, tensor in regnet.state_dict().items()}
    optimizer = torch.optim.SGD(regnet.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [30, 60])
    state = {
        **{wrapper: tensors, ema_key: {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}},
        **{"optimizer": optimizer.state_dict(), "lr_scheduler": schedule.state_dict(), "epoch": 90},
        "args": argparse.Namespace(lr=0.1, mixup=None, device="cuda", workers=[1, 2]),
    }
    torch.save(state, tmp_path / "checkpoint.pth")
    line = load_weights(fresh, tmp_path / "checkpoint.pth")
    assert line.endswith(f"({library} names); newly initialized: none; ignored: {ema_key}")
    assert torch.equal(fresh.stages[2][1].conv2.weight, regnet.stages[2][1].conv2.weight)


def test_a_file_with_pickled_objects_is_rejected_in_one_line(regnet, fresh, tmp_path):
    torch.save(regnet, tmp_path / "network.pth")
    with pytest.raises(UserError) as error:
        load_weights(fresh, tmp_path / "network.pth")
    assert str(error.value) == (
        f"{tmp_path}/network.pth: cannot read weights: it contains a distrain.models.regnet.AnyNet, "
        "but only tensors and plain values are loaded: save the state_dict only"
    )


@pytest.mark.parametrize(
    ("name", "saved", "built"),
    [
        ("regnetx_400mf", "torchvision", "pycls"),
        ("regnety_800mf", "torchvision", "pycls"),
        ("regnety_800mf", "pycls", "torchvision"),
    ],
)
def test_weights_of_the_other_width_rule_are_rejected_with_the_rule_to_set(name, saved, built, tmp_path):
    save_weights(build(name, 10, width_rule=saved), tmp_path / "weights.pth", "torchvision")
    with pytest.raises(UserError, match=f"the file was built with width_rule={saved}: set that model option"):
        load_weights(build(name, 10, width_rule=built), tmp_path / "weights.pth")


def test_a_head_for_other_classes_is_newly_initialized(regnet, tmp_path):
    network = build("regnety_200mf", 7)
    initial = network.head.weight.clone()
    save_weights(regnet, tmp_path / "weights.pth")
    line = load_weights(network, tmp_path / "weights.pth")
    assert line.endswith("newly initialized: head (the file has 10 classes, the network 7)")
    assert torch.equal(network.head.weight, initial)
    assert torch.equal(network.stem.conv.weight, regnet.stem.conv.weight)


def test_a_head_absent_from_the_file_is_newly_initialized(regnet, fresh, tmp_path):
    save_file({n: t for n, t in regnet.state_dict().items() if "head" not in n}, tmp_path / "trunk.safetensors")
    assert load_weights(fresh, tmp_path / "trunk.safetensors").endswith("newly initialized: head (not in the file)")
    assert differing(fresh, regnet) == {"head.weight"}  # biases start at zero


def test_weights_are_downloaded_once(regnet, fresh, website, tmp_path):
    save_weights(regnet, tmp_path / "net.safetensors")
    load_weights(build("regnety_200mf", 10), f"{website}/net.safetensors")
    (tmp_path / "net.safetensors").unlink()
    load_weights(fresh, f"{website}/net.safetensors")
    assert differing(fresh, regnet) == set()


def test_the_password_of_a_url_is_sent_and_neither_shown_nor_kept(regnet, website, tmp_path):
    (tmp_path / "private").mkdir()
    save_weights(regnet, tmp_path / "private" / "net.pth")
    host = website.removeprefix("http://")
    weights = read_weights(f"http://ada:p%40ss-w0rd@{host}/private/net.pth")
    assert weights.source == f"http://***@{host}/private/net.pth"
    with pytest.raises(UserError, match=r"http://\*\*\*@.* download failed: HTTP Error 401"):
        read_weights(f"http://ada:other-w0rd@{host}/private/net.pth")


def test_urls_with_the_same_file_name_are_cached_separately(regnet, fresh, website, tmp_path):
    for folder, network in {"old": fresh, "new": regnet}.items():
        (tmp_path / folder).mkdir()
        save_weights(network, tmp_path / folder / "best.pth")
    load_weights(fresh, f"{website}/old/best.pth")
    load_weights(fresh, f"{website}/new/best.pth")
    assert differing(fresh, regnet) == set()


def test_a_checksum_in_the_name_is_verified(regnet, fresh, website, tmp_path):
    save_weights(regnet, tmp_path / "net.pth")
    checksum = hashlib.sha256((tmp_path / "net.pth").read_bytes()).hexdigest()[:8]
    (tmp_path / "net.pth").rename(tmp_path / f"net-{checksum}.pth")
    load_weights(fresh, f"{website}/net-{checksum}.pth")
    assert differing(fresh, regnet) == set()
    (tmp_path / f"net-{checksum}.pth").rename(tmp_path / "net-0123abcd.pth")
    message = f"net-0123abcd.pth: download failed: its SHA-256 starts with {checksum}, not with 0123abcd"
    with pytest.raises(UserError, match=message):
        load_weights(fresh, f"{website}/net-0123abcd.pth")


def test_a_truncated_download_is_not_kept(regnet, fresh, website, tmp_path):
    save_weights(regnet, tmp_path / "truncated.pth")
    size = (tmp_path / "truncated.pth").stat().st_size
    with pytest.raises(UserError) as error:
        load_weights(fresh, f"{website}/truncated.pth")
    assert str(error.value) == (
        f"{website}/truncated.pth: download failed: received only {size // 2:,} of {size:,} bytes "
        "(retry, or download it manually and pass the path)"
    )
    assert list_files(tmp_path / "cache") == []


def test_a_download_that_is_not_a_weights_file_is_not_kept(regnet, fresh, website, tmp_path):
    (tmp_path / "net.pth").write_text("<html>log in first</html>")
    with pytest.raises(UserError, match=r"/net.pth: cannot read weights: .* \(download removed: check the URL"):
        load_weights(fresh, f"{website}/net.pth")
    assert list_files(tmp_path / "cache") == []
    save_weights(regnet, tmp_path / "net.pth")
    load_weights(fresh, f"{website}/net.pth")
    assert differing(fresh, regnet) == set()


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("{website}/missing.pth", "HTTP Error 404: File not found"),
        ("{website}/a b.pth", "URL can't contain control characters"),
        ("http://127.0.0.1:one/net.pth", "nonnumeric port: 'one'"),
        ("http://[::1/net.pth", "Invalid IPv6 URL"),
        ("http://127.0.0.1:1/net.pth", "Connection refused"),
        ("http://", "no host given"),
    ],
)
def test_an_unreachable_or_invalid_url_is_reported_in_one_line(url, reason, fresh, website):
    url = url.format(website=website)
    with pytest.raises(UserError) as error:
        load_weights(fresh, url)
    assert str(error.value).startswith(f"{url}: download failed: ")
    assert reason in str(error.value)
    assert "\n" not in str(error.value)


def lose_a_tensor(tensors: dict) -> dict:
    return {name: tensor for name, tensor in tensors.items() if name != "stages.1.0.norm2.bias"}


def add_a_tensor(tensors: dict) -> dict:
    return {**tensors, "stages.1.0.norm2.gain": torch.ones(1)}


def reshape_a_tensor(tensors: dict) -> dict:
    return {**tensors, "stem.conv.weight": torch.ones(32, 3, 7, 7)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lose_a_tensor, "missing keys: stages.1.0.norm2.bias"),
        (add_a_tensor, "unexpected keys: stages.1.0.norm2.gain"),
        (reshape_a_tensor, "shape mismatch: stem.conv.weight"),
        (lambda tensors: {**tensors, "head.weight": torch.ones(())}, "shape mismatch: head.weight"),
        (lambda tensors: {}, "contains no tensors"),
        (lambda tensors: torch.ones(3), "expected a mapping of names to tensors, found a Tensor"),
        (lambda tensors: build("regnety_400mf", 10).state_dict(), "do not match this network"),
        (
            lambda tensors: build("densenet_bc_22_12").state_dict(),
            "not the weights of any AnyNet: unexpected keys such as stem.conv.weight",
        ),
    ],
)
def test_mismatched_weights_are_rejected_in_one_line_and_nothing_is_loaded(change, message, regnet, fresh, tmp_path):
    torch.save(change(regnet.state_dict()), tmp_path / "weights.pth")
    before = {name: tensor.clone() for name, tensor in fresh.state_dict().items()}
    with pytest.raises(UserError) as error:
        load_weights(fresh, tmp_path / "weights.pth")
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in fresh.state_dict().items())


@pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors"])
def test_a_missing_or_invalid_weights_file_is_reported(name, fresh, tmp_path):
    with pytest.raises(UserError, match=f"{name}: weights file not found"):
        load_weights(fresh, tmp_path / name)
    Path(tmp_path / name).write_text("<html>not found</html>")
    with pytest.raises(UserError, match=f"{name}: cannot read weights") as error:
        load_weights(fresh, tmp_path / name)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kept", [0, 1, 40, 500, 0.5, 0.99])
@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "pickle"])
def test_a_truncated_file_is_rejected_in_one_line(is_zip, kept, regnet, fresh, tmp_path):
    path = tmp_path / "weights.pth"
    torch.save(regnet.state_dict(), path, _use_new_zipfile_serialization=is_zip)
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content)) if isinstance(kept, float) else kept])
    with pytest.raises(UserError, match="cannot read weights") as error:
        load_weights(fresh, path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "options", "naming", "message"),
    [
        ("densenet121", {}, "pycls", "pycls has no names for DenseNet"),
        ("regnety_200mf", {}, "tim", "did you mean timm?"),
        ("regnety_200mf", {"head_width": 64}, "torchvision", "torchvision has no name for final.conv"),
    ],
)
def test_unsupported_namings_are_rejected(name, options, naming, message, tmp_path):
    with pytest.raises(UserError) as error:
        save_weights(build(name, 10, **options), tmp_path / "weights.pth", naming)
    assert message in str(error.value)


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize(("folder", "reason"), [("missing", "No such file or directory"), ("file", "Not a directory")])
def test_an_unwritable_path_is_reported(folder, reason, suffix, regnet, tmp_path):
    (tmp_path / "file").touch()
    path = tmp_path / folder / f"weights.{suffix}"
    with pytest.raises(UserError) as error:
        save_weights(regnet, path)
    assert str(error.value) == f"{path}: cannot be written: {reason}"


@pytest.mark.parametrize(
    ("naming", "convolution", "norm"), [("timm", "final_conv.conv", "final_conv.bn"), ("pycls", "head.conv", "head.bn")]
)
def test_a_head_convolution_is_named_as_in_other_libraries(naming, convolution, norm):
    names = translate_names(build("regnety_200mf", 10, head_width=64), naming)
    assert names["final.conv.weight"] == f"{convolution}.weight"
    assert {names[f"final.norm.{leaf}"] for leaf in ("weight", "bias", "running_mean", "running_var")} == {
        f"{norm}.{leaf}" for leaf in ("weight", "bias", "running_mean", "running_var")
    }
    assert names["head.weight"] == "head.fc.weight"
