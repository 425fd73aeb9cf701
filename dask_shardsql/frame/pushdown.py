"""Conditions of dask as conditions of SQL, where both are true for exactly the same rows.

A condition that is not known to be so is left to pandas: see `split_conditions`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa

from dask_shardsql.engine.drivers.narrowing import Computed
from dask_shardsql.engine.fetch import Answer
from dask_shardsql.frame import _dask as dask_
from dask_shardsql.frame.accessors import Rounded, derived_column, is_match, made_of, match
from dask_shardsql.frame.constants import (
    UnknownError,
    as_arrow_does,
    constant_for,
    held,
    value_for,
)
from dask_shardsql.sql import predicates
from dask_shardsql.sql.predicates import Compare, Derived, Field, IsIn, IsNull, Node, Not
from dask_shardsql.sql.types import Column

__all__ = [
    "Known",
    "can_push",
    "conjuncts",
    "is_computed",
    "known_column",
    "known_value",
    "split_conditions",
]

_OPERATORS = {
    dask_.EQ: "=",
    dask_.NE: "<>",
    dask_.LT: "<",
    dask_.LE: "<=",
    dask_.GT: ">",
    dask_.GE: ">=",
}
_TURNED = {"<": ">", "<=": ">=", ">": "<", ">=": "<=", "=": "=", "<>": "<>"}
_EDGES = {"both": (">=", "<="), "left": (">=", "<"), "right": (">", "<="), "neither": (">", "<")}
_MOST_VALUES = 1000
_TEXTS = ("text", "varchar")


_ARITHMETIC = {dask_.Add: "+", dask_.Sub: "-", dask_.Mul: "*"}
_INTEGERS = {pa.int16(): "int2", pa.int32(): "int4", pa.int64(): "int8"}


class Known(NamedTuple):
    """A column of a read, or what is computed of its columns, and SQL and Arrow agree on."""

    term: predicates.Term
    kind: str
    arrow_type: pa.DataType
    type_name: str


def can_push(answer: Answer, dtype_backend: str) -> bool:
    """Whether conditions on an answer's columns can become SQL at all."""
    return dtype_backend == "pyarrow" and answer.gather is None


def split_conditions(condition: Any, read: Any) -> tuple[tuple[Node, ...], Any]:
    """Split a condition of dask into what SQL can say as exactly, and the rest.

    Parameters
    ----------
    condition : Expr
        The condition.
    read : ReadShards
        The read whose rows it is for.

    Returns
    -------
    tuple of Node, and Expr or None
        Rows are wanted for which all of them are true.
    """
    pushed: list[Node] = []
    rest = None
    translate = _Translator(read)
    for one in conjuncts(condition):
        try:
            pushed.append(translate.condition(one))
        except UnknownError:
            rest = one if rest is None else dask_.And(rest, one)
    return tuple(pushed), rest


def known_value(expr: Any, read: Any) -> Known | None:
    """Return what an expression is of a read's columns, if SQL knows that."""
    try:
        return _Translator(read).value(expr)
    except UnknownError:
        return None


def known_column(name: Any, read: Any) -> Known | None:
    """Return the column of that name, if there is one and SQL knows its kind of values."""
    try:
        return _Translator(read).column(name)
    except UnknownError:
        return None


def is_computed(expr: Any) -> bool:
    """Whether it is an operation that SQL may know, whatever it is of."""
    return type(expr) in _ARITHMETIC or _is_renamed(expr)


def _is_renamed(expr: Any) -> bool:
    """Whether only a column's name changes."""
    return type(expr) is dask_.RenameSeries and isinstance(expr.operand("index"), str | None)


def conjuncts(condition: Any) -> Iterator[Any]:
    """Give the conditions that are joined by &."""
    if isinstance(condition, dask_.And):
        yield from conjuncts(condition.left)
        yield from conjuncts(condition.right)
    else:
        yield condition


