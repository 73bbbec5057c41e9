"""Arithmetic and comparisons that a file may hold, such as `params <= 3e6 + 5.5e-3 * flops`.

Nothing in a file is executed: an expression is parsed by Python and compiled here, operation by operation.
"""

import ast
import math
import operator
from collections.abc import Callable, Collection, Mapping
from typing import Any

from distrain.errors import UserError, nearest

Compiled = Callable[[Mapping[str, Any]], Any]

_OPERATIONS: dict[type[ast.AST], Callable[..., Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: lambda base, power: float(base) ** power,  # an integer's power could fill the memory
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
    ast.Not: operator.not_,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "abs": abs,
    "len": len,
    "log": math.log,
    "max": max,
    "min": min,
    "round": round,
    "sqrt": math.sqrt,
    "sum": sum,
}


class Expression:
    """An expression over named numbers and lists of numbers."""

    def __init__(self, text: str, known: Collection[str], where: str) -> None:
        """Raises UserError, which begins with `where`, for anything but arithmetic and comparisons of `known` names."""
        self.text = text
        self._where = where
        try:
            self._tree = ast.parse(text.strip(), mode="eval").body
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            raise UserError(f"{where}: {text!r} is not an expression, such as flops <= 400e6") from error
        self.names = self._check(known)
        """The names it uses."""
        self._compute = _compile(self._tree)

    def evaluate(self, values: Mapping[str, Any]) -> Any:
        """The value. Raises UserError if it has none, as after a division by zero."""
        try:
            return self._compute(values)
        except (ArithmeticError, IndexError, TypeError, ValueError) as error:
            raise UserError(f"{self._where}: {self.text!r} has no value: {error}") from error

    def _check(self, known: Collection[str]) -> frozenset[str]:
        names = set()
        functions = {id(node.func) for node in ast.walk(self._tree) if isinstance(node, ast.Call)}
        for node in ast.walk(self._tree):
            if isinstance(node, ast.Name) and id(node) not in functions:
                if node.id not in known:
                    raise UserError(f"{self._where}: {self.text!r}: no {node.id} here: {nearest(node.id, known)}")
                names.add(node.id)
            elif not _is_allowed(node):
                raise UserError(
                    f"{self._where}: {self.text!r}: only arithmetic, comparisons, and, or, not, and "
                    f"{', '.join(_FUNCTIONS)} are known"
                )
        return frozenset(names)


def _is_allowed(node: ast.AST) -> bool:
    if isinstance(node, ast.Constant):
        return type(node.value) in (int, float)
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Name) and node.func.id in _FUNCTIONS and not node.keywords
    if isinstance(node, ast.Subscript):
        return isinstance(node.slice, (ast.Constant, ast.UnaryOp))
    kinds = (ast.BinOp, ast.UnaryOp, ast.BoolOp, ast.Compare, ast.Name, ast.Load, ast.And, ast.Or)
    return isinstance(node, kinds) or type(node) in _OPERATIONS


def _compile(node: ast.AST) -> Compiled:
    """A function of the values by name; an expression is evaluated for every network that is drawn."""
    if isinstance(node, ast.Constant):
        constant = node.value
        return lambda values: constant
    if isinstance(node, ast.Name):
        return operator.itemgetter(node.id)
    if isinstance(node, ast.BinOp):
        operation, left, right = _OPERATIONS[type(node.op)], _compile(node.left), _compile(node.right)
        return lambda values: operation(left(values), right(values))
    if isinstance(node, ast.UnaryOp):
        change, operand = _OPERATIONS[type(node.op)], _compile(node.operand)
        return lambda values: change(operand(values))
    if isinstance(node, ast.BoolOp):
        join, parts = (all if isinstance(node.op, ast.And) else any), [_compile(part) for part in node.values]
        return lambda values: join(part(values) for part in parts)
    if isinstance(node, ast.Compare):
        return _compile_comparison(node)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        function, arguments = _FUNCTIONS[node.func.id], [_compile(part) for part in node.args]
        return lambda values: function(*[argument(values) for argument in arguments])
    if isinstance(node, ast.Subscript):
        items, index = _compile(node.value), _compile(node.slice)
        return lambda values: items(values)[index(values)]
    raise TypeError(type(node).__name__)


def _compile_comparison(node: ast.Compare) -> Compiled:
    terms = [_compile(part) for part in (node.left, *node.comparators)]
    signs = [_OPERATIONS[type(sign)] for sign in node.ops]

    def compare(values: Mapping[str, Any]) -> bool:
        found = [term(values) for term in terms]
        return all(sign(left, right) for sign, left, right in zip(signs, found, found[1:], strict=False))

    return compare
