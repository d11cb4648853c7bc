"""The filter of a search: a subset of SQL's boolean expressions over metadata, parsed and checked for every store.

    family = 'noto' AND (year > 2016 OR NOT language IN ('zh', 'ja'))

A comparison is a column, an operator (`= != <> < <= > >=`, or `IN` and `NOT IN` with values in parentheses) and a
value: a text in single quotes (`''` stands for one quote), a number, or true or false. Numbers compare as numbers,
whole or not. As in SQL, an item that lacks a column fails every comparison with it as well as the negated comparison.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, TypeVar

from lark import Lark, Transformer, UnexpectedInput, UnexpectedToken, v_args
from lark.exceptions import VisitError

from retrieval.collections.base import CollectionError, Value

MAX_LENGTH = 10_000  # characters of an expression
MAX_DEPTH = 20  # of nested AND, OR and NOT
COLUMN = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,63}")
KEYWORDS = frozenset({"and", "or", "not", "in", "true", "false"})
INTEGERS = range(-(2**63), 2**63)
TYPE_NAMES: Mapping[type, str] = {str: "text", int: "an integer", float: "a number", bool: "true or false"}

GRAMMAR = r"""
?either: both ("OR"i both)*
?both: negation ("AND"i negation)*
?negation: "NOT"i negation -> inverse
         | NAME OPERATOR value -> comparison
         | NAME "IN"i "(" value ("," value)* ")" -> one_of
         | NAME "NOT"i "IN"i "(" value ("," value)* ")" -> none_of
         | "(" either ")"
?value: TEXT -> text
      | NUMBER -> number
      | "TRUE"i -> true
      | "FALSE"i -> false