class _Translator:
    """Writes conditions on the rows of one read."""

    def __init__(self, read: Any) -> None:
        self._read = read
        answer = read.operand("answer")
        both = list(zip(answer.columns, answer.described, strict=True))
        # the user's choice, for which the server has the same numbers
        self._as_floats = {
            column.name
            for column, described in both
            if column.arrow_type == pa.float64() and described.type_name.startswith("numeric")
        }
        self._columns: dict[str, Column | Computed] = {
            column.name: column
            for column, described in both
            if column.arrow_type == described.arrow_type or column.name in self._as_floats
        }
        self._columns |= {one.name: one for one in read.operand("computed")}
        # what is NULL to pandas there may be a value to the server
        self._may_be_null = answer.query.unrepresentable == "null"

    def condition(self, expr: Any) -> Node:
        """Return a condition, or raise where it is not known to be the same."""
        kind = type(expr)
        if kind in (dask_.And, dask_.Or):
            both = (self.condition(expr.left), self.condition(expr.right))
            return predicates.All(both) if kind is dask_.And else predicates.Any(both)
        if kind is dask_.Invert:
            return Not(self.condition(expr.frame))
        if kind is dask_.IsNa:
            return IsNull(self.field(expr.frame))
        if kind is dask_.NotNull:
            return Not(IsNull(self.field(expr.frame)))
        if kind is dask_.Isin:
            return self._is_in(expr)
        if kind is dask_.Between:
            edges = _EDGES.get(expr.inclusive)
            if edges is None:
                raise UnknownError
            field = self.field(expr.frame)
            ends = zip(edges, (expr.left, expr.right), strict=True)
            return predicates.All(tuple(self._compare(op, field, end) for op, end in ends))
        if kind in _OPERATORS:
            return self._comparison(_OPERATORS[kind], expr.left, expr.right)
        if is_match(expr):
            field = self.field(expr.frame)
            return match(expr, field, self._columns[field.name])
        field = self.field(expr)
        if field.kind != "boolean":
            raise UnknownError
        return field

    def _comparison(self, operator: str, left: Any, right: Any) -> Node:
        if not isinstance(left, dask_.Expr):
            left, right, operator = right, left, _TURNED[operator]
        field = self.field(left)
        if not isinstance(right, dask_.Expr):
            return self._compare(operator, field, right)
        other = self.field(right)
        same = self._column_of(field).arrow_type == self._column_of(other).arrow_type
        is_rounded = isinstance(field, Rounded) or isinstance(other, Rounded)
        if not same or is_rounded or field.kind in ("boolean", "char"):
            raise UnknownError
        return Compare(operator, field, other)

    def _compare(self, operator: str, field: Field, value: Any) -> Node:
        column = self._column_of(field)
        if isinstance(field, Rounded):
            return field.compare(operator, value, column)
        if field.kind in ("boolean", "char") and operator not in ("=", "<>"):
            raise UnknownError
        if field.kind == "decimal" and isinstance(value, float):
            return as_arrow_does(operator, field, value, column.arrow_type)
        return Compare(operator, field, value_for(value, column, field.kind))

    def _column_of(self, field: Field) -> Column | Computed:
        return derived_column(field) if isinstance(field, Derived) else self._columns[field.name]

    def _is_in(self, expr: Any) -> Node:
        field, values = self.field(expr.frame), expr.operand("values")
        if field.kind == "float":  # Arrow looks for bits there: 0.0 is not -0.0
            raise UnknownError
        if isinstance(values, dask_.DelayedExpr):
            values = held(values.operand("obj"))
        if not isinstance(values, list | tuple | set | frozenset | np.ndarray | pd.Series):
            raise UnknownError
        found = list(values)
        if len(found) > _MOST_VALUES:
            raise UnknownError
        column = self._column_of(field)
        if isinstance(field, Rounded):
            return field.is_in(found, column)
        return IsIn(field, tuple(value_for(value, column, field.kind) for value in found))

    def value(self, expr: Any) -> Known:
        """Return what an expression is, or raise where it is not known to be the same."""
        if isinstance(held := getattr(expr, "known", None), Known):
            return held
        if _is_renamed(expr):
            return self.value(expr.frame)
        if type(expr) is dask_.Projection and type(expr.frame) is dask_.Assign and expr.ndim == 1:
            assigned = dict(zip(expr.frame.keys, expr.frame.vals, strict=True))
            return self.value(assigned.get(expr.name, expr.frame.frame[expr.name]))
        if type(expr) not in _ARITHMETIC:
            return self.column(self._name_of(expr))
        of_type = getattr(expr._meta.dtype, "pyarrow_dtype", None)
        if of_type in _INTEGERS:
            kind, type_name = "integer", _INTEGERS[of_type]
        elif of_type == pa.float64():
            kind, type_name = "float", "float8"
        elif of_type is not None and pa.types.is_decimal128(of_type):
            kind, type_name = "decimal", f"numeric({of_type.precision},{of_type.scale})"
        else:
            raise UnknownError
        left, right = (self._operand(one, kind) for one in (expr.left, expr.right))
        computed_as = "numeric" if kind == "decimal" else type_name
        term = predicates.Arithmetic(_ARITHMETIC[type(expr)], left, right, kind, computed_as)
        return Known(term, kind, of_type, type_name)

    def _operand(self, expr: Any, kind: str) -> predicates.Term:
        if not isinstance(expr, dask_.Expr):
            return constant_for(expr, kind)
        found = self.value(expr)
        is_exact = found.kind == kind or (found.kind, kind) == ("integer", "decimal")
        if not is_exact or pa.types.is_float32(found.arrow_type):
            raise UnknownError
        return found.term

    def column(self, name: Any) -> Known:
        """Return the column of a name."""
        field = self.named(name)
        column = self._columns[field.name]
        return Known(field, field.kind, column.arrow_type, field.cast or column.type_name)

    def field(self, expr: Any) -> Field:
        """Return the column that an expression is of the read itself, or what is made of it."""
        if type(expr) in (dask_.FunctionMap, dask_.PropertyMap):
            field = self.field(expr.frame)
            return made_of(expr, field, self._columns[field.name])
        return self.named(self._name_of(expr))

    def _name_of(self, expr: Any) -> Any:
        if not isinstance(expr, dask_.Projection):
            raise UnknownError
        frame = expr.frame
        while type(frame) is dask_.Projection:
            frame = frame.frame
        if getattr(frame, "rows", None) != self._read.rows:
            raise UnknownError
        return expr.operand("columns")

    def named(self, name: Any) -> Field:
        """Return the column of a name."""
        column = self._columns.get(name) if isinstance(name, str) else None
        if column is None:
            raise UnknownError
        cast = "float8" if column.name in self._as_floats else ""
        return Field(column.name, self._kind(column), cast)

    def _kind(self, column: Column | Computed) -> str:
        of_type = column.arrow_type
        if pa.types.is_boolean(of_type):
            return "boolean"
        if pa.types.is_signed_integer(of_type):
            return "integer"
        if pa.types.is_floating(of_type):
            return "float"
        if column.type_name in _TEXTS:
            return "text"
        if column.type_name == "bpchar":
            return "char"
        if self._may_be_null:
            raise UnknownError
        if pa.types.is_decimal128(of_type):
            return "decimal"
        if pa.types.is_date32(of_type):
            return "date"
        if pa.types.is_timestamp(of_type):
            return "timestamp"
        raise UnknownError
