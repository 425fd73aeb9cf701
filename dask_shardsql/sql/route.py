"""Which shards can have rows for which a condition is true.

A condition is read as PostgreSQL itself writes it down (``pg_get_viewdef``): every cast is in it,
and every literal has the type it is compared as. What is not understood in full says nothing, so
that every shard stays: a shard is left out only where no row of it can satisfy the condition.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from datetime import date, datetime
from decimal import Decimal
from typing import Any, NamedTuple

from sqlglot import exp

from dask_shardsql.errors import TopologyError
from dask_shardsql.sharding.function import ShardingFunction
from dask_shardsql.sharding.key_types import read_key, type_of_column, type_of_value
from dask_shardsql.sql.lists import constants_in

__all__ = ["possible_shards"]

# sqlglot's names of types, and what literals of them are read as
_TYPES = {
    **dict.fromkeys(("SMALLINT", "INT", "BIGINT"), "integer"),
    **dict.fromkeys(("TEXT", "VARCHAR"), "text"),
    **dict.fromkeys(("TIMESTAMP", "TIMESTAMPNTZ"), "timestamp"),
    "DECIMAL": "numeric",
    "DATE": "date",
    "UUID": "uuid",
}
_BITS = {"SMALLINT": 16, "INT": 32, "BIGINT": 64}
_MIRRORED: dict[type[exp.Expr], type[exp.Expr]] = {
    exp.LT: exp.GT,
    exp.GT: exp.LT,
    exp.LTE: exp.GTE,
    exp.GTE: exp.LTE,
}
_COMPARED = (exp.EQ, exp.NEQ, *_MIRRORED, exp.NullSafeEQ, exp.NullSafeNEQ)
_NULL = object()


def possible_shards(
    condition: exp.Expr | None,
    is_key: Callable[[exp.Expr], bool],
    function: ShardingFunction | None,
    shards: Sequence[str],
    key_type: str,
    *,
    may_be_missing: bool = False,
) -> frozenset[str]:
    """Return the shards that a query must visit: those that may have rows it is about.

    Parameters
    ----------
    condition : Expr, optional
        What is true for all those rows: what stands behind WHERE, or an inner join's ON, in the
        text that ``pg_get_viewdef`` writes (``standard_conforming_strings`` on, ``DateStyle``
        ISO), parsed in sqlglot's dialect ``postgres``.
    is_key : callable
        Whether a node is the shard key's column, of the table that is asked about. It is given
        whatever is compared, without parentheses.
    function : ShardingFunction, optional
        Where the table's rows are.
    shards : sequence of str
        All shards.
    key_type : str
        The shard key's type, as of ``format_type`` or in the catalog (``pg_catalog.int8``). Only
        integers, numeric, text, varchar, date, timestamp and uuid are compared as the server does;
        any other, and so ``""``, leaves all shards. Give that for a text whose collation is not
        deterministic: there, texts that are equal may be on several shards.
    may_be_missing : bool, default False
        Whether `condition` is about rows of an outer join that has NULLs where the table has no
        row (the right side of a LEFT JOIN): then a key that is NULL says nothing of the table's.

    Returns
    -------
    frozenset of str
        Some of `shards`: none where no row can satisfy the condition, all of them in doubt.
    """
    every = frozenset(shards)
    if condition is None or function is None:
        return every
    try:
        keys, found = _Reader(is_key, function, type_of_column(key_type)).rows(condition)
    except RecursionError:
        return every
    if may_be_missing and keys.null:
        return every
    return every if found is None or not found <= every else found


class _Keys(NamedTuple):
    """What the shard keys of rows can be, if a condition is true for the rows; perhaps too much.

    One of `values`, or where that is None any from `low` to `high`; or NULL, where `null` says so.
    """

    values: frozenset[Any] | None = None
    low: tuple[Any, bool] | None = None  # and whether the bound itself is left out
    high: tuple[Any, bool] | None = None  # and whether the bound itself is in it
    null: bool = False

    def both(self, other: _Keys) -> _Keys:
        """Return what is in both."""
        low = max((one for one in (self.low, other.low) if one is not None), default=None)
        high = min((one for one in (self.high, other.high) if one is not None), default=None)
        values = self.values if other.values is None else other.values
        if self.values is not None and other.values is not None:
            values = self.values & other.values
        if values is not None:
            values = frozenset(one for one in values if _is_between(one, low, high))
        elif low is not None and high is not None and not _is_between(low[0], None, high):
            values = frozenset()
        return _Keys(values, low, high, self.null and other.null)

    def either(self, other: _Keys) -> _Keys:
        """Return what is in one of them, and perhaps more."""
        null = self.null or other.null
        if self.values is None or other.values is None:
            return _Keys(null=null)
        return _Keys(self.values | other.values, null=null)


def _is_between(value: Any, low: tuple[Any, bool] | None, high: tuple[Any, bool] | None) -> bool:
    if low is not None and (value < low[0] or (value == low[0] and low[1])):
        return False
    return high is None or value < high[0] or (value == high[0] and high[1])


_ANY, _NONE, _NULL_KEY = _Keys(null=True), _Keys(frozenset()), _Keys(frozenset(), null=True)


class _Rows(NamedTuple):
    """The rows for which a condition can be true: their keys, and their shards (None: all)."""

    keys: _Keys
    shards: frozenset[str] | None


_ALL_ROWS, _NO_ROWS = _Rows(_ANY, None), _Rows(_NONE, frozenset())


class _Reader:
    """Reads conditions on one table's shard key, whose type is `kind` (None: another)."""

    def __init__(
        self,
        is_key: Callable[[exp.Expr], bool],
        function: ShardingFunction,
        kind: str | None,
    ) -> None:
        self._is_key, self._function, self._kind = is_key, function, kind

    def rows(self, node: exp.Expr) -> _Rows:
        """Return the rows for which a condition can be true; where it is NULL, it is not."""
        node = node.unnest()
        if isinstance(node, exp.And):
            return self._of_both([self.rows(part) for part in node.flatten()])
        if isinstance(node, exp.Or):
            return self._of_either([self.rows(part) for part in node.flatten()])
        if isinstance(node, exp.Boolean):
            return _ALL_ROWS if node.this else _NO_ROWS
        if isinstance(node, exp.Cast) and isinstance(node.this, exp.Null):
            return _NO_ROWS
        if _has_only(node, exp.Is, "this", "expression") and _is_true(node.expression):
            return self.rows(node.this)
        keys = self._keys(node)
        return _ALL_ROWS if keys is None else _Rows(keys, self._shards_of(keys))

    def _of_both(self, parts: Sequence[_Rows]) -> _Rows:
        keys, shards = _ANY, None
        for part in parts:
            keys = keys.both(part.keys)
            shards = _intersection(shards, part.shards)
        return _Rows(keys, _intersection(shards, self._shards_of(keys)))

    def _of_either(self, parts: Sequence[_Rows]) -> _Rows:
        keys, shards = _NONE, frozenset[str]()
        for part in parts:
            keys = keys.either(part.keys)
            shards |= part.shards or frozenset()
        return _Rows(keys, None if any(part.shards is None for part in parts) else shards)

    def _keys(self, node: exp.Expr) -> _Keys | None:
        """Return the keys for which a comparison is true; None if it is not understood."""
        is_not = _has_only(node, exp.Not, "this")
        if is_not:
            node = node.this.unnest()
        if _has_only(node, exp.Is, "this", "expression", "negate"):
            if not self._is_the_key(node.this) or not isinstance(node.expression, exp.Null):
                return None
            return _Keys() if is_not != bool(node.args.get("negate")) else _NULL_KEY
        if type(node) not in _COMPARED or not _has_only(node, exp.Binary, "this", "expression"):
            return None
        key, other = node.this, node.expression
        sign: type[exp.Expr] = type(node)
        if not self._is_the_key(key):
            key, other, sign = other, key, _MIRRORED.get(sign, sign)
        elif sign is exp.EQ and not is_not and _has_only(other.unnest(), exp.Any, "this"):
            return self._one_of(key, other.unnest().this)
        value = self._compared(key, other)
        if value is None:
            return None
        if sign in (exp.NullSafeEQ, exp.NullSafeNEQ):  # of which the server writes NOT (... NEQ)
            if (sign is exp.NullSafeEQ) == is_not:
                return None
            return _NULL_KEY if value is _NULL else _Keys(frozenset({value}))
        if is_not:
            return None
        if value is _NULL:
            return _NONE
        if sign is exp.EQ:
            return _Keys(frozenset({value}))
        if sign is exp.NEQ or self._kind == "text":
            return _Keys()  # no order but the collation's; NULL in any case is not among them
        if sign in (exp.LT, exp.LTE):
            return _Keys(high=(value, sign is exp.LTE))
        return _Keys(low=(value, sign is exp.GT))

    def _one_of(self, key: exp.Expr, array: exp.Expr) -> _Keys | None:
        """Return the keys that are among the elements of an array."""
        if self._kind is None or not self._is_the_key(key):
            return None
        if (found := _elements(array)) is None:
            return None
        values = [self._as_key(value) for value in found]
        if any(value is None for value in values):
            return None
        return _Keys(frozenset(value for value in values if value is not _NULL))

    def _compared(self, key: exp.Expr, other: exp.Expr) -> Any:
        """Return the value that the key is compared with; None if it is not, or it is unknown."""
        if self._kind is None or not self._is_the_key(key):
            return None
        return self._as_key(_constant(other))

    def _as_key(self, value: Any) -> Any:
        if self._kind == "timestamp" and type(value) is date:
            return datetime(value.year, value.month, value.day)
        return value if value is _NULL or type_of_value(value) == self._kind else None

    def _is_the_key(self, node: exp.Expr) -> bool:
        node = node.unnest()
        if self._is_key(node):
            return True
        # a varchar is compared as text, which changes nothing of it
        as_text = (
            self._kind == "text" and isinstance(node, exp.Cast) and _plain_type(node) == "TEXT"
        )
        return as_text and self._is_key(node.this.unnest())

    def _shards_of(self, keys: _Keys) -> frozenset[str] | None:
        found: frozenset[str] | None = frozenset()
        try:
            if keys.values is not None:
                found = frozenset(map(self._function.shard_of, keys.values))
            else:
                low, above = keys.low or (None, False)
                high, to = keys.high or (None, True)
                found = self._function.shards_of_range(
                    low, high, low_inclusive=not above, high_inclusive=to
                )
            if keys.null and found is not None:
                found |= {self._function.shard_of(None)}
        except TopologyError:  # it does not know such a key
            return None
        return found


