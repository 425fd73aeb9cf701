"""Why the union of the shards' answers to a text may not be what one database would answer.

No server is asked: the text is the user's, its tables and columns are taken by their names, and
what is not understood gives no reason. Most texts are read once, and many need no parser.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from dask_shardsql.sql.statement import words_of

__all__ = ["why_not_a_union"]

_AGGREGATES = frozenset(
    {"any_value", "array_agg", "avg", "bit_and", "bit_or", "bit_xor", "bool_and", "bool_or"}
    | {"range_agg", "range_intersect_agg", "xmlagg"}
    | {"corr", "count", "covar_pop", "covar_samp", "every", "json_agg", "json_object_agg"}
    | {"jsonb_agg", "jsonb_object_agg", "max", "median", "min", "mode", "percentile_cont"}
    | {"percentile_disc", "regr_avgx", "regr_avgy", "regr_count", "regr_intercept", "regr_r2"}
    | {"regr_slope", "regr_sxx", "regr_sxy", "regr_syy", "stddev", "stddev_pop", "stddev_samp"}
    | {"string_agg", "group_concat", "sum", "total", "var_pop", "var_samp", "variance"}
)
_TELLING = _AGGREGATES | {"group", "order", "limit", "offset", "fetch", "distinct", "over"}
_TELLING |= {"having", "union", "intersect", "except", "with", "join"}


@functools.lru_cache(maxsize=1000)
def why_not_a_union(sql: str, sharded: tuple[tuple[str, str], ...]) -> str | None:
    """Return what of a query holds within each shard only; None if nothing does, or none is known.

    Parameters
    ----------
    sql : str
        The query.
    sharded : tuple of (str, str)
        Name and shard key of each sharded table.
    """
    keys = {name.rpartition(".")[2].lower(): key for name, key in sharded}
    words = [word.lower() for word in words_of(sql)]
    read = [word for word in words if word in keys]
    if len(read) == 1 and words.count("select") == 1 and _TELLING.isdisjoint(words):
        return None
    from dask_shardsql.sql.canonical import NotSplitError, parse  # the parser takes a while

    try:
        return _why(parse(sql.replace("%%", "%"), is_canonical=False), keys)
    except (NotSplitError, KeyError, AttributeError, RecursionError):
        return None


def _why(tree: Any, keys: Mapping[str, str]) -> str | None:
    from sqlglot import exp

    from dask_shardsql.sql import colocation
    from dask_shardsql.sql.canonical import name_of, table_name
    from dask_shardsql.sql.catalog import Catalog, Sharded, makes_one_group
    from dask_shardsql.sql.split import without_single_use

    tree = without_single_use(tree)
    tables = {table_name(one): name_of(one.this) for one in tree.find_all(exp.Table)}
    sharded = {
        written: Sharded(keys[name], "", is_not_null=True)
        for written, name in tables.items()
        if name in keys
    }
    if not tables:  # often asked to see whether a shard answers at all
        return None
    if not sharded:
        return "it reads no sharded table, so that each shard gives the same rows"
    if tree.args.get("with_") is not None:
        return None
    catalog = Catalog(sharded, frozenset(tables) - set(sharded), {}, _AGGREGATES)
    for select in tree.find_all(exp.Select):
        _name_keys(select, catalog)
    found = colocation.rows_of(tree, catalog)
    if found is not None and found.is_spread:
        return None
    if isinstance(tree, exp.SetOperation):
        if isinstance(tree, exp.Union) and not tree.args.get("distinct"):
            both = [colocation.rows_of(side, catalog) for side in (tree.this, tree.expression)]
            if any(one is not None and not one.is_spread for one in both):
                return "each shard gives the same rows of a part that reads no sharded table"
            return None
        return "UNION, EXCEPT and INTERSECT compare the rows of each shard alone"
    rows = colocation.rows_of_source(tree, catalog)
    if rows is None or not rows.is_spread:
        return "it joins or looks up rows of which some may be on other shards"
    grouped = tree.args.get("group")
    has_calls = grouped is None and makes_one_group(tree, catalog)
    is_whole = grouped is not None and colocation.groups_are_whole(tree, rows)
    if (grouped is not None or has_calls) and not is_whole:
        return "it aggregates the rows of each shard alone"
    has_all = tree.is_star and bool(rows.never_null)
    is_whole = has_all or not tree.args.get("distinct") or colocation.distinct_is_whole(tree, rows)
    if not is_whole:
        return "DISTINCT holds within each shard"
    for part, what in _PARTS.items():
        if tree.args.get(part) is not None:
            return f"{what} holds within each shard"
    has_windows = tree.find(exp.Window) is not None
    return "its windows see the rows of each shard alone" if has_windows else None


_PARTS = {"limit": "LIMIT", "offset": "OFFSET", "order": "ORDER BY"}


def _name_keys(select: Any, catalog: Any) -> None:
    """Write columns named like a shard key with their table's alias, and ordinals as columns."""
    from sqlglot import exp

    from dask_shardsql.sql.canonical import alias_of, name_of, quoted, table_name
    from dask_shardsql.sql.joins import relations_of

    if (group := select.args.get("group")) is not None:
        for one in list(group.expressions):
            place = int(one.name) if isinstance(one, exp.Literal) and one.name.isdigit() else 0
            if 1 <= place <= len(select.expressions):
                one.replace(select.expressions[place - 1].unalias().copy())
    owners: dict[str, list[str]] = {}
    for one in relations_of(select):
        table = catalog.sharded.get(table_name(one)) if isinstance(one, exp.Table) else None
        if table is not None:
            owners.setdefault(table.key.lower(), []).append(alias_of(one))
    for column in select.find_all(exp.Column):  # in the queries inside of it too
        aliases = owners.get(name_of(column.this).lower(), [])
        if not column.args.get("table") and len(aliases) == 1:
            column.set("table", quoted(aliases[0]))
            column.set("this", quoted(name_of(column.this)))
