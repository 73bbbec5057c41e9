"""Read a run's configuration from YAML files and the command line, and print it."""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import Field, asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

import yaml
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from distrain.config.options import check_choice, choices
from distrain.config.renamed import check_current_name
from distrain.config.schema import Config
from distrain.config.values import ValueProblem, compose, kind_of, merged_items, read_node, read_text
from distrain.errors import UserError, nearest
from distrain.files import resolve
from distrain.masking import mask_secrets, remember_secrets

_DEPENDENT: dict[str, tuple[str, Any]] = {
    "model.name": ("model.options", {}),
    "data.image_size": ("data.size_schedule", []),
}
_INTERPOLATION = "write ${oc.env:NAME} for an environment variable, and \\${ for the characters themselves"


def load(path: str | Path | None, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file and what it extends, apply `key=value` overrides, check everything.

    Values are read by the type of their setting: text is taken as typed. What a file says of model.options belongs to
    its model.name, and of data.size_schedule to its data.image_size: where another one is set, it does not apply.
    Raises UserError naming the file or override and the key, with the nearest valid key or the cure.
    """
    merged = OmegaConf.structured(Config)
    for source, layer in [*read_layers(Path(path), Config, "batch: {lanes: 4}")] if path else []:
        _drop_dependent(merged, flatten(layer))
        _merge(merged, layer, source)
    given = [(override, _read_override(override)) for override in overrides]
    _drop_dependent(merged, {key: value for _, layer in given for key, value in flatten(layer).items()})
    for override, layer in given:
        _merge(merged, layer, override)
    try:
        if missing := sorted(OmegaConf.missing_keys(merged)):
            where = f"{path}: " if path else ""
            raise UserError(f"{where}{', '.join(missing)} must be set: in the YAML file or as key=value")
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise UserError(f"{error.full_key}: {_first_line(error)}; {_INTERPOLATION}") from error
    assert isinstance(config, Config)
    for value in flatten(to_dict(config)).values():
        remember_secrets(str(value))
    for key in config.run.change:
        if key not in changeable_settings(config):
            raise UserError(
                f"run.change: {key} cannot change during a run: {nearest(key, changeable_settings(config))}"
            )
    return config


def check_ranks(config: Config, world: int) -> None:
    """Raises UserError if the lanes cannot be distributed over `world` ranks."""
    lanes, strategy = config.batch.lanes, config.parallel.strategy
    if lanes < world:
        raise UserError(
            f"batch.lanes={lanes} does not fit {world} ranks: every rank needs at least one lane; "
            f"start at most {lanes}, or set batch.lanes={world} (a new run)"
        )
    if strategy != "ddp" and lanes % world:
        fitting = [ranks for ranks in range(1, world) if lanes % ranks == 0]
        raise UserError(
            f"parallel.strategy={strategy} needs the same number of lanes on every rank, and batch.lanes={lanes} is "
            f"not divisible by {world} ranks: start {fitting[-1]}, or set parallel.strategy=ddp"
        )
    if config.parallel.batch_norm == "sync" and lanes != world:
        raise UserError(
            f"parallel.batch_norm=sync needs one lane per rank, and there are batch.lanes={lanes} on {world} ranks: "
            f"start {lanes}, or set parallel.batch_norm=lane (a new run)"
        )


def to_dict(config: Config) -> dict[str, Any]:
    """Plain nested dictionaries and lists, as YAML and JSON hold them."""
    return asdict(config)


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"batch": {"lanes": 8}} -> {"batch.lanes": 8}."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def fixed_settings(config: Config) -> dict[str, Any]:
    """The settings that identify a run, by dotted key: it resumes only with the same ones."""
    values = to_dict(config)
    return {
        f"{section.name}.{entry.name}": values[section.name][entry.name]
        for section in fields(config)
        for entry in fields(getattr(config, section.name))
        if entry.metadata["on_resume"] != "free"
    }


def changeable_settings(config: Config) -> set[str]:
    """Dotted keys of the fixed settings that a resumed run may change on purpose."""
    return {
        f"{section.name}.{entry.name}"
        for section in fields(config)
        for entry in fields(getattr(config, section.name))
        if entry.metadata["on_resume"] == "changeable"
    }


def to_yaml(config: Config) -> str:
    """The whole configuration as YAML that can be read back, every key with its meaning beside it.

    Secrets are masked; a masked setting is refused when it is read.
    """
    lines = []
    for section in fields(config):
        values = getattr(config, section.name)
        lines.append(f"{section.name}:")
        for entry in fields(values):
            plain = [map_text(_show, getattr(values, entry.name))]
            value = yaml.safe_dump(plain, default_flow_style=True, width=float("inf"), allow_unicode=True).strip()
            lines.append(f"  {f'{entry.name}: {value[1:-1]}':<36}  # {_meaning(values, entry)}")
    return "\n".join(lines) + "\n"


def _meaning(section: Any, entry: "Field[Any]") -> str:
    """The help of a field, after the values it may have if they are listed."""
    known = choices(get_type_hints(type(section))[entry.name])
    return f"{' | '.join(known)}; {entry.metadata['help']}" if known else str(entry.metadata["help"])


def map_text(change: Callable[[str], str], tree: Any) -> Any:
    """Dictionaries and lists with `change` applied to every text in them."""
    if isinstance(tree, dict):
        return {key: map_text(change, value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [map_text(change, value) for value in tree]
    return change(tree) if isinstance(tree, str) else tree


def _show(text: str) -> str:
    """Text without secrets, and with what OmegaConf would resolve escaped."""
    return re.sub(r"(\\*)\$\{", lambda found: rf"{found[1] * 2}\${{", mask_secrets(text))


def _read_override(override: str) -> dict[str, Any]:
    """Return {"batch": {"lanes": 4}} for batch.lanes=4. Raises UserError unless it is key=value with such a value."""
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise UserError(f"{override!r} is not an override: write key=value, such as batch.lanes=4")
    check_current_name(override, key, text)
    kind = kind_of(key, Config)
    if kind is None:
        raise _unknown_key(override, key)
    if kind is not str or _is_location(key):
        text = _unquote(text)  # names have them if they were typed
    try:
        value = read_text(text, kind, key)
    except ValueProblem as error:
        raise UserError(f"{override}: {error.key}{' ' if error.key else ''}{error}") from error
    for name in reversed(key.split(".")):
        value = {name: value}
    return dict(value)


def _unquote(text: str) -> str:
    return text[1:-1] if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"" else text


def _is_location(key: str) -> bool:
    section, _, name = key.partition(".")
    return any(entry.metadata["location"] for entry in fields(get_type_hints(Config)[section]) if entry.name == name)


def read_layers(
    path: Path, kind: type, example: str, seen: tuple[Path, ...] = ()
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (file, content) of what `path` extends, outermost base first, then of `path`.

    The content is a mapping of those fields of the dataclass `kind` that occur, checked. Raises UserError.
    """
    if resolve(path) in seen:
        raise UserError(f"{path}: extends itself via {', '.join(str(p) for p in seen)}")
    try:
        node = compose(_read_utf8(path))
        if not isinstance(node, yaml.MappingNode):
            raise ValueProblem(f"expected a mapping, such as {example}")
        base = dict(merged_items(node)).get("extends")
        if base is not None:
            if not isinstance(base, yaml.ScalarNode) or not base.value:
                raise ValueProblem("must be the name of one file", "extends", base.start_mark.line + 1)
            node.value = [(name, child) for name, child in node.value if name.value != "extends"]
        content = read_node(node, kind)
    except ValueProblem as error:
        where = "" if error.line is None else f"line {error.line}: "
        raise UserError(f"{path}: {where}{error.key}{' ' if error.key else ''}{error}") from error
    if base is not None:
        extended = path.parent / Path(base.value).expanduser()
        if not extended.exists():
            raise UserError(f"{path}: extends {base.value}, which is not there: {extended}")
        yield from read_layers(extended, kind, example, (*seen, resolve(path)))
    yield str(path), content


def _read_utf8(path: Path) -> str:
    """The content of a configuration file, without a byte order mark. Raises UserError."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError as error:
        raise UserError(f"{path}: configuration file not found") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise UserError(f"{path}: line {line}: not UTF-8 text: save it as UTF-8") from error


def _drop_dependent(config: DictConfig, values: dict[str, Any]) -> None:
    """Reset those settings that belong to others of which `values`, by dotted key, differ."""
    for key, (dependent, default) in _DEPENDENT.items():
        before = OmegaConf.select(config, key)
        if before is not None and values.get(key, before) != before:
            OmegaConf.update(config, dependent, default, merge=False)


def _merge(config: DictConfig, layer: dict[str, Any], source: str) -> None:
    """Set the values of a layer in `config`, in place, since to copy it for each of many overrides takes long."""
    for key, value in flatten(layer).items():
        check_current_name(source, key, value)
        if kind_of(key, Config) is None:
            raise _unknown_key(source, key)
        if value == MISSING:
            raise UserError(f"{source}: {key}={MISSING} stands for a value that must be set: set another one")
        if isinstance(value, str) and "${" not in value:
            check_choice(key, value, kind_of(key, Config))
    try:
        config.merge_with(layer)
    except OmegaConfBaseException as error:
        where = f"{source}: {error.full_key}" if error.full_key else source
        hint = f"; {_INTERPOLATION}" if "${" in str(layer) else ""
        raise UserError(f"{where}: {_first_line(error)}{hint}") from error


def _unknown_key(source: str, key: str) -> UserError:
    """The error for a key of which the schema has only the beginning, if that."""
    names = key.split(".")
    known = [length for length in range(1, len(names)) if kind_of(".".join(names[:length]), Config) is not None]
    unknown = ".".join(names[: len(known) + 1])
    hint = nearest(unknown, _known_keys(Config), shown=[section.name for section in fields(Config)])
    return UserError(f"{source}: unknown key {unknown}: {hint}")


def _known_keys(schema: type, prefix: str = "") -> Iterator[str]:
    for entry in fields(schema):
        if isinstance(entry.type, type) and is_dataclass(entry.type):
            yield prefix + entry.name
            yield from _known_keys(entry.type, f"{prefix}{entry.name}.")
        else:
            yield prefix + entry.name


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split("\n")[0].split())
