"""Read a run's configuration from YAML files and the command line, and print it."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import Field, fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException, ValidationError

from distrain.config.options import check_choice, choices
from distrain.config.renamed import check_current_name
from distrain.config.schema import Config
from distrain.errors import UserError, nearest


def load(path: str | Path | None, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file and what it extends, apply `key=value` overrides, check everything.

    Raises UserError naming the file or override and the key, with the nearest valid key or the cure.
    """
    merged = OmegaConf.structured(Config)
    for source, layer in [*_read_layers(Path(path))] if path else []:
        merged = _merge(merged, layer, source)
    for override in overrides:
        if "=" not in override:
            raise UserError(f"{override!r} is not an override: write key=value, such as batch.lanes=4")
        try:
            layer = OmegaConf.from_dotlist([override])
        except (yaml.YAMLError, OmegaConfBaseException) as error:
            raise UserError(f"{override}: not readable as key=value: {_first_line(error)}") from error
        merged = _merge(merged, layer, override)
    if missing := sorted(OmegaConf.missing_keys(merged)):
        where = f"{path}: " if path else ""
        raise UserError(f"{where}{', '.join(missing)} must be set: in the YAML file or as key=value")
    config = OmegaConf.to_object(merged)
    assert isinstance(config, Config)
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


def tracking_uri(config: Config) -> str:
    """Where MLflow reports go: the configured server, the environment's, or a file beside the runs."""
    default = f"sqlite:///{Path(config.run.dir).resolve()}/mlflow.db"
    return config.track.uri or os.environ.get("MLFLOW_TRACKING_URI") or default


def to_dict(config: Config) -> dict[str, Any]:
    """Plain nested dictionaries and lists, as YAML and JSON hold them."""
    plain = OmegaConf.to_container(OmegaConf.structured(config))
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


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
    """The whole configuration as YAML that can be read back, every key with its meaning beside it."""
    lines = []
    for section in fields(config):
        values = getattr(config, section.name)
        lines.append(f"{section.name}:")
        for entry in fields(values):
            value = yaml.safe_dump([getattr(values, entry.name)], default_flow_style=True, width=1000).strip()
            lines.append(f"  {f'{entry.name}: {value[1:-1]}':<36}  # {_meaning(values, entry)}")
    return "\n".join(lines) + "\n"


def _meaning(section: Any, entry: "Field[Any]") -> str:
    """The help of a field, after the values it may have if they are listed."""
    known = choices(get_type_hints(type(section))[entry.name])
    return f"{' | '.join(known)}; {entry.metadata['help']}" if known else str(entry.metadata["help"])


def _read_layers(path: Path, seen: tuple[Path, ...] = ()) -> Iterator[tuple[str, DictConfig]]:
    """Yield (file, content) of what `path` extends, outermost base first, then of `path`."""
    if path.resolve() in seen:
        raise UserError(f"{path}: extends itself via {', '.join(str(p) for p in seen)}")
    try:
        content = OmegaConf.load(path)
    except FileNotFoundError as error:
        raise UserError(f"{path}: configuration file not found") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid YAML: {_first_line(error)}") from error
    if not isinstance(content, DictConfig):
        raise UserError(f"{path}: expected a mapping")
    base = content.pop("extends", None)
    if base is not None:
        yield from _read_layers(path.parent / str(base), (*seen, path.resolve()))
    yield str(path), content


def _merge(config: DictConfig, layer: DictConfig, source: str) -> DictConfig:
    plain = OmegaConf.to_container(layer)
    assert isinstance(plain, dict)
    for key, value in flatten({str(key): value for key, value in plain.items()}).items():
        check_current_name(source, key, value)
    try:
        merged = OmegaConf.merge(config, layer)
    except ConfigKeyError as error:
        key = str(error.full_key)
        hint = nearest(key, _known_keys(Config), shown=[section.name for section in fields(Config)])
        raise UserError(f"{source}: unknown key {key}: {hint}") from error
    except OmegaConfBaseException as error:
        if isinstance(error, ValidationError) and error.full_key:
            _check_choices(error.full_key, OmegaConf.select(layer, error.full_key))
        where = f"{source}: {error.full_key}" if error.full_key else source
        raise UserError(f"{where}: {_first_line(error)}") from error
    assert isinstance(merged, DictConfig)
    return merged


def _check_choices(key: str, value: Any) -> None:
    """Raises UserError if `key` has a list of allowed values and `value` is not among them."""
    kind: Any = Config
    for name in key.split("."):
        kind = get_type_hints(kind)[name]
    check_choice(key, value, kind)


def _known_keys(schema: type, prefix: str = "") -> Iterator[str]:
    for entry in fields(schema):
        if isinstance(entry.type, type) and is_dataclass(entry.type):
            yield prefix + entry.name
            yield from _known_keys(entry.type, f"{prefix}{entry.name}.")
        else:
            yield prefix + entry.name


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split("\n")[0].split())