def _intersection(one: frozenset[str] | None, other: frozenset[str] | None) -> Any:
    if one is None or other is None:
        return other if one is None else one
    return one & other


def _has_only(node: exp.Expr, kind: type[exp.Expr], *names: str) -> bool:
    """Whether a node is of a kind, and nothing is given but what is known to be understood."""
    given = {name for name, value in node.args.items() if value not in (None, False, [])}
    return isinstance(node, kind) and given <= set(names)


def _is_true(node: exp.Expr) -> bool:
    return isinstance(node, exp.Boolean) and bool(node.this)


def _plain_type(node: exp.Expr) -> str:
    """Return sqlglot's name of what a cast makes; nothing where that may change the value."""
    return _name_of_type(node.args.get("to")) if _has_only(node, exp.Cast, "this", "to") else ""


def _name_of_type(to: Any) -> str:
    is_plain = isinstance(to, exp.DataType) and _has_only(to, exp.DataType, "this")
    return str(getattr(to.this, "name", "")) if is_plain else ""


def _constant(node: exp.Expr) -> Any:
    """Return the value that a constant has for PostgreSQL; None for what else is written."""
    node = node.unnest()
    if isinstance(node, exp.Neg):
        value = _constant(node.this)
        if type(value) is Decimal:
            return value.copy_negate()
        return -value if type(value) is int else None
    if isinstance(node, exp.Literal) and not node.is_string:
        return _number(node.this)
    if not isinstance(node, exp.Cast):
        return None
    name = _plain_type(node)
    if isinstance(node.this, exp.Null):
        return _NULL if name in _TYPES else None
    if isinstance(node.this, exp.Literal) and node.this.is_string:
        return _read(node.this.this, name)
    return _cast(_constant(node.this), name)