NAME: /[A-Za-z][A-Za-z0-9_]*/
OPERATOR: "=" | "!=" | "<>" | "<=" | ">=" | "<" | ">"
TEXT: /'([^']|'')*'/
NUMBER: /[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?/
%ignore /\s+/
"""


class WhereError(CollectionError):
    """An expression that cannot be parsed or does not fit the columns; the message is one line."""


@dataclass(frozen=True)
class Comparison:
    """A column compared with a value, or with several by `in`. Operators are those of SQL; `<>` becomes `!=`."""

    column: str
    operator: str
    values: tuple[Value, ...]
    depth = 1


@dataclass(frozen=True)
class Inverse:
    """NOT of an expression."""

    part: Expression

    @property
    def depth(self) -> int:
        return self.part.depth + 1


@dataclass(frozen=True)
class Junction:
    """Expressions joined by `and` or `or`."""

    operator: str
    parts: tuple[Expression, ...]

    @property
    def depth(self) -> int:
        return max(part.depth for part in self.parts) + 1


Expression = Comparison | Inverse | Junction
Node = TypeVar("Node", Inverse, Junction)


@v_args(inline=True)
class _Builder(Transformer[Any, Expression]):
    def text(self, token: str) -> str:
        return token[1:-1].replace("''", "'")

    def number(self, token: str) -> int | float:
        if not token.lstrip("+-").isdigit():
            number = float(token)
            if not math.isfinite(number):
                raise WhereError(f"the number {token[:30]} is too large")
            return number
        if len(token) > 20 or not -(2**63) <= int(token) < 2**63:
            raise WhereError(f"the integer {token[:30]} does not fit into 64 bits")
        return int(token)

    def true(self) -> bool:
        return True

    def false(self) -> bool:
        return False

    def comparison(self, column: str, operator: str, value: Value) -> Comparison:
        return Comparison(str(column), "!=" if operator == "<>" else str(operator), (value,))

    def one_of(self, column: str, *values: Value) -> Comparison:
        return Comparison(str(column), "in", values)

    def none_of(self, column: str, *values: Value) -> Inverse:
        return Inverse(self.one_of(column, *values))

    def inverse(self, part: Expression) -> Inverse:
        return _shallow(Inverse(part))

    def both(self, *parts: Expression) -> Junction:
        return _shallow(Junction("and", parts))

    def either(self, *parts: Expression) -> Junction:
        return _shallow(Junction("or", parts))


def _shallow(node: Node) -> Node:
    if node.depth > MAX_DEPTH:
        raise WhereError(f"nested deeper than {MAX_DEPTH}")
    return node


@cache
def _parser() -> Lark:
    # the tree is built while parsing, so that no depth of parentheses can exhaust Python's stack
    return Lark(GRAMMAR, start="either", parser="lalr", transformer=_Builder())


def all_of(conditions: Sequence[str]) -> str | None:
    """One expression that is true where all of `conditions` are; None for none.

    Raises `WhereError` for one that is no expression by itself: parentheses alone would let `a = 1) OR (b = 2` out.
    """
    for condition in conditions:
        _parse(condition)
    return " AND ".join(f"({condition})" for condition in conditions) or None


def parse_where(text: str, columns: Mapping[str, type]) -> Expression:
    """Parse an expression and check it against `columns` (name -> str, int, float or bool). Raises `WhereError`."""
    return _fitted(_parse(text), columns)


def _parse(text: str) -> Expression:
    if len(text) > MAX_LENGTH:
        raise WhereError(f"where: the expression has {len(text)} characters; at most {MAX_LENGTH} are allowed")
    try:
        expression: Expression = _parser().parse(text)  # type: ignore[assignment]  # what `_Builder` returns
    except UnexpectedInput as error:
        ended = isinstance(error, UnexpectedToken) and error.token.type == "$END"
        position = len(text) if ended or error.pos_in_stream is None else error.pos_in_stream
        excerpt = "its end"
        if position < len(text):
            excerpt = f"{text[position : position + 20]!r} at character {position + 1}"
        raise WhereError(
            f"where: cannot read {excerpt}; write comparisons such as family = 'noto', joined by AND, OR, NOT, IN"
        ) from error
    except (WhereError, VisitError) as error:
        raise WhereError(f"where: {error.orig_exc if isinstance(error, VisitError) else error}") from error
    return expression


def _fitted(expression: Expression, columns: Mapping[str, type]) -> Expression:
    """The expression with every value of the type of its column. Raises `WhereError`."""
    if isinstance(expression, Junction):
        return Junction(expression.operator, tuple(_fitted(part, columns) for part in expression.parts))
    if isinstance(expression, Inverse):
        return Inverse(_fitted(expression.part, columns))
    kind = columns.get(expression.column)
    if kind is None:
        raise WhereError(f"where: no column {expression.column!r}; there are: {', '.join(columns) or 'none'}")
    for value in expression.values:
        if type(value) is not kind and not (kind in (int, float) and type(value) in (int, float)):
            raise WhereError(f"where: {expression.column} is {TYPE_NAMES[kind]}, compared with {_sql_value(value)}")
    if kind is bool and expression.operator not in ("=", "!=", "in"):
        raise WhereError(f"where: {expression.column} is true or false, and has no {expression.operator}")
    if kind is int:
        return _whole(expression)
    return replace(expression, values=tuple(map(float, expression.values))) if kind is float else expression


def _whole(comparison: Comparison) -> Comparison | Junction:
    """What a comparison with fractions says of whole numbers, in whole numbers: `> 2016.5` is `> 2016`."""
    column, operator = comparison.column, comparison.operator
    if operator in ("=", "!=", "in"):
        values = tuple(int(value) for value in comparison.values if value == int(value) and int(value) in INTEGERS)
        if values:
            return Comparison(column, operator, values)
        return _never(column) if operator != "!=" else _always(column)
    (value,) = comparison.values
    assert isinstance(value, int | float)
    bound = math.floor(value) if operator in (">", "<=") else math.ceil(value)
    if bound in INTEGERS:
        return Comparison(column, operator, (bound,))
    return _always(column) if (bound < 0) == (operator in (">", ">=")) else _never(column)


def _never(column: str) -> Junction:
    """False where there is a value; an item without one fails this and its negation, as it does any comparison."""
    return Junction("and", (Comparison(column, "=", (0,)), Comparison(column, "=", (1,))))


def _always(column: str) -> Junction:
    """True where there is a value; see `_never`."""
    return Junction("or", (Comparison(column, "=", (0,)), Comparison(column, "!=", (0,))))


def to_sql(expression: Expression) -> str:
    """The expression as LanceDB (DataFusion) reads it."""
    return _render(expression, "=", lambda name: f"`{name}`", _sql_value, "({})")


def to_milvus(expression: Expression, name: Callable[[str], str] = str) -> str:
    """The expression as Milvus reads it; `name` turns a column into its name there."""
    return _render(expression, "==", name, _milvus_value, "[{}]")


def _render(
    expression: Expression,
    equal: str,
    name: Callable[[str], str],
    value: Callable[[Value], str],
    listed: str,
) -> str:
    def render(part: Expression) -> str:
        if isinstance(part, Junction):
            return "(" + f" {part.operator} ".join(map(render, part.parts)) + ")"
        if isinstance(part, Inverse):
            return f"(not {render(part.part)})"
        values = ", ".join(map(value, part.values))
        operator = equal if part.operator == "=" else part.operator
        return f"({name(part.column)} {operator} {listed.format(values) if operator == 'in' else values})"

    return render(expression)


def _sql_value(value: Value) -> str:
    if isinstance(value, str):
        return sql_text(value)
    return str(value).lower()


def _milvus_value(value: Value) -> str:
    if isinstance(value, str):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'
    return str(value).lower()


def sql_text(text: str) -> str:
    """A text as a literal of SQL."""
    return "'" + text.replace("'", "''") + "'"
