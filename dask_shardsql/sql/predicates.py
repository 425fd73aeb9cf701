"""Conditions on the columns of a query, apart from the library they come from and from any dialect.

Their logic is that of three values, which Arrow's kernels and SQL share. Where PostgreSQL compares
in another way than Arrow, what is written for it says so: PostgreSQL holds a NaN for equal to
another one, and for larger than all else; its order of texts is that of a collation, and a
``char(n)`` has no blanks at its end.
"""

from __future__ import annotations

import datetime
import math
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal

__all__ = [
    "All",
    "Any",
    "Arithmetic",
    "Compare",
    "Derived",
    "Field",
    "IsIn",
    "IsNull",
    "Like",
    "Node",
    "Not",
    "Term",
    "Value",
    "fields_of",
    "postgresql",
    "postgresql_term",
]

Value = bool | int | float | Decimal | str | datetime.date | datetime.datetime


@dataclass(frozen=True)
class Field:
    """A column.

    Parameters
    ----------
    name : str
        Its name.
    kind : {"boolean", "integer", "float", "decimal", "text", "char", "date", "timestamp"}
        What kind of values it has; a ``"char"`` is filled up with blanks.
    cast : str
        The type that it is given before anything else, if that is not its own.
    """

    name: str
    kind: str
    cast: str = ""

    def written(self, column: Callable[[str], str]) -> str:
        """Write it down; `column` returns how the column of a name is written."""
        return f"{column(self.name)}::{self.cast}" if self.cast else column(self.name)


@dataclass(frozen=True)
class Compare:
    """A column compared with a value, or with another column of the same kind.

    Parameters
    ----------
    operator : {"=", "<>", "<", "<=", ">", ">="}
        How.
    left : Field
        The column.
    right : Field or value
        What it is compared with: no NULL, and no NaN.
    """

    operator: str
    left: Field
    right: Field | Value


@dataclass(frozen=True)
class IsIn:
    """Whether a column has one of some values; never NULL."""

    field: Field
    values: tuple[Value, ...]


@dataclass(frozen=True)
class IsNull:
    """Whether a column is NULL."""

    field: Field


@dataclass(frozen=True)
class Not:
    """What is true where another condition is false."""

    condition: Node


@dataclass(frozen=True)
class All:
    """What is true where all of some conditions are."""

    conditions: tuple[Node, ...]


@dataclass(frozen=True)
class Any:
    """What is true where one of some conditions is."""

    conditions: tuple[Node, ...]


@dataclass(frozen=True)
class Derived(Field):
    """What is made of a column: ``name``, ``kind`` and ``cast`` are those of :class:`Field`.

    Parameters
    ----------
    function : str
        How; see `_DERIVED`.
    has_zone : bool
        Whether the column's values are instants, of which UTC's date and time is meant.
    """

    function: str = ""
    has_zone: bool = False

    def written(self, column: Callable[[str], str]) -> str:
        """Write it down; see `Field`."""
        plain = super().written(column)
        plain += " AT TIME ZONE 'UTC'" if self.has_zone else ""
        return _DERIVED[self.function].format(plain)


@dataclass(frozen=True)
class Like:
    """Whether a text is of a form.

    Parameters
    ----------
    field : Field
        The column.
    pattern : str
        The form, as LIKE has it: ``%``, ``_`` and the escapes of both by a backslash.
    """

    field: Field
    pattern: str


Node = Field | Compare | IsIn | IsNull | Not | All | Any | Like

_DERIVED = {
    "day": "extract(day FROM {})",
    "day_of_week": "(extract(isodow FROM {}) - 1)",
    "day_of_year": "extract(doy FROM {})",
    "hour": "extract(hour FROM {})",
    # code points, in a database of any encoding
    "length": "length(convert_to({}, 'UTF8'), 'UTF8')",
    "minute": "extract(minute FROM {})",
    "month": "extract(month FROM {})",
    "quarter": "extract(quarter FROM {})",
    "second": "floor(extract(second FROM {}))",
}


@dataclass(frozen=True)
class Arithmetic:
    """What is computed of columns and values: exact, or an error.

    Parameters
    ----------
    operator : {"+", "-", "*"}
        How.
    left, right : Field, Arithmetic or value
        Of what; no NULL, and no NaN.
    kind : {"integer", "float", "decimal"}
        What kind of value it is.
    type_name : str
        The type that it has, and that both are given before.
    """

    operator: str
    left: Term
    right: Term
    kind: str
    type_name: str


Term = Field | Arithmetic | Value


