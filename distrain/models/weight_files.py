"""Read and write weights files: tensors by name, from a path or a URL."""

import argparse
import base64
import hashlib
import http.client
import json
import re
import shutil
import urllib.parse
import urllib.request
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from distrain.errors import UserError
from distrain.masking import mask_secrets

Tensors = dict[str, torch.Tensor]

_WRAPPERS = ("model_state", "state_dict", "model")  # keys of pycls, timm and torchvision's training script
_EMA_KEYS = ("ema_state", "state_dict_ema", "model_ema")  # likewise

_RECORD = "distrain"  # key of the metadata of a .safetensors file

_TIMEOUT_S = 60


@dataclass(frozen=True)
class Weights:
    """The tensors of a network, by the names that their library gives them, and what is known of them."""

    source: str
    """Where they come from, without the secrets of a URL."""
    tensors: Tensors
    sha256: str
    """Of the file, or of the tensors where there is no file of their own."""
    ignored: tuple[str, ...] = ()
    """Keys of EMA weights that the file also holds."""
    classes: tuple[str, ...] = ()
    """Names of the classifier's outputs; empty if unknown."""
    record: dict[str, Any] = field(default_factory=dict)
    """What the source says of the network: network, options, preprocessing; empty if unknown."""


def read_weights(source: str | Path) -> Weights:
    """Read a file, .safetensors or torch.save, by path or URL; tensors are unwrapped from a training checkpoint.

    Raises UserError if the source cannot be downloaded or read, contains no tensors or values that are not finite.
    """
    is_remote = str(source).startswith(("http://", "https://"))
    path = _fetch(str(source)) if is_remote else Path(source)
    if path.is_dir():
        step = re.fullmatch(r"step-0*(\d+)", path.name)
        cure = f"give {path.absolute().parents[1]}:{step[1]}" if step else "give a file"
        raise UserError(f"{source}: a {'checkpoint' if step else 'folder'} and not a weights file: {cure}")
    if not path.is_file():
        raise UserError(f"{source}: weights file not found")
    content: Any
    record: dict[str, Any] = {}
    try:
        if path.suffix == ".safetensors":
            content, record = _read_safetensors(path)
        else:
            content = _read_torch(path)
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
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
    tensors = _select_tensors(str(source), content)
    require_finite(str(source), tensors)
    classes = tuple(map(str, record.get("classes", ())))
    return Weights(mask_secrets(str(source)), tensors, digest, tuple(ema_keys), classes, record)


def _select_tensors(source: str, content: dict[Any, Any]) -> Tensors:
    """The tensors of a mapping, by their names without prefixes. Raises UserError if there are none of a network."""
    tensors = {_normalize_name(str(name)): v for name, v in content.items() if isinstance(v, torch.Tensor)}
    tensors.pop("n_averaged", None)  # a counter of torch's AveragedModel
    if not tensors:
        nested = [
            str(name)
            for name, value in content.items()
            if isinstance(value, dict) and any(isinstance(v, torch.Tensor) for v in value.values())
        ]
        where = f" at its top level, only below {', '.join(nested)}: save that mapping alone" if nested else ""
        raise UserError(f"{source}: contains no tensors{where}")
    if any(name.startswith(("model/", "ema/")) for name in tensors):
        raise UserError(f"{source}: the state of a run, not the weights of a network: give the run, as runs/NAME:STEP")
    return tensors


