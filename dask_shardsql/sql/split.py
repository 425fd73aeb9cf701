"""Splitting a query: what every shard answers of it, and what is then made of the answers.

Whatever is spread over the shards in a query is put into a temporary table, as narrow as can be:
groups with partial aggregates, rows that are joined and filtered already, or, where rows of several
shards meet, the columns and rows of one table. The rest of the query is run over these, as it is.

The text that is split is the one that the server has written of the query (see `canonical`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sqlglot import exp

from dask_shardsql.sql.building import refuse_aliases_in_order
from dask_shardsql.sql.canonical import (
    NotSplitError,
    Query,
    alias_of,
    function_name,
    given,
    is_aggregate,
    name_of,
    parse,
    quoted,
    table_name,
    written,
)
from dask_shardsql.sql.catalog import (
    Catalog,
)
from dask_shardsql.sql.colocation import (
    rows_of,
)
from dask_shardsql.sql.grouped import (
    Describe,
)
from dask_shardsql.sql.joins import relations_of
from dask_shardsql.sql.splitting import (
    Partial,
    Splitter,
)

__all__ = ["SplitQuery", "split", "without_single_use"]


@dataclass(frozen=True)
class SplitQuery:
    """How a query is split.

    Parameters
    ----------
    strategy : {"direct", "union", "merge", "gather"}
        One shard has all; the shards' answers are the answer; or there are partial queries, and a
        final one: "gather" where all of them read rows of one table.
    reason : str
        A word for why, which stays the same.
    partials : tuple of Partial
        The partial queries; the answers to number n go into the temporary table `table_of(n)`.
    final : str
        The query over them.
    as_read : str
        The whole query as it was understood, for the server to compare.
    shards : frozenset of str, optional
        The shards that may have rows for it; all by default.
    """

    strategy: str
    reason: str
    partials: tuple[Partial, ...]
    final: str
    as_read: str
    shards: frozenset[str] | None = None


def split(text: str, catalog: Catalog, describe: Describe) -> SplitQuery:
    """Split a query.

    Parameters
    ----------
    text : str
        The query, as the server has written it.
    catalog : Catalog
        What the server knows of it.
    describe : callable
        Asks the server for the types of a query's columns, as ``format_type`` writes them.

    Raises
    ------
    NotSplitError
        It is not understood, or cannot be split.
    """
    tree = parse(text)
    as_read = written(tree)
    if "dask_shardsql_" in "".join((text, *catalog.views.values())).lower():
        raise NotSplitError("hidden-name")  # it could be one of the names that are made here
    for view in catalog.views.values():
        _refuse_outer_aggregates(parse(view), catalog)
    _refuse_aggregates(tree, catalog)
    tree = _with_views(tree, catalog)
    for select in tree.find_all(exp.Select):
        _qualify(select)
    tree = without_single_use(tree)
    rows = rows_of(tree, catalog)
    if rows is not None and rows.is_spread:
        if _is_on_one(rows.shards):
            return SplitQuery("direct", "shard-key", (), "", as_read, rows.shards)
        if not catalog.has_instant:  # each shard has its own clock
            is_grouped = any(tree.args.get(part) for part in ("group", "distinct"))
            has_groups = is_grouped or tree.find(exp.Window) is not None
            reason = "whole-groups" if has_groups else "row-wise"
            return SplitQuery("union", reason, (), "", as_read, rows.shards)
    splitter = Splitter(catalog, describe)
    last = splitter.query(tree)
    if any(table_name(table) in catalog.sharded for table in last.find_all(exp.Table)):
        ctes = {written(cte.args["alias"].this) for cte in last.find_all(exp.CTE)}
        if not ctes & set(catalog.sharded):
            raise NotSplitError("not-understood")
    final = written(last)
    partials = tuple(splitter.partials)
    if not partials:
        raise NotSplitError("not-understood")  # the caller knows that it reads sharded tables
    visited = [partial.shards for partial in partials]
    is_known = all(one is not None for one in visited)
    shards = frozenset().union(*filter(None, visited)) if is_known else None
    if _is_on_one(shards):
        return SplitQuery("direct", "shard-key", (), "", as_read, shards)
    kinds = {partial.kind for partial in partials}
    if kinds == {"table"}:
        return SplitQuery("gather", "all-rows", partials, final, as_read, shards)
    reason = kinds.pop() if len(kinds) == 1 else "parts"
    return SplitQuery("merge", reason, partials, final, as_read, shards)


def _is_on_one(shards: frozenset[str] | None) -> bool:
    return shards is not None and len(shards) <= 1


def _refuse_aggregates(tree: Any, catalog: Catalog) -> None:
    """Refuse a query of whose aggregates one is not found."""
    found = _refuse_outer_aggregates(tree, catalog)
    in_views = [parse(text) for text in catalog.views.values()]
    found |= {function_name(n) for view in in_views for n in view.find_all(exp.Func)}
    if catalog.aggregates - found:
        raise NotSplitError("not-understood")


def _refuse_outer_aggregates(tree: Any, catalog: Catalog) -> set[str]:
    """Refuse aggregates of a query in another one inside of it; return the names of all."""
    found = set()
    for node in tree.find_all(exp.Func):
        if not is_aggregate(node, catalog.aggregates):
            continue
        found.add(function_name(node))
        used = {name_of(one.args.get("table")) for one in node.find_all(exp.Column)} - {""}
        select = node.find_ancestor(exp.Select)
        own = {alias_of(one) for one in relations_of(select)} if select is not None else set()
        if used and not used & own:
            raise NotSplitError("not-understood")
    return found


def _qualify(select: exp.Select) -> None:
    """Give the columns of a query's only table its alias, which the server may leave out."""
    relations = list(relations_of(select))
    refuse_aliases_in_order(select)
    if len(relations) != 1 or not alias_of(relations[0]):
        return
    for column in select.find_all(exp.Column):
        if not column.args.get("table") and column.parent_select is select:
            column.set("table", quoted(alias_of(relations[0])))


