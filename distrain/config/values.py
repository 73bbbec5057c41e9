"""Values as the schema types them: text as it was typed, numbers and lists only where a setting has them."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import is_dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml

from distrain.errors import UserError

_INT = re.compile(r"[+-]?[0-9]+(_[0-9]+)*")
_FLOAT = re.compile(r"[+-]?([0-9]+(_[0-9]+)*\.?[0-9]*|\.[0-9]+)(e[+-]?[0-9]+)?|[+-]?\.?(inf|nan)", re.IGNORECASE)
_BOOLS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
_NULLS = ("", "~", "null")
_MAX_DIGITS = 18  # so that an integer has 64 bits
_TAGS = {
    f"tag:yaml.org,2002:{name}"
    for name in ("str", "int", "float", "bool", "null", "timestamp", "value", "merge", "seq", "map")
}


class ValueProblem(Exception):  # noqa: N818, reported as a UserError that names the file and the key
    """A value that its setting cannot have. The message completes a sentence that begins with the key."""

    def __init__(self, message: str, key: str = "", line: int | None = None) -> None:
        super().__init__(message)
        self.key = key
        self.line = line


def read_text(text: str, kind: Any, key: str) -> Any:
    """The value of the setting `key`, of type `kind`, as typed on a command line. Raises ValueProblem."""
    if kind is Any or is_dataclass(kind) or get_origin(kind) in (list, dict):
        return read_node(compose(text), kind, key)
    return _read_scalar(text, kind, key)


def read_options(pairs: Sequence[str], flag: str) -> dict[str, Any]:
    """A network's options from key=value, as `model.options` has them. Raises UserError, which begins with `flag`."""
    options: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise UserError(f"{flag} {pair}: expected key=value, such as stem=cifar")
        try:
            options[key] = read_text(value, Any, key)
        except ValueProblem as error:
            raise UserError(f"{flag} {pair}: {error}") from error
    return options


def compose(text: str) -> yaml.Node:
    """Parse YAML. Raises ValueProblem, which names the line in a text of several."""
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line if error.problem_mark else 0
        rows = text.splitlines()
        if line < len(rows) and "\t" in rows[line][: len(rows[line]) - len(rows[line].lstrip())]:
            raise ValueProblem("indented with a tab: use spaces", line=line + 1) from error
        raise ValueProblem(f"not valid YAML: {error.problem or error.context}", line=line + 1) from error
    except yaml.YAMLError as error:
        raise ValueProblem(f"not valid YAML: {' '.join(str(error).splitlines()[0].split())}") from error
    except RecursionError as error:
        raise ValueProblem("not valid YAML: nested too deeply") from error
    return node if node is not None else yaml.ScalarNode("tag:yaml.org,2002:null", "")


def read_node(node: yaml.Node, kind: Any, key: str = "", around: tuple[yaml.Node, ...] = ()) -> Any:
    """The value of a YAML node for a setting of type `kind`; for a dataclass a dictionary of those keys that occur.

    Raises ValueProblem naming the key below `key`. `around` are the nodes that contain this one.
    """
    line = node.start_mark.line + 1 if node.start_mark else None
    if node in around:
        raise ValueProblem("contains itself, by an anchor", key, line)
    if node.tag not in _TAGS:
        raise ValueProblem(f"has the tag {node.tag}: tags are not supported", key, line)
    around = (*around, node)
    if isinstance(node, yaml.MappingNode):
        return _read_mapping(node, kind, key, around)
    if isinstance(node, yaml.SequenceNode):
        if get_origin(kind) is not list and kind is not Any:
            raise ValueProblem(f"must be {_expected(kind)}, not a list", key, line)
        item = get_args(kind)[0] if get_args(kind) else Any
        return [read_node(child, item, key, around) for child in node.value]
    assert isinstance(node, yaml.ScalarNode)
    if kind is Any and node.style is not None:  # quoted
        return str(node.value)
    if is_dataclass(kind) and node.style is None and node.value in _NULLS:  # a section without settings
        return {}
    return _read_scalar(node.value, kind, key, line)


