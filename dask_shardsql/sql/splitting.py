"""Splitting a query in parts: what is spread is stored, and the rest is run over it as it is."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

from sqlglot import exp

from dask_shardsql.sql.building import (
    BEHIND,
    copied,
    from_stored,
    name_all,
    parts,
    ref,
    refuse_alias,
    refuse_aliases_in_order,
    without_alias,
)
from dask_shardsql.sql.canonical import (
    NotSplitError,
    alias_of,
    all_of,
    column_of,
    given,
    inner_queries,
    is_column,
    name_of,
    output_names,
    plain,
    quoted,
    renames,
    table_name,
    written,
)
from dask_shardsql.sql.catalog import Catalog, Rows, makes_one_group
from dask_shardsql.sql.colocation import (
    groups_are_whole,
    rows_of,
    rows_of_source,
)
from dask_shardsql.sql.grouped import (
    Describe,
    Grouped,
    RowsNeededError,
)
from dask_shardsql.sql.joins import joins_of, relations_of
from dask_shardsql.sql.pushing import (
    Outer,
    pushed_to,
)

__all__ = ["Partial", "Splitter", "table_of"]

_TABLE = "dask_shardsql_"
# as the server writes types of which equal values are the same
_IDENTICAL = {"smallint", "integer", "bigint", "boolean", "date", "uuid"}
_MADE_OF_ROWS = {"expressions", "from_", "joins", "where", "kind"}
_OF_A_SELECT = {
    *("expressions", "from_", "joins", "where", "group", "having", "order", "limit", "offset"),
    *("distinct", "windows", "with_"),
}


@dataclass(frozen=True)
class Partial:
    """What each shard is asked for.

    Parameters
    ----------
    select : str
        The query.
    kind : {"aggregates", "rows", "columns", "table"}
        Partial aggregates of groups; rows of the answer; rows that the final query groups or
        orders; rows of one table.
    tables : tuple of str
        The sharded tables that are read.
    shards : frozenset of str, optional
        Names of the shards that may have any of it; all by default.
    """

    select: str
    kind: str
    tables: tuple[str, ...]
    shards: frozenset[str] | None = None


def table_of(number: int) -> str:
    """Return the name of the temporary table for the answers to a partial query."""
    return f"{_TABLE}{number}"


class Splitter:
    """Splits one query; what it writes for the shards is in `partials`."""

    def __init__(self, catalog: Catalog, describe: Describe) -> None:
        self._catalog, self._describe = catalog, describe
        self._ctes: list[exp.CTE] = []  # those that are the same on every shard
        self.partials: list[Partial] = []

    def query(self, query: Any, outer: Outer = Outer()) -> Any:  # noqa: B008 - it is empty
        """Return what is run in the place of a query."""
        found: Any
        if isinstance(query, exp.Subquery):
            found = query.copy()
            found.set("this", self.query(query.this, outer))
            return found
        if query.args.get("with_") is not None:
            return self._with(query, replace(outer, is_test=False))
        if isinstance(query, exp.SetOperation):
            outer = replace(outer, is_test=False)
            found = query.copy()
            found.set("this", self.query(query.this, outer))
            found.set("expression", self.query(query.expression, outer))
            return found
        if not isinstance(query, exp.Select) or given(query) - _OF_A_SELECT:
            raise NotSplitError("not-understood")
        return self._select(query, outer)

    def _with(self, query: Any, outer: Outer) -> Any:
        """Split the queries in WITH each by itself."""
        before, ctes_before = self._catalog, list(self._ctes)
        clause = query.args["with_"].copy()
        if clause.args.get("recursive"):
            raise NotSplitError("recursive")
        for cte in clause.expressions:
            rows = rows_of(cte.this, self._catalog)
            is_same = rows is not None and not rows.is_spread
            if is_same:
                self._ctes.append(cte.copy())
            else:
                cte.set("this", self.query(cte.this, outer))
            local = {**self._catalog.local, written(cte.args["alias"].this): is_same}
            self._catalog = replace(self._catalog, local=local)
        rest = query.copy()
        rest.set("with_", None)
        found = self.query(rest, outer)
        found.set("with_", clause)
        self._catalog, self._ctes = before, ctes_before
        return found

    def _select(self, query: exp.Select, outer: Outer) -> Any:
        rows = rows_of_source(query, self._catalog)
        if rows is not None and not rows.is_spread:
            return query.copy()
        if rows is None or _is_correlated(query):
            return self._pieces(query, outer)
        is_grouped = query.args.get("group") is not None or makes_one_group(query, self._catalog)
        has_windows = any(one.find(exp.Window) is not None for one in parts(query))
        if not has_windows:
            if not is_grouped or (query.args.get("group") and groups_are_whole(query, rows)):
                return self._rows(query, rows, is_test=outer.is_test and not is_grouped)
            try:
                store = functools.partial(self.add, kind="aggregates", shards=rows.shards)
                return Grouped(query, self._catalog, self._describe, store).final()
            except RowsNeededError:
                pass
        return self._columns(query, rows)

    def add(self, select: exp.Select, kind: str, shards: frozenset[str] | None = None) -> exp.Table:
        """Keep a partial query; return the table with its answers."""
        names = {table_name(table) for table in select.find_all(exp.Table)}
        needed = [cte for cte in self._ctes if written(cte.args["alias"].this) in names]
        if needed:
            select = select.copy()
            select.set("with_", exp.With(expressions=[cte.copy() for cte in self._ctes]))
        read = tuple(sorted(name for name in names if name in self._catalog.sharded))
        partial = Partial(written(select), kind, read, shards)
        if partial not in self.partials:
            self.partials.append(partial)
        name = table_of(self.partials.index(partial))
        return exp.Table(this=quoted(name), db=exp.to_identifier("pg_temp"))

    def _rows(self, query: exp.Select, rows: Rows, *, is_test: bool) -> exp.Select:
        """Split a query whose rows are found on the shards, to be ordered, cut or made distinct."""
        part, final = query.copy(), exp.Select()
        expressions = [without_alias(item) for item in query.expressions]
        names = output_names(query)
        results = [exp.alias_(ref(f"c{n}"), quoted(name)) for n, name in enumerate(names)]
        final.set("expressions", results)
        hidden: list[Any] = []

        def reference(expression: Any) -> Any:
            refuse_alias(expression, names, expressions)
            both = [*map(plain, expressions), *hidden]
            if plain(expression) not in both:
                hidden.append(plain(expression).copy())
                both.append(hidden[-1])
            return ref(f"c{both.index(plain(expression))}")

        order = query.args.get("order")
        if order is not None:
            ordered = [_ordered(one, reference(one.this)) for one in order.expressions]
            final.set("order", exp.Order(expressions=ordered))
        distinct = query.args.get("distinct")
        if distinct is not None:
            on = distinct.args.get("on")
            chosen = [reference(one) for one in on.expressions] if on is not None else None
            by = exp.Tuple(expressions=chosen) if chosen is not None else None
            final.set("distinct", exp.Distinct(on=by) if by is not None else exp.Distinct())
        for name in ("limit", "offset"):
            final.set(name, copied(query.args.get(name)))
            part.set(name, None)
        most = _most(query)
        if most is not None and (distinct is None or not distinct.args.get("on")):
            part.set("limit", exp.Limit(expression=exp.Literal.number(most)))
        elif distinct is None or not distinct.args.get("on"):
            part.set("order", None)
        both = [*expressions, *hidden]
        part.set("expressions", [exp.alias_(e.copy(), f"c{n}") for n, e in enumerate(both)])
        if is_test and not given(query) - _MADE_OF_ROWS:
            part = self._once(part)
        final.set("from_", from_stored(self.add(part, "rows", rows.shards)))
        return final

    def _columns(self, query: exp.Select, rows: Rows) -> exp.Select:
        """Split a query whose rows are joined on the shards, and all else is done with all rows."""
        self._refuse_spread(query)
        final = query.copy()
        names = output_names(query)
        columns: list[exp.Column] = []
        aliases = {alias_of(one) for one in relations_of(query)}

        def reference(node: Any) -> Any:
            column = column_of(node) if isinstance(node, exp.Column) else None
            if column is None or (column[0] and column[0] not in aliases):
                return node
            above = node.find_ancestor(exp.Select)
            while above is not None:  # an inner query may have a table of that alias
                if column[0] in {alias_of(one) for one in relations_of(above)}:
                    return node
                above = above.find_ancestor(exp.Select)
            if node not in columns:
                columns.append(node.copy())
            return ref(f"c{columns.index(node)}")

        refuse_aliases_in_order(query)
        for name in BEHIND:
            value = final.args.get(name)
            if isinstance(value, list):
                final.set(name, [one.copy().transform(reference) for one in value])
            elif value is not None:
                final.set(name, value.copy().transform(reference))
        name_all(final, names)
        part = exp.Select(
            expressions=[exp.alias_(one, f"c{n}") for n, one in enumerate(columns)]
            or [exp.alias_(exp.Literal.number(1), "c0")]
        )
        for name in ("from_", "joins", "where"):
            part.set(name, copied(query.args.get(name)))
            final.set(name, None)
        final.set("from_", from_stored(self.add(part, "columns", rows.shards)))
        return final

    def _refuse_spread(self, query: exp.Select) -> None:
        """Refuse queries in the results that only a shard could answer."""
        for part in parts(query):
            for inner in inner_queries(part):
                rows = rows_of(inner, self._catalog)
                if rows is None or rows.is_spread:
                    raise NotSplitError("subquery")

    def _pieces(self, query: exp.Select, outer: Outer) -> Any:
        """Split a query in which rows of several shards meet: each table by itself."""
        found = query.copy()
        inside = outer.inside(query, self._catalog)
        is_test = outer.is_test and not given(query) - _MADE_OF_ROWS
        is_test = is_test and not makes_one_group(query, self._catalog)
        is_test = is_test and not any(one.find(exp.Window) for one in parts(query))
        relations = list(relations_of(found))
        for relation in relations:
            if isinstance(relation, exp.Values) and relation.find(exp.Query) is not None:
                raise NotSplitError("values")
            if isinstance(relation, exp.Lateral):
                relation.set("this", self.query(relation.this, inside))
            elif isinstance(relation, exp.Subquery):
                relation.set("this", self.query(relation.this, Outer()))
            elif isinstance(relation, exp.Table) and (
                self._catalog.sharded.get(table_name(relation)) is not None
                and table_name(relation) not in self._catalog.local
            ):
                is_only = len(relations) == 1
                self._piece(relation, query, inside, is_only=is_only, is_test=is_test)
        for part in _expressions_of(found):
            for one in inner_queries(part):
                rows = rows_of(one, self._catalog)
                if rows is None or rows.is_spread:
                    inside = replace(inside, is_test=_is_test(one))
                    one.replace(self.query(one, inside))
        return found

    def _once(self, part: exp.Select) -> exp.Select:
        """Return a query without repetitions, if nobody can tell which of equal rows is left."""
        kinds = self._describe(written(part))
        return part.distinct() if _IDENTICAL.issuperset(kinds) else part

    def _piece(
        self, table: exp.Table, query: Any, inside: Outer, *, is_only: bool, is_test: bool
    ) -> None:
        """Let a table be read from one with the rows and columns that are needed of it."""
        if given(table) - {"this", "db", "alias", "joins"} or renames(table):
            raise NotSplitError("not-understood")
        alias = alias_of(table)
        sharded = self._catalog.sharded[table_name(table)]
        joined = (one for join in query.find_all(exp.Join) for one in join.args.get("using") or [])
        needed = {*sharded.columns.intersection(map(name_of, joined))}
        for node in query.find_all(exp.Column):
            column = column_of(node)
            if column is None or (not column[0] and not is_only):
                raise NotSplitError("not-understood")
            if column[0] == alias or not column[0]:
                needed.add(column[1])
        needed = needed if needed and is_test else {sharded.key, *needed}
        columns = [exp.Column(this=quoted(n), table=quoted(alias)) for n in sorted(needed)]
        plain_table = exp.Table(this=table.this.copy(), db=copied(table.args.get("db")))
        plain_table.set("alias", exp.TableAlias(this=quoted(alias)))
        part = exp.Select(expressions=columns).from_(plain_table)
        condition = all_of(pushed_to(alias, query, inside))
        if condition is not None:
            part = part.where(condition)
        is_key = functools.partial(is_column, column=(alias, sharded.key))
        shards = self._catalog.visited(condition, is_key, sharded)
        stored = self.add(self._once(part) if is_test else part, "table", shards)
        table.set("this", stored.this)
        table.set("db", stored.args["db"])
        table.set("alias", exp.TableAlias(this=quoted(alias)))


def _ordered(one: exp.Ordered, by: Any) -> exp.Ordered:
    found = one.copy()
    found.set("this", by)
    return found


def _expressions_of(query: exp.Select) -> list[Any]:
    found = parts(query)
    for name in ("where", "limit", "offset"):
        if query.args.get(name) is not None:
            found.append(query.args[name])
    return found + [join.args["on"] for join in joins_of(query) if join.args.get("on")]


def _most(query: exp.Select) -> int | None:
    """Return how many rows of a shard can be in the answer, if that is known."""
    limit, offset = query.args.get("limit"), query.args.get("offset")
    if not isinstance(limit, exp.Limit) or given(limit) - {"expression"}:
        return None
    total = 0
    for one in (limit, offset):
        if one is None:
            continue
        value = plain(one.expression)
        if not isinstance(value, exp.Literal) or value.is_string or not value.name.isdigit():
            return None
        total += int(value.name)
    return total


def _is_test(query: Any) -> bool:
    """Whether a query in an expression is asked only if it has a row, or one equal to something."""
    inner = query.parent if isinstance(query.parent, exp.Subquery) else query
    above = inner.parent
    return isinstance(above, exp.Exists) or (
        isinstance(above, exp.In) and above.args.get("query") is inner
    )


def _is_correlated(query: Any) -> bool:
    """Whether a query has columns of the one that it stands in."""
    own = {alias_of(one) for select in query.find_all(exp.Select) for one in relations_of(select)}
    used = {name_of(one.args.get("table")) for one in query.find_all(exp.Column)}
    return bool(used - own - {""})
