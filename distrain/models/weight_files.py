"""Files of weights, at a path or behind a URL: what they hold, as tensors by name."""

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

_WRAPPERS = ("model_state", "state_dict", "model")  # of pycls, timm, torchvision's training script
_AVERAGES = ("ema_state", "state_dict_ema", "model_ema")  # of the same

_TIMEOUT_S = 60


def read_weights(source: str | Path) -> tuple[Tensors, list[str]]:
    """Tensors by name, whatever they are wrapped in, and under which names the file also holds averages of them.

    Raises UserError for a source that cannot be fetched or read, or holds no tensors.
    """
    is_remote = str(source).startswith(("http://", "https://"))
    path = _fetch(str(source)) if is_remote else Path(source)
    if not path.is_file():
        raise UserError(f"{source}: no such file of weights")
    try:
        content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    except Exception as error:  # a damaged file makes torch.load raise whatever its bytes lead to
        cure = ""
        if is_remote:
            path.unlink(missing_ok=True)
            cure = " (the download is removed: check the URL, and try again)"
        raise UserError(f"{source}: cannot be read as weights: {_explain(error)}{cure}") from error
    averages = [name for name in _AVERAGES if isinstance(content, dict) and content.get(name)]
    for wrapper in _WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    if not isinstance(content, dict):
        raise UserError(f"{source}: holds a {type(content).__name__}, not tensors by name")
    tensors = {_modernise(str(name)): v for name, v in content.items() if isinstance(v, torch.Tensor)}
    if not tensors:
        raise UserError(f"{source}: holds no tensors")
    return tensors, averages


def write_weights(content: dict[str, Any], path: Path) -> None:
    """Write tensors by name to a .safetensors file, or anything to another of torch.save.

    Raises UserError where the file cannot be written.
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


def _modernise(name: str) -> str:
    """Drop the prefixes of wrappers (DistributedDataParallel, torch.compile), and write norm1 where old torchvision
    DenseNets say norm.1."""
    name = re.sub(r"^(module\.|_orig_mod\.)+", "", name)
    return re.sub(r"(denselayer\d+\.(?:norm|conv))\.([12]\.)", r"\1\2", name)


def _read_torch(path: Path) -> Any:
    # The training scripts of torchvision and timm save their command line beside the weights.
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path, map_location="cpu", weights_only=True)


def _read_safetensors(path: Path) -> Tensors:
    from safetensors.torch import load_file

    return load_file(path)


def _explain(error: Exception) -> str:
    """Why a file cannot be read. What torch says of it fills a coloured page, and advises to trust the file."""
    if isinstance(error, OSError):
        return str(error)
    if refused := re.search(r"GLOBAL ([\w.]+)", str(error)):
        return f"it holds a {refused[1]}, and only tensors and plain values are read: save the state_dict alone"
    return "it is damaged or no file of weights"


def _fetch(url: str) -> Path:
    """The file in torch's cache, downloaded if it is not there. Other URLs may end in the same name, so the whole of it
    tells files apart."""
    try:
        name = Path(urllib.parse.urlsplit(url).path).name
        key = hashlib.sha256(url.encode()).hexdigest()[:16]
        path = Path(torch.hub.get_dir()) / "checkpoints" / f"{key}-{name}"
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            checksum = re.search(r"-([0-9a-f]{8,})\.", name)
            _download(url, path, checksum[1] if checksum else "")
    except (OSError, http.client.HTTPException, ValueError) as error:  # ValueError: a URL that is none
        raise UserError(
            f"{url}: cannot be fetched: {error} (try again, or download it by hand and give its path)"
        ) from error
    return path


def _download(url: str, path: Path, checksum: str) -> None:
    """Write what `url` answers to `path`, all of it or nothing. `checksum`: how its SHA-256 must begin, in hex."""
    partial = path.with_name(f"{uuid.uuid4().hex}.partial")
    request = urllib.request.Request(url, headers={"User-Agent": "distrain"})
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as answer, partial.open("xb") as file:
            shutil.copyfileobj(answer, file)
            length, expected = file.tell(), answer.headers.get("Content-Length")
        if expected is not None and length != int(expected):
            raise OSError(f"only {length:,} of {int(expected):,} bytes came")
        with partial.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if not digest.startswith(checksum):
            raise OSError(f"its SHA-256 begins with {digest[: len(checksum)]}, not {checksum} as its name says")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
