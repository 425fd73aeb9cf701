"""How the rows of a query lie: the same on every shard, or a part of them on each.

A query is spread where its answer over all rows is what the shards answer to it, one behind the
other: rows that are joined, grouped or looked up in another query are then on one shard.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from sqlglot import exp

from dask_shardsql.sql.aggregates import SAME, TYPED
from dask_shardsql.sql.canonical import (
    NotSplitError,
    Query,
    alias_of,
    all_of,
    column_of,
    conjuncts,
    given,
    inner_queries,
    is_aggregate,
    name_of,
    operand_of,
    output_names,
    renames,
    table_name,
)
from dask_shardsql.sql.catalog import (
    Catalog,
    Column,
    Rows,
    makes_one_group,
)
from dask_shardsql.sql.joins import equal_columns, joins_of, what_is_inner

__all__ = ["distinct_is_whole", "groups_are_whole", "rows_of", "rows_of_source"]

_SELECT = {"kind", "distinct", "expressions", "from_", "joins", "where", "group", "having"}
_CUT = {"limit", "offset"}
_JOIN_SIDES = {"": "inner", "LEFT": "left", "RIGHT": "right", "FULL": "full"}


_REFERENCE = Rows(is_spread=False)
# what these give does not depend on the order of the rows
_ORDERLESS = SAME - {"any_value"} | TYPED | {"count"}


def rows_of(query: Any, catalog: Catalog, outer: Rows | None = None) -> Rows | None:
    """Return how the rows of a query lie; None if they are neither of the two.

    Parameters
    ----------
    query : Expr
        A query.
    catalog : Catalog
        Which tables are sharded.
    outer : Rows, optional
        Of the query that this one stands in.

    Returns
    -------
    Rows or None
        Its keys have an empty alias, and the names of the query's columns.
    """
    while isinstance(query, exp.Subquery):
        if given(query) - {"this", "alias"}:
            return None
        query = query.this
    if isinstance(query, exp.SetOperation):
        return _rows_of_set(query, catalog)
    if not isinstance(query, exp.Select) or query.args.get("with_"):
        return None
    rows = rows_of_source(query, catalog, outer)
    if rows is None or not rows.is_spread:
        # what is cut, or chosen among equals, may be chosen otherwise on another shard
        return _REFERENCE if rows is not None and _is_definite(query, catalog) else None
    if given(query) - _SELECT or not _windows_are_whole(query, rows):
        return None
    grouped = query.args.get("group")
    if grouped is None and makes_one_group(query, catalog):
        return None
    if grouped is not None and not groups_are_whole(query, rows):
        return None
    if query.args.get("distinct") is not None and not distinct_is_whole(query, rows):
        return None
    names = output_names(query)
    found = {
        ("", name): column
        for item, name in zip(query.expressions, names, strict=True)
        if (column := _key(item, rows.keys)) is not None and names.count(name) == 1
    }
    keys = {name: rows.keys[column] for name, column in found.items()}
    never = frozenset(n for n, column in found.items() if column in rows.never_null)
    return Rows(True, keys, never, rows.shards)


def _is_definite(query: exp.Select, catalog: Catalog) -> bool:
    """Whether rows that are the same make it give the same, in whatever order they are."""
    distinct = query.args.get("distinct")
    if _CUT & given(query) or (distinct is not None and distinct.args.get("on")):
        return False
    if query.find(exp.Window) is not None:
        return False
    return not any(
        is_aggregate(n, catalog.aggregates - _ORDERLESS) for n in query.find_all(exp.Func)
    )


def _windows_are_whole(query: exp.Select, rows: Rows) -> bool:
    """Whether whatever a window sees of a row's partition is on that row's shard."""
    parts = [*query.expressions, query.args.get("distinct") or exp.Distinct()]
    windows = [one for part in parts for one in part.find_all(exp.Window)]
    return all(
        any(
            _key(one, rows.keys) in rows.never_null for one in window.args.get("partition_by") or ()
        )
        and not inner_queries(window)
        for window in windows
    ) and (not windows or query.args.get("group") is None)


def groups_are_whole(query: exp.Select, rows: Rows) -> bool:
    """Whether every group of a query has all its rows on one shard."""
    group = query.args["group"]
    if given(group) - {"expressions"}:
        return False
    return any(_key(one, rows.keys) in rows.never_null for one in group.expressions)


def distinct_is_whole(query: exp.Select, rows: Rows) -> bool:
    """Whether all rows of which DISTINCT keeps one are on one shard."""
    on = query.args["distinct"].args.get("on")
    by = query.expressions if on is None else on.expressions
    return any(_key(one, rows.keys) in rows.never_null for one in by)


def rows_of_source(query: exp.Select, catalog: Catalog, outer: Rows | None = None) -> Rows | None:
    """Return how the rows lie that FROM and WHERE give, before they are grouped or ordered."""
    source = query.args.get("from_")
    if source is None:  # one row, which is at hand wherever it is asked for
        expressions = list(_in_expressions(query))
        is_same = all(_is_at_hand(one, _REFERENCE, catalog) for one in expressions)
        return _REFERENCE if is_same else None
    if query.args.get("laterals"):
        return None
    _, conditions = what_is_inner(query)
    equal = equal_columns(conditions)
    rows = _rows_of_item(source.this, catalog, equal)
    for join in query.args.get("joins") or []:
        rows = _joined(rows, join, catalog, equal)
    if rows is None:
        return None
    if rows.is_spread:
        rows = _with_conditions(rows, conditions, equal, catalog)
    # a query inside of another is on the shard of the row that it is asked for
    if outer is not None and rows.is_spread and not _meets(rows, outer, equal):
        return None
    if not all(_is_at_hand(one, rows, catalog) for one in _in_expressions(query)):
        return None
    return rows


def _with_conditions(
    rows: Rows, conditions: list[Any], equal: Mapping[Column, set[Column]], catalog: Catalog
) -> Rows:
    """Return what is known of rows that meet conditions: what equals a key is one, and where."""
    keys = dict(rows.keys)
    for key, table in rows.keys.items():
        for column in equal.get(key, ()):
            keys.setdefault(column, replace(table, function=None))
    shards = rows.shards
    condition = all_of(conditions)
    for key, table in rows.keys.items():
        if table.function is None or condition is None:
            continue
        same = {
            other
            for other in equal.get(key, ())
            if other in rows.keys and rows.keys[other].group == table.group
        }
        is_key = functools.partial(_is_one_of, columns={key, *same})
        found = catalog.visited(condition, is_key, table)
        shards = found if shards is None else shards & found
    return Rows(True, keys, rows.never_null | {key for key in keys if key in equal}, shards)


def _is_one_of(node: Any, columns: set[Column]) -> bool:
    return column_of(node) in columns


def _results(query: exp.Select) -> list[Any]:
    having = query.args.get("having")
    return [*query.expressions, *([having.this] if having is not None else [])]


def _in_expressions(query: exp.Select) -> Iterable[Any]:
    """Return the expressions that may hold other queries."""
    yield from _results(query)
    for name in ("where", "group", "order", "distinct", "limit", "offset"):
        if (part := query.args.get(name)) is not None:
            yield part
    for join in joins_of(query):
        if join.args.get("on") is not None:
            yield join.args["on"]


def _is_at_hand(expression: Any, rows: Rows, catalog: Catalog) -> bool:
    """Whether all that the queries in an expression read is on the shard that evaluates it."""
    queries = inner_queries(expression)
    looked_up = (
        [
            one.args["query"].this
            for condition in conjuncts(expression.this)
            if isinstance(one := condition, exp.In)
            and isinstance(one.args.get("query"), exp.Subquery)
            if _is_key_in(one, rows, catalog)
        ]
        if isinstance(expression, exp.Where)
        else []
    )
    for query in queries:
        if any(query is one for one in looked_up):
            continue
        found = rows_of(query, catalog)
        if found is not None and not found.is_spread:
            continue
        if not rows.is_spread or not isinstance(query, exp.Select) or query.args.get("with_"):
            return False
        if rows_of_source(query, catalog, rows) is None:
            return False
    return True


def _is_key_in(condition: exp.In, rows: Rows, catalog: Catalog) -> bool:
    """Whether it is true where one shard says so: a shard key that is looked up among keys."""
    key = _key(condition.this, rows.keys)
    query = condition.args["query"].this
    found = rows_of(query, catalog)
    if key is None or found is None or not found.is_spread:
        return False
    names = output_names(query)
    other = found.keys.get(("", names[0]))
    return len(names) == 1 and other is not None and other.group == rows.keys[key].group


def _key(expression: Any, keys: Mapping[Column, Any]) -> Column | None:
    """Return the column that an expression is, if it is a key."""
    if isinstance(expression, exp.Alias):
        expression = expression.this
    column = operand_of(expression)
    if column is None:
        return None
    if column in keys:
        return column
    if not column[0]:  # the only table's, whose alias is left out
        named = [key for key in keys if key[1] == column[1]]
        return named[0] if len(named) == 1 and len({alias for alias, _ in keys}) == 1 else None
    return None


def _meets(rows: Rows, outer: Rows, equal: Mapping[Column, set[Column]]) -> bool:
    """Whether a key of the inner rows equals one of the outer rows."""
    return any(
        column in outer.keys and outer.keys[column].group == table.group
        for key, table in rows.keys.items()
        for column in equal.get(key, ())
    )


def _rows_of_item(item: Any, catalog: Catalog, equal: Mapping[Column, set[Column]]) -> Rows | None:
    """Return how the rows of one source in FROM lie, with what is joined to it in parentheses."""
    joins = item.args.get("joins") or []
    if isinstance(item, exp.Subquery) and not isinstance(item.this, Query):
        if given(item) - {"this", "joins"}:
            return None
        rows = _rows_of_item(item.this, catalog, equal)
    else:
        rows = _rows_of_relation(item, catalog)
    for join in joins:
        rows = _joined(rows, join, catalog, equal)
    return rows


def _rows_of_relation(item: Any, catalog: Catalog) -> Rows | None:
    alias = alias_of(item)
    if isinstance(item, exp.Table):
        if given(item) - {"this", "db", "alias", "joins"} or renames(item):
            return None
        if not isinstance(item.this, exp.Identifier):
            return None
        name = table_name(item)
        if name in catalog.local:
            return _REFERENCE if catalog.local[name] else None
        if (table := catalog.sharded.get(name)) is not None:
            known = {} if table.group is None else table.as_compared((alias, table.key))
            return Rows(True, known, frozenset(known if table.is_not_null else ()))
        if name not in catalog.reference:
            raise NotSplitError("not-understood")
        return _REFERENCE
    if isinstance(item, exp.Values):
        return _REFERENCE if item.find(exp.Query) is None else None
    if isinstance(item, exp.Subquery):
        if given(item) - {"this", "alias", "joins"}:
            return None
        rows = rows_of(item.this, catalog)
        if rows is None or not rows.is_spread:
            return rows
        old = output_names(item.this)
        new = [name_of(one) for one in item.args["alias"].columns] if renames(item) else []
        named = list(zip(old, new + old[len(new) :], strict=True))
        found = {
            o: rows.keys["", o].as_compared((alias, n)) for o, n in named if ("", o) in rows.keys
        }
        keys = {key: table for one in found.values() for key, table in one.items()}
        never = frozenset(key for o in found if ("", o) in rows.never_null for key in found[o])
        return Rows(True, keys, never, rows.shards)
    return None


def _joined(
    left: Rows | None, join: exp.Join, catalog: Catalog, equal: Mapping[Column, set[Column]]
) -> Rows | None:
    """Return how the rows of a join lie; `equal` is what the rows that are left have equal."""
    if given(join) - {"this", "on", "using", "side", "kind"} or join.kind.upper() not in (
        *("", "INNER", "OUTER"),
        "CROSS",
    ):
        return None
    kind = _JOIN_SIDES.get(join.side.upper())
    if isinstance(join.this, exp.Lateral) or kind is None:
        return None
    right = _rows_of_item(join.this, catalog, equal if kind == "inner" else {})
    if left is None or right is None:
        return None
    if not left.is_spread and not right.is_spread:
        return _REFERENCE
    if not (left.is_spread and right.is_spread):
        is_preserved = {"inner": True, "left": left.is_spread, "right": right.is_spread}
        if not is_preserved.get(kind, False):
            return None  # a reference table's rows without a partner would be there on each shard
        return left if left.is_spread else right
    by_it = equal_columns(conjuncts(join.args.get("on")))
    if not _are_colocated(left, right, by_it, join) and not (
        kind == "inner" and _are_colocated(left, right, equal, join)
    ):
        return None
    if kind == "inner":
        both = [one.shards for one in (left, right) if one.shards is not None]
        shards = frozenset.intersection(*both) if both else None
        keys = {**left.keys, **right.keys}
        return Rows(True, keys, left.never_null | right.never_null, shards)
    return {"left": left, "right": right}.get(kind, Rows(True))


def _are_colocated(
    left: Rows, right: Rows, equal: Mapping[Column, set[Column]], join: exp.Join
) -> bool:
    using = {name_of(one) for one in join.args.get("using") or []}
    for key, table in left.keys.items():
        for other, its_table in right.keys.items():
            if table.group == its_table.group and (
                other in equal.get(key, ()) or (key[1] == other[1] and key[1] in using)
            ):
                return True
    return False


def _rows_of_set(query: exp.SetOperation, catalog: Catalog) -> Rows | None:
    if query.args.get("with_") or _CUT & given(query):
        return None
    sides = [rows_of(side, catalog) for side in (query.this, query.expression)]
    if any(side is None for side in sides):
        return None
    if not any(side.is_spread for side in sides if side is not None):
        return _REFERENCE
    is_union_all = isinstance(query, exp.Union) and not query.args.get("distinct")
    if not is_union_all or not all(side.is_spread for side in sides if side is not None):
        return None
    if query.args.get("order"):
        return None
    visited = [side.shards for side in sides if side is not None]
    is_known = all(one is not None for one in visited)
    return Rows(True, shards=frozenset().union(*filter(None, visited)) if is_known else None)
