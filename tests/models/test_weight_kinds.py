"""Files that hold something else than the weights of a network, and weights that others could replace."""

import hashlib
import http.server
import threading
from collections.abc import Iterator
from functools import partial

import pytest
import torch

from distrain.errors import UserError
from distrain.models import build, load_weights


@pytest.fixture(scope="module")
def network():
    return build("densenet_bc_10_4", 2)


class Code:
    def __reduce__(self):
        return (print, ("executed",))


@pytest.mark.parametrize(
    ("wrap", "message"),
    [
        (lambda state: {"weights": state}, r"contains no tensors at its top level, only below weights: save that map"),
        (lambda state: {"model_ema": state}, r"contains no tensors at its top level, only below model_ema: save that"),
        (
            lambda state: {f"model/{name}": tensor for name, tensor in state.items()},
            r"the state of a run, not the weights of a network: give the run, as runs/NAME:STEP",
        ),
        (lambda state: {"state_dict": state, "hook": Code()}, r"cannot read weights: .*only tensors and plain values"),
    ],
    ids=["unknown wrapper", "EMA alone", "state of a run", "code"],
)
def test_what_a_file_holds_instead_of_weights_is_said(network, tmp_path, capsys, wrap, message):
    torch.save(wrap(network.state_dict()), tmp_path / "a.pth")
    with pytest.raises(UserError, match=rf"^{tmp_path}/a.pth: {message}"):
        load_weights(network, tmp_path / "a.pth")
    assert "executed" not in capsys.readouterr().out


def test_the_folder_of_a_checkpoint_is_named_as_the_run_and_step_to_give(network, tmp_path):
    checkpoint = tmp_path / "runs" / "x" / "checkpoints" / "step-00000010"
    checkpoint.mkdir(parents=True)
    with pytest.raises(UserError, match=rf"^{checkpoint}: a checkpoint and not a weights file: give .*/runs/x:10$"):
        load_weights(network, checkpoint)


@pytest.mark.parametrize("prefix", ["module.", "model.", "module._orig_mod."])
def test_prefixes_of_wrappers_and_the_counter_of_averaged_models_do_not_matter(network, tmp_path, prefix):
    state = {f"{prefix}{name}": tensor for name, tensor in network.state_dict().items()}
    torch.save({"n_averaged": torch.tensor(3), **state}, tmp_path / "a.pth")
    assert "newly initialized: none" in load_weights(network, tmp_path / "a.pth")


@pytest.fixture
def website(network, tmp_path, monkeypatch) -> Iterator[str]:
    """Serves a.pth; /away redirects to another host without https."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    torch.save(network.state_dict(), tmp_path / "a.pth")

    class Website(http.server.SimpleHTTPRequestHandler):
        def do_GET(self):
            if self.path != "/away.pth":
                return super().do_GET()
            self.send_response(302)
            self.send_header("Location", f"http://0.0.0.0:{server.server_port}/a.pth")
            self.end_headers()
            return None

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Website, directory=str(tmp_path))) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://0.0.0.0:{server.server_port}"
        server.shutdown()


def test_weights_over_http_need_their_checksum(network, website, tmp_path):
    with pytest.raises(UserError, match=r"a\.pth: over http:// anybody on the way can replace the file: use https:"):
        load_weights(network, f"{website}/a.pth")
    digest = hashlib.sha256((tmp_path / "a.pth").read_bytes()).hexdigest()
    assert "loaded" in load_weights(network, f"{website}/a.pth#sha256={digest}")
    with pytest.raises(UserError, match=r"its SHA-256 starts with .* not with 0000"):
        load_weights(network, f"{website}/a.pth?again#sha256={'0' * 64}")


def test_a_redirect_to_http_is_not_followed_without_a_checksum(network, website):
    with pytest.raises(UserError, match=r"redirected to http://0\.0\.0\.0:\d+/a\.pth, which is not https://"):
        load_weights(network, f"{website.replace('0.0.0.0', '127.0.0.1')}/away.pth")
