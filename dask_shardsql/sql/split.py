"""Whether the union of the shards' answers is already the answer over all rows.

What is asked is small on purpose, and every part of the text must be known to be harmless: a query
that is not understood in full is not of that kind. The text itself is never changed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import sqlglot
from sqlglot import exp
from sqlglot.errors import SqlglotError

__all__ = ["is_union"]

# by alias, in their order: the table's name, and the join it comes by
_Tables = Mapping[str, tuple[str, exp.Join | None]]

# each row on its own: no aggregate, no window, no set of rows, no other query
_ROW_WISE = (
    *(exp.Alias, exp.Boolean, exp.Case, exp.Cast, exp.Coalesce, exp.Column, exp.DataType),
    *(exp.DataTypeParam, exp.Extract, exp.Identifier, exp.If, exp.Interval, exp.Literal),
    *(exp.Lower, exp.Null, exp.Paren, exp.Round, exp.Star, exp.Substring, exp.Trim),
    *(exp.Tuple, exp.Upper, exp.Var, exp.Abs, exp.Length, exp.Nullif, exp.Concat),
    *(exp.And, exp.Or, exp.Not, exp.EQ, exp.NEQ, exp.GT, exp.GTE, exp.LT, exp.LTE, exp.Is),
    *(exp.Between, exp.In, exp.Like, exp.ILike, exp.Neg, exp.NullSafeEQ, exp.NullSafeNEQ),
    *(exp.Add, exp.Sub, exp.Mul, exp.Div, exp.IntDiv, exp.Mod, exp.DPipe),
    *(exp.From, exp.Join, exp.Table, exp.TableAlias, exp.Where),
)
_PARTS = {"expressions", "from_", "joins", "where"}
_OF_A_JOIN = {"this", "on", "using", "side", "kind"}
_OF_A_TABLE = {"this", "db", "alias", "joins"}
_KINDS, _SIDES = {"", "INNER", "OUTER", "CROSS"}, {"", "LEFT"}


def is_union(sql: str, keys: Mapping[str, str]) -> bool:
    """Whether the shards' answers, one behind the other, are what one database would answer.

    That is so where each row of the answer comes from one row of a sharded table, or from rows of
    several that have one shard key, and perhaps rows of reference tables.

    Parameters
    ----------
    sql : str
        One query in PostgreSQL's dialect, without placeholders, which reads no sharded table
        through a view.
    keys : mapping of str to str
        The shard key of each sharded table that the query reads, by the name of the table without
        its schema.
    """
    try:
        query = sqlglot.parse_one(sql, dialect="postgres")
    except (SqlglotError, RecursionError):
        return False
    if not isinstance(query, exp.Select) or _given(query) - _PARTS:
        return False
    if any(not _is_harmless(node) for node in query.walk() if node is not query):
        return False
    tables = _tables(query)
    if tables is None:
        return False
    sharded = [name for name, _ in tables.values() if name in keys]
    return sorted(sharded) == sorted(keys) and _are_colocated(query, tables, keys)


def _given(node: exp.Expr) -> set[str]:
    """Return what a node has: not what it could have."""
    return {name for name, value in node.args.items() if value not in (None, False, [], "")}


def _is_harmless(node: exp.Expr) -> bool:
    if not isinstance(node, _ROW_WISE) or isinstance(node, exp.AggFunc | exp.Query):
        return False
    if isinstance(node, exp.In):
        return not _given(node) - {"this", "expressions"}
    if isinstance(node, exp.Table):
        return isinstance(node.this, exp.Identifier) and not _given(node) - _OF_A_TABLE
    if isinstance(node, exp.TableAlias):
        return not node.columns
    if isinstance(node, exp.Join):
        return (
            not _given(node) - _OF_A_JOIN
            and node.kind.upper() in _KINDS
            and node.side.upper() in _SIDES
            and isinstance(node.this, exp.Table)
        )
    return True


def _tables(query: exp.Select) -> _Tables | None:
    """Return the tables.

    None where they are nested, or one alias is used twice.
    """
    source = query.args.get("from_")
    if source is None or not isinstance(source.this, exp.Table):
        return None
    joins: list[exp.Join] = query.args.get("joins") or []
    found: dict[str, tuple[str, exp.Join | None]] = {}
    both: list[tuple[Any, exp.Join | None]] = [(source.this, None)]
    both += [(join.this, join) for join in joins]
    for table, join in both:
        alias = _name(table.args["alias"].this if table.args.get("alias") else table.this)
        if alias in found or table.args.get("joins"):
            return None
        found[alias] = (_name(table.this), join)
    return found


def _are_colocated(query: exp.Select, tables: _Tables, keys: Mapping[str, str]) -> bool:
    """Whether the first table is sharded, and each further one joined to it by the shard keys."""
    joined: set[str] = set()
    for alias, (name, join) in tables.items():
        if name not in keys:
            if join is None:
                return False  # a reference table on the preserved side would count on each shard
            continue
        if join is not None and not _by_key(query, join, alias, tables, keys, joined):
            return False
        joined.add(alias)
    return bool(joined)


def _by_key(
    query: exp.Select,
    join: exp.Join,
    alias: str,
    tables: _Tables,
    keys: Mapping[str, str],
    joined: set[str],
) -> bool:
    """Whether a sharded table is joined by its shard key to that of one before it."""
    key = keys[tables[alias][0]]
    using = [_name(column) for column in join.args.get("using") or []]
    if using:  # of the tables before it, only one may have that column
        return key in using and len(tables) == 2 and keys[tables[next(iter(joined))][0]] == key
    conditions = [*_conjuncts(join.args.get("on"))]
    if not join.side:
        conditions += _conjuncts(query.args["where"].this if query.args.get("where") else None)
    before = {(other, keys[tables[other][0]]) for other in joined}
    for condition in conditions:
        if isinstance(condition, exp.EQ):
            sides = {_column(condition.left), _column(condition.right)}
            if (alias, key) in sides and sides & before:
                return True
    return False


def _conjuncts(condition: exp.Expr | None) -> Iterator[exp.Expr]:
    if isinstance(condition, exp.Paren):
        yield from _conjuncts(condition.this)
    elif isinstance(condition, exp.And):
        yield from _conjuncts(condition.left)
        yield from _conjuncts(condition.right)
    elif condition is not None:
        yield condition


def _column(node: exp.Expr) -> tuple[str, str] | None:
    """Return the alias and the name of a column that is written with both."""
    if not isinstance(node, exp.Column) or not isinstance(node.args.get("table"), exp.Identifier):
        return None
    if node.args.get("db") or not isinstance(node.this, exp.Identifier):
        return None
    return _name(node.args["table"]), _name(node.this)


def _name(identifier: Any) -> str:
    """Return a name as PostgreSQL takes it: in lower case unless it is quoted."""
    if not isinstance(identifier, exp.Identifier):
        return ""
    return identifier.name if identifier.quoted else identifier.name.lower()
