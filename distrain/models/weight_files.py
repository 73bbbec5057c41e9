"""Read and write weights files: tensors by name, from a path or a URL."""

import argparse
import hashlib
import http.client
import re
import shutil
import urllib.parse
import urllib.request
import uuid
from pathlib import Path
from typing import Any

import torch

from distrain.errors import UserError

Tensors = dict[str, torch.Tensor]

_WRAPPERS = ("model_state", "state_dict", "model")  # keys of pycls, timm and torchvision's training script
_EMA_KEYS = ("ema_state", "state_dict_ema", "model_ema")  # likewise

_TIMEOUT_S = 60


def read_weights(source: str | Path) -> tuple[Tensors, list[str]]:
    """Return the tensors by name, unwrapped from a training checkpoint, and the keys of any EMA weights in the file.

    Raises UserError if the source cannot be downloaded or read, or contains no tensors.
    """
    is_remote = str(source).startswith(("http://", "https://"))
    path = _fetch(str(source)) if is_remote else Path(source)
    if not path.is_file():
        raise UserError(f"{source}: weights file not found")
    try:
        content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    except Exception as error:  # torch.load raises almost anything for a corrupt file
        hint = ""
        if is_remote:
            path.unlink(missing_ok=True)
            hint = " (download removed: check the URL and retry)"
        raise UserError(f"{source}: cannot read weights: {_explain(error)}{hint}") from error
    ema_keys = [name for name in _EMA_KEYS if isinstance(content, dict) and content.get(name)]
    for wrapper in _WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    if not isinstance(content, dict):
        raise UserError(f"{source}: expected a mapping of names to tensors, found a {type(content).__name__}")
    tensors = {_normalize_name(str(name)): v for name, v in content.items() if isinstance(v, torch.Tensor)}
    if not tensors:
        raise UserError(f"{source}: contains no tensors")
    return tensors, ema_keys


def write_weights(content: dict[str, Any], path: Path) -> None:
    """Write tensors by name to a .safetensors file, or any content with torch.save.

    Raises UserError if the file cannot be written.
    """
    try:
        with path.open("wb") as file:
            if path.suffix == ".safetensors":
                from safetensors.torch import save

                file.write(save(content))
            else:
                torch.save(content, file)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from error


def _normalize_name(name: str) -> str:
    """Strip the prefixes of DDP and torch.compile, and rename norm.1 (old torchvision DenseNets) to norm1."""
    name = re.sub(r"^(module\.|_orig_mod\.)+", "", name)
    return re.sub(r"(denselayer\d+\.(?:norm|conv))\.([12]\.)", r"\1\2", name)


def _read_torch(path: Path) -> Any:
    # The training scripts of torchvision and timm save their arguments with the weights.
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path, map_location="cpu", weights_only=True)


def _read_safetensors(path: Path) -> Tensors:
    from safetensors.torch import load_file

    return load_file(path)


def _explain(error: Exception) -> str:
    """Return why a file cannot be read. torch's own message is a page long and suggests weights_only=False."""
    if isinstance(error, OSError):
        return str(error)
    if rejected := re.search(r"GLOBAL ([\w.]+)", str(error)):
        return f"it contains a {rejected[1]}, but only tensors and plain values are loaded: save the state_dict only"
    return "it is corrupt or not a weights file"


def _fetch(url: str) -> Path:
    """Return the file in torch's cache, downloading it if it is absent. Files are keyed by the whole URL, as names may
    repeat."""
    try:
        name = Path(urllib.parse.urlsplit(url).path).name
        key = hashlib.sha256(url.encode()).hexdigest()[:16]
        path = Path(torch.hub.get_dir()) / "checkpoints" / f"{key}-{name}"
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            checksum = re.search(r"-([0-9a-f]{8,})\.", name)
            _download(url, path, checksum[1] if checksum else "")
    except (OSError, http.client.HTTPException, ValueError) as error:  # ValueError: an invalid URL
        raise UserError(
            f"{url}: download failed: {error} (retry, or download it manually and pass the path)"
        ) from error
    return path


def _download(url: str, path: Path, checksum: str) -> None:
    """Download `url` to `path` atomically. `checksum`: required prefix of its SHA-256, in hex."""
    partial = path.with_name(f"{uuid.uuid4().hex}.partial")
    request = urllib.request.Request(url, headers={"User-Agent": "distrain"})
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as response, partial.open("xb") as file:
            shutil.copyfileobj(response, file)
            length, expected = file.tell(), response.headers.get("Content-Length")
        if expected is not None and length != int(expected):
            raise OSError(f"received only {length:,} of {int(expected):,} bytes")
        with partial.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if not digest.startswith(checksum):
            raise OSError(f"its SHA-256 starts with {digest[: len(checksum)]}, not with {checksum} from its name")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
