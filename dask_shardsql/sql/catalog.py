"""What is known of a query's tables, and how the rows of it lie."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any

from sqlglot import exp

from dask_shardsql.sharding import ShardingFunction
from dask_shardsql.sql.canonical import Query, as_text, conjuncts, is_aggregate, written
from dask_shardsql.sql.route import possible_shards

__all__ = ["Catalog", "Column", "Rows", "Sharded", "has_aggregates", "makes_one_group"]

Column = tuple[str, str]
"""A column, by its table's alias and its name."""


@dataclass(frozen=True)
class Sharded:
    """A sharded table.

    Parameters
    ----------
    key : str
        Its shard key.
    group : hashable, optional
        Tables of one group have rows of equal shard keys on one shard; None if equal values of the
        key need not be the same value.
    is_not_null : bool, default False
        Whether the key is never NULL.
    function : ShardingFunction, optional
        Says on which shard a row is.
    key_type : str
        The key's type, by its name in the catalog; empty if equal values need not be the same.
    columns : frozenset of str
        Names of its columns.
    """

    key: str
    group: Hashable = None
    is_not_null: bool = False
    function: ShardingFunction | None = None
    key_type: str = ""
    columns: frozenset[str] = frozenset()

    def as_compared(self, key: Column) -> dict[Column, Sharded]:
        """Return the column that the key is, also cast to text where the server compares that."""
        is_cast = self.key_type == "pg_catalog.varchar"
        return {key: self, as_text(key): self} if is_cast else {key: self}


@dataclass(frozen=True)
class Catalog:
    """What the server knows of a query.

    Parameters
    ----------
    sharded : mapping of str to Sharded
        The sharded tables, by name as the server writes it.
    reference : frozenset of str
        All the others, by name in the same form.
    views : mapping of str to str
        The texts of those views that read sharded tables.
    aggregates : frozenset of str
        Names of the aggregates that the query calls.
    local : mapping of str to bool
        Queries in WITH, by name: whether they are the same on every shard.
    shards : tuple of str
        Names of all shards.
    has_instant : bool, default False
        Whether the query asks for the time, which must be one for all shards.
    conditions : dict
        Its keys are the conditions that have left some shards, as they were found.
    """

    sharded: Mapping[str, Sharded]
    reference: frozenset[str] = frozenset()
    views: Mapping[str, str] = field(default_factory=dict)
    aggregates: frozenset[str] = frozenset()
    local: Mapping[str, bool] = field(default_factory=dict)
    shards: tuple[str, ...] = ()
    has_instant: bool = False
    conditions: dict[str, None] = field(default_factory=dict)

    def visited(
        self, condition: Any, is_key: Callable[[Any], bool], table: Sharded
    ) -> frozenset[str]:
        """Return the shards that may have rows of a table for which a condition is true."""
        found = possible_shards(condition, is_key, table.function, self.shards, table.key_type)
        if len(found) < len(self.shards):
            every = list(conjuncts(condition))
            of_key = [one for one in every if any(map(is_key, one.walk()))]
            self.conditions.update(dict.fromkeys(map(written, of_key or every)))
        return found


@dataclass(frozen=True)
class Rows:
    """How rows lie.

    Parameters
    ----------
    is_spread : bool
        Whether a part of them is on each shard; else all are on every shard.
    keys : mapping
        Columns whose equal values are on one shard: as which table's shard key.
    never_null : frozenset
        Those of them that are never NULL.
    shards : frozenset of str, optional
        Names of the shards that may have any; all by default.
    """

    is_spread: bool
    keys: Mapping[Column, Sharded] = field(default_factory=dict)
    never_null: frozenset[Column] = frozenset()
    shards: frozenset[str] | None = None


def has_aggregates(node: Any, catalog: Catalog, *, is_over: bool = False) -> bool:
    """Whether an expression calls an aggregate, other than inside of a query in it.

    Over a window, where `is_over` says so, it is none itself: it gives a value for each row.
    """
    if isinstance(node, Query):
        return False
    if not is_over and is_aggregate(node, catalog.aggregates):
        return True
    is_over = isinstance(node, exp.Window) or (is_over and isinstance(node, exp.Filter))
    return any(
        has_aggregates(one, catalog, is_over=is_over and one is node.this)
        for one in node.iter_expressions()
    )


def makes_one_group(query: exp.Select, catalog: Catalog) -> bool:
    """Whether a query without GROUP BY has one row for all rows that it reads."""
    if query.args.get("having") is not None:
        return True
    more = [query.args.get("order"), query.args.get("distinct")]
    parts = [*query.expressions, *(query.args.get("windows") or []), *more]
    return any(part is not None and has_aggregates(part, catalog) for part in parts)