def _number(text: str) -> Any:
    return read_key(text, "numeric" if "." in text else "integer")


def _read(text: str, name: str) -> Any:
    """Return the value of a string for a type."""
    # a backslash may stand for something else, where strings are not the standard's
    if name not in _TYPES or "\\" in text:
        return None
    return _if_it_fits(read_key(text, _TYPES[name]), name)


def _cast(value: Any, name: str) -> Any:
    """Return a value in another type; None if that may change it."""
    if type(value) is int and _TYPES.get(name) == "numeric":
        return Decimal(value)
    if name not in _TYPES or type_of_value(value) != _TYPES[name]:
        return value if value is _NULL and name in _TYPES else None
    return _if_it_fits(value, name)


def _if_it_fits(value: Any, name: str) -> Any:
    if type(value) is int and not -(1 << (_BITS[name] - 1)) <= value < 1 << (_BITS[name] - 1):
        return None
    return value


def _elements(array: exp.Expr) -> list[Any] | None:
    """Return the values of what an array is made of; None if it is not written with its elements.

    Those that are not understood are None.
    """
    array = array.unnest()
    if isinstance(array, exp.Array):
        if not _has_only(array, exp.Array, "expressions"):
            return None
        parts = array.expressions
        if len(parts) == 1 and (constants := constants_in(parts[0])) is not None:
            return [_of_list(*one) for one in constants]
        return [_constant(part) for part in parts]
    to = array.args.get("to")
    if not _has_only(array, exp.Cast, "this", "to") or not isinstance(to, exp.DataType):
        return None
    if getattr(to.this, "name", "") != "ARRAY" or len(to.expressions) != 1:
        return None
    name, given = _name_of_type(to.expressions[0]), array.this
    if isinstance(given, exp.Literal) and given.is_string:  # what needs no quotes in it
        found = re.fullmatch(r"\{([-0-9a-f]+(,[-0-9a-f]+)*)?\}", given.this)
        return (
            [_read(text, name) for text in (found[1] or "").split(",") if text] if found else None
        )
    values = _elements(given)
    return values and [_cast(value, name) for value in values]


def _of_list(literal: str, types: tuple[exp.DataType, ...]) -> Any:
    """Return the value of a constant in a long list."""
    names = [_name_of_type(to) for to in types]
    if literal.startswith("'"):
        value = _read(literal[1:-1].replace("''", "'"), names.pop(0)) if names else None
    else:
        value = _NULL if literal == "NULL" else _number(literal) if literal[0].isdigit() else None
    for name in names:
        value = _cast(value, name)
    return value