def _with_views(tree: Any, catalog: Catalog) -> Any:
    """Write the texts of views into the query that reads them."""
    ctes = {written(one.args["alias"].this) for one in tree.find_all(exp.CTE)}
    if ctes and catalog.views:
        inside = [parse(text).find_all(exp.Table) for text in catalog.views.values()]
        names = {table_name(table) for tables in inside for table in tables}
        if ctes & (names | set(catalog.views)):
            raise NotSplitError("hidden-name")
    for _ in range(32):
        tables = [t for t in tree.find_all(exp.Table) if table_name(t) in catalog.views]
        if not tables:
            return tree
        for table in tables:
            if given(table) - {"this", "db", "alias", "joins"}:
                raise NotSplitError("not-understood")
            inner = exp.Subquery(this=parse(catalog.views[table_name(table)]))
            alias = table.args.get("alias")
            inner.set("alias", alias or exp.TableAlias(this=quoted(alias_of(table))))
            inner.set("joins", table.args.get("joins"))
            table.replace(inner)
    raise NotSplitError("not-understood")


def without_single_use(tree: Any) -> Any:
    """Write queries in WITH that are read once to where they are read."""
    clause = tree.args.get("with_")
    if clause is None or clause.args.get("recursive") or len(list(tree.find_all(exp.With))) > 1:
        return tree
    for cte in list(clause.expressions):
        name = name_of(cte.args["alias"].this)
        reads = [
            t for t in tree.find_all(exp.Table) if table_name(t) == written(cte.args["alias"].this)
        ]
        again = [one for one in tree.find_all(exp.CTE) if name_of(one.args["alias"].this) == name]
        if len(reads) != 1 or len(again) != 1 or cte.args.get("materialized"):
            continue
        if cte.args["alias"].columns or given(reads[0]) - {"this", "alias", "joins"}:
            continue
        if not isinstance(cte.this, Query) or cte.this.args.get("with_"):
            continue
        table = reads[0]
        inner = exp.Subquery(this=cte.this.copy())
        alias = table.args.get("alias")
        inner.set("alias", alias or exp.TableAlias(this=quoted(name)))
        inner.set("joins", table.args.get("joins"))
        table.replace(inner)
        cte.pop()
    if not clause.expressions:
        tree.set("with_", None)
    return tree
