"""Which rows of one table a query can need: conditions that its other rows cannot meet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sqlglot import exp

from dask_shardsql.sql.canonical import (
    alias_of,
    all_of,
    column_of,
    conjuncts,
    given,
    inner_queries,
    name_of,
    renames,
    table_name,
)
from dask_shardsql.sql.catalog import (
    Catalog,
)
from dask_shardsql.sql.joins import relations_of, what_is_inner

__all__ = ["Outer", "pushed_to"]


@dataclass(frozen=True)
class Outer:
    """What is known of the rows that a query inside of another is asked for.

    Parameters
    ----------
    tables : mapping of str to Table
        Tables which are the same on every shard, by alias, whose rows they have.
    conditions : sequence of Expr
        What these rows meet.
    is_test : bool, default False
        Whether it is asked only if it has a row, or one that is equal to something.
    """

    tables: Mapping[str, exp.Table] = field(default_factory=dict)
    conditions: Sequence[Any] = ()
    is_test: bool = False

    def inside(self, query: exp.Select, catalog: Catalog) -> Outer:
        """Return what is known inside of a query of which this is the outside."""
        inner, conditions = what_is_inner(query)
        tables = {
            alias_of(one): one
            for one in relations_of(query)
            if isinstance(one, exp.Table) and alias_of(one) in inner
            if table_name(one) in catalog.reference and table_name(one) not in catalog.local
            if not given(one) - {"this", "db", "alias", "joins"} and not renames(one)
        }
        return Outer({**self.tables, **tables}, [*self.conditions, *conditions])


def pushed_to(alias: str, query: exp.Select, inside: Outer) -> list[Any]:
    """Return conditions that every row of a table meets which the query needs.

    Parameters
    ----------
    alias : str
        By which the table is known.
    query : Select
        The query that reads it.
    inside : Outer
        What is known inside of that query.
    """
    inner, conditions = what_is_inner(query)
    if alias not in inner:
        return [one for one in _of_its_join(alias, query) if _aliases(one) == {alias}]
    if len(list(relations_of(query))) == 1:  # whose columns may have no alias
        conditions = [_with_alias(one, alias) for one in conditions]
    found = [one for one in conditions if _aliases(one) == {alias}]
    both = [*conditions, *inside.conditions]
    for other, table in inside.tables.items():
        own = [one for one in both if _aliases(one) == {other}]
        links = [one for one in both if isinstance(one, exp.EQ) and _aliases(one) == {alias, other}]
        links = [one for one in links if column_of(one.left) and column_of(one.right)]
        if own and links:
            source = exp.Table(this=table.this.copy(), db=table.args.get("db"))
            source.set("alias", exp.TableAlias(this=exp.to_identifier(other, quoted=True)))
            inner_query = exp.Select(expressions=[exp.Literal.number(1)]).from_(source)
            found.append(exp.Exists(this=inner_query.where(all_of([*links, *own]))))
    return found


def _of_its_join(alias: str, query: exp.Select) -> list[Any]:
    """Return what an outer join demands of the rows of a table that it may make up."""
    for join in query.find_all(exp.Join):
        is_own = join.parent_select is query and join.side.upper() == "LEFT"
        if is_own and isinstance(join.this, exp.Table) and alias_of(join.this) == alias:
            return list(conjuncts(join.args.get("on")))
    return []


def _aliases(condition: Any) -> set[str]:
    """Return the aliases in a condition; more than there are if it holds another query."""
    if inner_queries(condition):
        return {"", "*"}
    return {name_of(one.args.get("table")) for one in condition.find_all(exp.Column)}


def _with_alias(condition: Any, alias: str) -> Any:
    if inner_queries(condition):
        return condition
    found = condition.copy()
    for column in found.find_all(exp.Column):
        if not column.args.get("table"):
            column.set("table", exp.to_identifier(alias, quoted=True))
    return found
