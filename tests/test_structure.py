"""The structure of the code, read from its source."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator, Mapping
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("distrain", "launch")
FILES = {path: ast.parse(path.read_text()) for name in PACKAGES for path in sorted((ROOT / name).rglob("*.py"))}

# Rooms of distrain/data: each may import from those with a lower number.
LEVELS = {
    "cli": 5, "shards": 4, "loading": 3, "augmentation": 2, "sampling": 1, "storage": 1, "vetting": 1, "index": 0,
    "image": 0, "jpeg": 0, "worker": 0,
}  # fmt: skip

FORBIDDEN = (  # brackets, so that this line does not match itself
    r"hee[d]|struc[k]|strik[e]|fruitles[s]|come[s]? upo[n]|\bmen[d]\b|how-maniet[h]|judge[d]|\brun[g]\b|\bclim[b]"
    r"|undisturbe[d]|made[-_ ]u[p]|make-believ[e]|ane[w]|without a wor[d]"
)


def name_of(path: Path) -> str:
    """The dotted name of a module, that of its folder for __init__.py."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {name_of(path): tree for path, tree in FILES.items()}


def imports(node: ast.AST, inside_functions: bool = True) -> Iterator[str]:
    """Yield the dotted names that are imported, except under `if TYPE_CHECKING`."""
    if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
        return
    if isinstance(node, ast.FunctionDef) and not inside_functions:
        return
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    if isinstance(node, ast.ImportFrom):
        assert node.module is not None
        assert node.level == 0, f"relative import of {node.module}"
        yield from (f"{node.module}.{alias.name}" for alias in node.names)
    for child in ast.iter_child_nodes(node):
        yield from imports(child, inside_functions)


def dependencies(module: str) -> set[str]:
    """The modules of this project that a module imports, by name or as a package around one of them."""
    found = set()
    for name in imports(MODULES[module]):
        target = name if name in MODULES else name.rpartition(".")[0]
        if target in MODULES:
            pieces = target.split(".")
            packages = {".".join(pieces[:length]) for length in range(1, len(pieces))}
            found |= {target} | {package for package in packages if not f"{module}.".startswith(f"{package}.")}
    return found - {module}


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """The strongly connected components of more than one module (Tarjan 1972)."""
    order: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    found = []

    def visit(module: str) -> None:
        order[module] = lowest[module] = len(order)
        stack.append(module)
        for target in graph[module]:
            if target not in order:
                visit(target)
                lowest[module] = min(lowest[module], lowest[target])
            elif target in stack:
                lowest[module] = min(lowest[module], order[target])
        if lowest[module] == order[module]:
            component = stack[stack.index(module) :]
            del stack[stack.index(module) :]
            if len(component) > 1:
                found.append(sorted(component))

    for module in graph:
        if module not in order:
            visit(module)
    return found


def test_no_modules_import_each_other_in_a_circle():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == [["b", "c"]]
    assert circles({module: dependencies(module) for module in MODULES}) == []


def room_of(module: str) -> str:
    return module.removeprefix("distrain.data.").split(".")[0]


def test_imports_between_the_rooms_of_data_run_only_downwards():
    rooms = {module: room_of(module) for module in MODULES if module.startswith("distrain.data.")}
    assert set(rooms.values()) == set(LEVELS)
    backwards = [
        f"{module} imports {target}"
        for module, room in rooms.items()
        for target in sorted(dependencies(module) & rooms.keys())
        if rooms[target] != room and LEVELS[rooms[target]] >= LEVELS[room]
    ]
    assert backwards == []


def lines_of(node: ast.stmt) -> int:
    assert node.end_lineno is not None
    return node.end_lineno - node.lineno + 1


def test_no_function_is_longer_than_60_lines():
    too_long = [
        f"{path.relative_to(ROOT)}: {node.name} has {lines_of(node)} lines"
        for path, tree in FILES.items()
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and lines_of(node) > 60
    ]
    assert too_long == []


def test_no_file_is_longer_than_400_lines():
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text().splitlines())
        for folder in (*PACKAGES, "tests")
        for path in (ROOT / folder).rglob("*.py")
    }
    assert {name: length for name, length in lengths.items() if length > 400} == {}


def test_the_training_loop_fits_45_lines():
    (function,) = [
        node
        for node in MODULES["distrain.train"].body
        if isinstance(node, ast.FunctionDef) and node.name == "train_steps"
    ]
    (loop,) = [node for node in function.body if isinstance(node, ast.For)]
    assert ast.unparse(loop.target) == "step"
    assert lines_of(loop) < lines_of(function) <= 45


@pytest.mark.parametrize("where", ["distrain", "launch", "tests", "configs", "docker", "README.md"])
def test_the_forbidden_words_do_not_occur(where):
    paths = sorted((ROOT / where).rglob("*")) or [ROOT / where]
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in paths
        if path.is_file() and "__pycache__" not in path.parts
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if re.search(FORBIDDEN, line, re.IGNORECASE)
    ]
    assert found == []


def undeclared(module: str, declared: set[str], known: Mapping[str, list[str]], inside_functions: bool) -> list[str]:
    """What a module imports from distributions that are not declared. `known`: distributions by package."""
    used = {name.split(".")[0] for name in imports(MODULES[module], inside_functions)}
    return [
        f"{module} imports {name}"
        for name in sorted(used - sys.stdlib_module_names - set(PACKAGES))
        if not {normalize(found) for found in known.get(name, [])} & declared
    ]


def normalize(requirement: str) -> str:
    """The name of a distribution in a requirement, as PyPI compares names."""
    name = re.split(r"[^A-Za-z0-9._-]", requirement, maxsplit=1)[0]
    return re.sub(r"[-_.]+", "-", name).lower()


def test_everything_imported_is_a_declared_dependency():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = {normalize(requirement) for requirement in project["dependencies"]}
    optional = {normalize(name) for names in project["optional-dependencies"].values() for name in names}
    known = packages_distributions()
    assert [line for module in MODULES for line in undeclared(module, declared, known, False)] == []
    assert [line for module in MODULES for line in undeclared(module, declared | optional, known, True)] == []