def require_finite(source: str, tensors: Tensors) -> None:
    """Raises UserError if a tensor holds NaN or infinity."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise UserError(f"{source}: {name} holds NaN or infinite values: use the weights of an earlier epoch")


def write_weights(content: dict[str, Any], path: Path, record: dict[str, Any] | None = None) -> None:
    """Write tensors by name to a .safetensors file with a `record` of the network, or any content with torch.save.

    Raises UserError if the file cannot be written.
    """
    try:
        with path.open("wb") as file:
            if path.suffix == ".safetensors":
                from safetensors.torch import save

                file.write(save(content, {_RECORD: json.dumps(record)} if record else None))
            else:
                torch.save(content, file)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from error


def _normalize_name(name: str) -> str:
    """Strip the prefixes of DDP, torch.compile and wrappers, and rename norm.1 (old torchvision DenseNets) to norm1."""
    name = re.sub(r"^(module\.|_orig_mod\.|network\.|model\.)+", "", name)
    return re.sub(r"(denselayer\d+\.(?:norm|conv))\.([12]\.)", r"\1\2", name)


def _read_torch(path: Path) -> Any:
    # The training scripts of torchvision and timm save their arguments with the weights.
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path, map_location="cpu", weights_only=True)


def _read_safetensors(path: Path) -> tuple[Tensors, dict[str, Any]]:
    """The tensors of a file, and the record that `write_weights` wrote beside them, if any."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        record = json.loads((file.metadata() or {}).get(_RECORD, "{}"))
        if not isinstance(record, dict):
            raise TypeError(f"its {_RECORD} metadata is not a JSON object")
        return {name: file.get_tensor(name) for name in file.keys()}, record  # noqa: SIM118, no mapping


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
    url, _, fragment = url.partition("#")
    pinned = re.fullmatch(r"sha256=([0-9a-f]{64})", fragment.lower())
    try:
        if not pinned and not _is_authentic(url):
            raise UserError(
                f"{url}: over http:// anybody on the way can replace the file: use https://, or append "
                "#sha256= and its 64 digits"
            )
        name = Path(urllib.parse.urlsplit(url).path).name
        key = hashlib.sha256(url.encode()).hexdigest()[:16]
        path = Path(torch.hub.get_dir()) / "checkpoints" / f"{key}-{name}"
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            named = re.search(r"-([0-9a-f]{8,})\.", name)
            _download(url, path, pinned[1] if pinned else named[1] if named else "", bool(pinned))
        elif pinned:
            _require_checksum(path, pinned[1])
    except (OSError, http.client.HTTPException, ValueError) as error:  # ValueError: an invalid URL
        raise UserError(
            f"{url}: download failed: {error} (retry, or download it manually and pass the path)"
        ) from error
    return path


def _is_authentic(url: str) -> bool:
    """Whether what is read from a URL is what its host sends."""
    parts = urllib.parse.urlsplit(url)
    return parts.scheme != "http" or parts.hostname in (None, "localhost", "::1") or parts.hostname.startswith("127.")


def _require_checksum(path: Path, checksum: str) -> None:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if not digest.startswith(checksum):
        raise OSError(f"its SHA-256 starts with {digest[: len(checksum)]}, not with {checksum} as required")


def _download(url: str, path: Path, checksum: str, pinned: bool) -> None:
    """Download `url` to `path` atomically. `checksum`: required prefix of its SHA-256, in hex; `pinned`: all of it, so
    that it does not matter where the file comes from."""
    partial = path.with_name(f"{uuid.uuid4().hex}.partial")
    try:
        with urllib.request.urlopen(_request(url), timeout=_TIMEOUT_S) as response, partial.open("xb") as file:
            if not pinned and not _is_authentic(response.url):
                raise OSError(f"redirected to {response.url}, which is not https://")
            shutil.copyfileobj(response, file)
            length, expected = file.tell(), response.headers.get("Content-Length")
        if expected is not None and length != int(expected):
            raise OSError(f"received only {length:,} of {int(expected):,} bytes")
        _require_checksum(partial, checksum)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _request(url: str) -> urllib.request.Request:
    """A request that sends the user and password of a URL as HTTP wants them, to its host only."""
    parts = urllib.parse.urlsplit(url)
    login, at, host = parts.netloc.rpartition("@")
    request = urllib.request.Request(parts._replace(netloc=host).geturl(), headers={"User-Agent": "distrain"})
    if at:
        encoded = base64.b64encode(urllib.parse.unquote_to_bytes(login)).decode()
        request.add_unredirected_header("Authorization", f"Basic {encoded}")
    return request