def fields_of(node: Node) -> set[str]:
    """Return the names of the columns in a condition."""
    if isinstance(node, Field):
        return {node.name}
    if isinstance(node, Compare):
        other = {node.right.name} if isinstance(node.right, Field) else set()
        return {node.left.name} | other
    if isinstance(node, IsIn | IsNull | Like):
        return {node.field.name}
    if isinstance(node, Not):
        return fields_of(node.condition)
    return set().union(*map(fields_of, node.conditions))


def postgresql(node: Node, column: Callable[[str], str]) -> str:
    """Write a condition down in PostgreSQL's dialect.

    Parameters
    ----------
    node : Node
        The condition.
    column : callable
        Returns how the column of a name is written.
    """
    if isinstance(node, Field):
        return node.written(column)
    if isinstance(node, Not):
        return f"(NOT {postgresql(node.condition, column)})"
    if isinstance(node, All | Any):
        word = " AND " if isinstance(node, All) else " OR "
        return f"({word.join(postgresql(one, column) for one in node.conditions)})"
    if isinstance(node, IsNull):
        return f"({node.field.written(column)} IS NULL)"
    if isinstance(node, IsIn):
        return _is_in(node, column)
    if isinstance(node, Like):
        return f'({node.field.written(column)} COLLATE "C" LIKE {_literal(node.pattern)})'
    return _compare(node, column)


def postgresql_term(term: Term, column: Callable[[str], str]) -> str:
    """Write a value down in PostgreSQL's dialect; see `postgresql`."""
    if isinstance(term, Field):
        return term.written(column)
    if not isinstance(term, Arithmetic):
        return _literal(term)
    left, right = (postgresql_term(one, column) for one in (term.left, term.right))
    found = f"({left}::{term.type_name} {term.operator} {right}::{term.type_name})"
    # pandas makes NULL of a NaN that is computed
    return f"nullif({found}, 'NaN')" if term.kind == "float" else found


def _is_in(node: IsIn, column: Callable[[str], str]) -> str:
    if not node.values:
        return "false"
    equal = [_compare(Compare("=", node.field, value), column) for value in node.values]
    found = " OR ".join(equal)
    if node.field.kind not in ("char", "text"):
        values = ", ".join(_literal(value) for value in node.values)
        found = f"{node.field.written(column)} IN ({values})"
    return f"(({found}) AND {node.field.written(column)} IS NOT NULL)"


def _compare(node: Compare, column: Callable[[str], str]) -> str:
    operator, kind, left = node.operator, node.left.kind, node.left.written(column)
    is_field = isinstance(node.right, Field)
    right = node.right.written(column) if isinstance(node.right, Field) else _literal(node.right)
    plain = f"{left} {operator} {right}"
    if kind == "text" and operator not in ("=", "<>"):
        return f'({left} COLLATE "C" {operator} {right})'
    if kind == "text" and operator == "=":  # an index may know the first; the second is exact
        return f'({plain} AND {left} COLLATE "C" = {right})'
    if kind == "text":
        return f'({left} COLLATE "C" <> {right})'
    if kind == "char":
        same = f"({left} = {right}::bpchar AND octet_length({left}) = octet_length({right}))"
        return same if operator == "=" else f"(NOT {same})"
    if kind == "float" and is_field:
        nothing = f"{left} IS NULL OR {right} IS NULL"
        unordered = f"{left} = 'NaN' OR {right} = 'NaN'"
        without = "true" if operator == "<>" else "false"
        return f"(CASE WHEN {nothing} THEN NULL WHEN {unordered} THEN {without} ELSE {plain} END)"
    if kind == "float" and operator in (">", ">="):
        return f"({plain} AND {left} <> 'NaN')"
    return f"({plain})"


def _literal(value: Value) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return f"({value})" if value < 0 else str(value)
    if isinstance(value, float):
        special = {math.inf: "Infinity", -math.inf: "-Infinity"}
        return f"'{special.get(value, repr(value))}'::float8"
    if isinstance(value, Decimal):
        return f"'{value:f}'::numeric"
    if isinstance(value, datetime.datetime):
        kind = "timestamp" if value.tzinfo is None else "timestamptz"
        return f"'{value.isoformat(sep=' ')}'::{kind}"
    if isinstance(value, datetime.date):
        return f"'{value.isoformat()}'::date"
    quoted = value.replace("'", "''")
    if "\\" in quoted:
        return "E'{}'::text".format(quoted.replace("\\", "\\\\"))
    return f"'{quoted}'::text"