def kind_of(key: str, schema: Any) -> Any:
    """The type of the setting with a dotted key; None if the schema has no such key."""
    kind = schema
    for name in key.split("."):
        if get_origin(kind) is dict:
            kind = get_args(kind)[1]
        elif is_dataclass(kind):
            kind = get_type_hints(kind).get(name)
        elif kind is not Any:
            return None
    return kind


def _read_mapping(node: yaml.MappingNode, kind: Any, key: str, around: tuple[yaml.Node, ...]) -> dict[str, Any]:
    if not is_dataclass(kind) and get_origin(kind) is not dict and kind is not Any:
        raise ValueProblem(f"must be {_expected(kind)}, not a mapping", key, node.start_mark.line + 1)
    values: dict[str, Any] = {}
    for name, child in merged_items(node, key):
        inside = f"{key}.{name}" if key else name
        child_kind = kind_of(name, kind) if is_dataclass(kind) else (get_args(kind) or (Any, Any))[1]
        # A key that the schema lacks is reported by whoever knows the names of all settings.
        values[name] = read_node(child, Any if child_kind is None else child_kind, inside, around)
    return values


def merged_items(node: yaml.MappingNode, key: str = "") -> Iterator[tuple[str, yaml.Node]]:
    """Yield a mapping's keys and values, those of `<<` first. Raises ValueProblem for a key that occurs twice."""
    lines: dict[str, int] = {}
    own: list[tuple[str, yaml.Node]] = []
    for name, child in node.value:
        line = name.start_mark.line + 1
        inside = f"{key}.{name.value}" if key else str(name.value)
        if not isinstance(name, yaml.ScalarNode):
            raise ValueProblem("has a key that is not text", key, line)
        if name.value in lines:
            raise ValueProblem(f"occurs twice; the first is in line {lines[name.value]}: remove one", inside, line)
        lines[name.value] = line
        if name.tag != "tag:yaml.org,2002:merge":
            own.append((name.value, child))
            continue
        for base in child.value if isinstance(child, yaml.SequenceNode) else [child]:
            if not isinstance(base, yaml.MappingNode) or base is node:
                raise ValueProblem("must name mappings", inside, line)
            yield from merged_items(base, key)
    yield from own


def _read_scalar(text: str, kind: Any, key: str, line: int | None = None) -> Any:
    stripped = text.strip()
    if "${" in text or kind is str or get_origin(kind) is Literal:  # OmegaConf resolves ${...}
        return text
    if kind is Any:
        return _guess(stripped)
    if kind is bool and stripped.lower() in _BOOLS:
        return _BOOLS[stripped.lower()]
    if kind is int and _INT.fullmatch(stripped):
        if len(stripped) > _MAX_DIGITS:
            raise ValueProblem(f"has {len(stripped)} digits, at most {_MAX_DIGITS} are possible", key, line)
        return int(stripped)
    if kind is float and _FLOAT.fullmatch(stripped):
        return _to_float(stripped)
    raise ValueProblem(f"must be {_expected(kind)}, not {text!r}", key, line)


def _guess(text: str) -> Any:
    """What plain text without a type means in YAML."""
    if text in _NULLS:
        return None
    if text.lower() in _BOOLS:
        return _BOOLS[text.lower()]
    if _INT.fullmatch(text) and len(text) <= _MAX_DIGITS:
        return int(text)
    return _to_float(text) if _FLOAT.fullmatch(text) and any(map(str.isdigit, text)) else text


def _to_float(text: str) -> float:
    return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))


def _expected(kind: Any) -> str:
    if is_dataclass(kind):
        return "a mapping of settings"
    if get_origin(kind) is list:
        return "a list, such as [a, b]" if get_args(kind)[0] is str else "a list of numbers, such as [1, 2]"
    if get_origin(kind) is dict:
        return "a mapping, such as {name: value}"
    return {int: "an integer", float: "a number", bool: "true or false"}.get(kind, "text")
