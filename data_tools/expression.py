"""A filter's language: a part of Python's expressions, compiled to functions. Nothing a user writes is run as Python.

    width >= 512 and contexts == 1 and json.aesthetic > 5 and 'sky' in lower(prompt)

Names are those of `NAMES`; `json.FIELD` or `json["any name"]` is an entry of the sample's JSON, at any depth. There are
comparisons, `and or not in`, `+ - * / %` on numbers, constants, lists, and the functions len, lower, number (of a
string), matches(text, 'regular expression', found anywhere) and has(json.FIELD).

A field that a sample lacks, or that is null, has no value: a clause that comes to need it does not hold, even under
`not`. `has` asks first: not has(json.score) or json.score > 5.
"""

import ast
import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

NAMES = ("key", "shard", "prompt", "width", "height", "contexts", "json")

_Value = Callable[[Mapping[str, Any]], Any]
_ARITHMETIC: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Mod: operator.mod,
}
_COMPARISON: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.In: lambda item, items: item in items,
    ast.NotIn: lambda item, items: item not in items,
}
_FUNCTIONS: dict[str, Callable[[Any], Any]] = {"len": len, "lower": lambda text: str.lower(text), "number": float}
_SYNTAX = "comparisons, and, or, not, in, + - * / %, names, json.FIELD, constants, lists and functions"


class MissingField(Exception):
    """The sample's JSON has no such field, or null there."""


@dataclass(slots=True)
class Clause:
    """One operand of the `and` at the top of an expression."""

    text: str
    _value: _Value

    def holds(self, sample: Mapping[str, Any]) -> bool:
        """Args: sample: a value for each of `NAMES`.

        Raises:
            MissingField: the clause needs a field that the sample lacks.
            ValueError: it cannot be worked out, such as a comparison of text with a number.
        """
        try:
            return bool(self._value(sample))
        except (TypeError, ValueError, ArithmeticError) as error:
            raise ValueError(
                f"{self.text!r} cannot be worked out: {error}. Text becomes a number by number(…)"
            ) from error


def parse_clauses(expression: str) -> list[Clause]:
    """Raises ValueError that names what is not part of the language."""
    try:
        body = _parsed(expression.strip())
        is_and = isinstance(body, ast.BoolOp) and isinstance(body.op, ast.And)
        nodes = body.values if is_and else [body]  # type: ignore[attr-defined]
        return [Clause(ast.unparse(node), _compiled(node)) for node in nodes]
    except (RecursionError, MemoryError) as error:
        raise _no_expression(expression, error) from error


def _parsed(expression: str) -> ast.expr:
    try:
        return ast.parse(expression, mode="eval").body
    except (SyntaxError, RecursionError, MemoryError, ValueError) as error:  # ValueError: of Python 3.11.2 at a NUL
        raise _no_expression(expression, error) from error


def _no_expression(expression: str, error: Exception) -> ValueError:
    return ValueError(f"{expression[:200]!r} is not an expression ({error})")


def _compiled(node: ast.expr) -> _Value:
    match node:
        case ast.Constant(value=str() | int() | float() as constant):
            return lambda sample: constant
        case ast.Name(id=name) if name in NAMES and name != "json":
            return operator.itemgetter(name)
        case ast.Name(id="json"):
            raise ValueError("json stands with a field: json.FIELD or json['any name']")
        case ast.Name(id=name):
            raise ValueError(f"{name!r} is no name; known are {', '.join(NAMES)}, with fields as json.{name}")
        case ast.Attribute() | ast.Subscript():
            return _field(node)
        case ast.BoolOp(op=op, values=nodes):
            values, combine = list(map(_compiled, nodes)), all if isinstance(op, ast.And) else any
            return lambda sample: combine(value(sample) for value in values)
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            value = _compiled(operand)
            return lambda sample: not value(sample)
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            value = _compiled(operand)
            return lambda sample: -value(sample)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _ARITHMETIC:
            return _arithmetic(_ARITHMETIC[type(op)], _compiled(left), _compiled(right))
        case ast.Compare(left=left, ops=ops, comparators=rest) if all(type(op) in _COMPARISON for op in ops):
            return _comparison([_COMPARISON[type(op)] for op in ops], list(map(_compiled, [left, *rest])))
        case ast.List(elts=nodes) | ast.Tuple(elts=nodes) | ast.Set(elts=nodes):
            items = list(map(_compiled, nodes))
            return lambda sample: [item(sample) for item in items]
        case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]):
            return _call(name, arguments)
        case _:
            raise ValueError(f"{ast.unparse(node)!r} is not part of the language: {_SYNTAX}")


def _field(node: ast.expr) -> _Value:
    """An entry of the sample's JSON, at any depth."""
    match node:
        case ast.Name(id="json"):
            return operator.itemgetter("json")
        case (
            ast.Attribute(value=inner, attr=name) | ast.Subscript(value=inner, slice=ast.Constant(value=str() as name))
        ):
            parent = _field(inner)
        case _:
            raise ValueError(f"{ast.unparse(node)!r} is not part of the language: fields are those of json")

    def value(sample: Mapping[str, Any]) -> Any:
        owner = parent(sample)
        found = owner.get(name) if isinstance(owner, dict) else None
        if found is None:
            raise MissingField(name)
        return found

    return value


def _arithmetic(operation: Callable[[Any, Any], Any], left: _Value, right: _Value) -> _Value:
    def value(sample: Mapping[str, Any]) -> Any:
        operands = left(sample), right(sample)
        if not all(isinstance(operand, int | float) for operand in operands):  # 'a' * 10**12 would fill the memory
            raise TypeError(f"arithmetic takes numbers, not {operands[0]!r} and {operands[1]!r}")
        return operation(*operands)

    return value


def _comparison(operations: list[Callable[[Any, Any], bool]], values: list[_Value]) -> _Value:
    def value(sample: Mapping[str, Any]) -> bool:
        left = values[0](sample)
        for compare, right_value in zip(operations, values[1:], strict=True):
            right = right_value(sample)
            if not compare(left, right):
                return False
            left = right
        return True

    return value


def _call(name: str, arguments: list[ast.expr]) -> _Value:
    match name, arguments:
        case "matches", [text_node, ast.Constant(value=str() as pattern)]:
            text = _compiled(text_node)
            try:
                search = re.compile(pattern).search
            except re.error as error:
                raise ValueError(f"{pattern!r} is not a regular expression ({error})") from error
            return lambda sample: search(text(sample)) is not None
        case "has", [ast.Attribute() | ast.Subscript() as node]:
            return _has(_field(node))
        case _, [argument] if name in _FUNCTIONS:
            function, value = _FUNCTIONS[name], _compiled(argument)
            return lambda sample: function(value(sample))
        case _:
            known = "len(x), lower(text), number(text), matches(text, 'pattern'), has(json.FIELD)"
            raise ValueError(f"{name} with {len(arguments)} arguments is not a function here; known are {known}")


def _has(field: _Value) -> _Value:
    def value(sample: Mapping[str, Any]) -> bool:
        try:
            field(sample)
        except MissingField:
            return False
        return True

    return value
