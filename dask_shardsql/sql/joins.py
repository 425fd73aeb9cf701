"""What is joined in a query, and what every row of it must meet."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from sqlglot import exp

from dask_shardsql.sql.canonical import Query, alias_of, conjuncts, operand_of
from dask_shardsql.sql.catalog import Column

__all__ = ["equal_columns", "joins_of", "relations_of", "what_is_inner"]


def relations_of(query: exp.Select) -> Iterator[Any]:
    """Return the tables, queries and other sources in FROM, through its joins."""

    def walk(node: Any) -> Iterator[Any]:
        while isinstance(node, exp.Subquery) and not isinstance(node.this, Query):
            for join in node.args.get("joins") or []:
                yield from walk(join.this)
            node = node.this
        yield node
        for join in node.args.get("joins") or []:
            yield from walk(join.this)

    if (source := query.args.get("from_")) is not None:
        yield from walk(source.this)
    for join in query.args.get("joins") or []:
        yield from walk(join.this)


def joins_of(query: exp.Select) -> Iterator[exp.Join]:
    """Return all joins in FROM, also those in parentheses."""
    left: list[Any] = [*(query.args.get("joins") or [])]
    if (source := query.args.get("from_")) is not None:
        left.append(source.this)
    while left:
        node = left.pop()
        if isinstance(node, exp.Join):
            yield node
            left.append(node.this)
        else:
            left += node.args.get("joins") or []
            if isinstance(node, exp.Subquery) and not isinstance(node.this, Query):
                left.append(node.this)


def what_is_inner(query: exp.Select) -> tuple[set[str], list[Any]]:
    """Return the aliases whose rows no outer join makes up, and what every row must meet."""
    inner: set[str] = set()
    where = query.args.get("where")
    conditions: list[Any] = list(conjuncts(where.this)) if where is not None else []

    def item(node: Any) -> set[str]:
        is_nested = isinstance(node, exp.Subquery) and not isinstance(node.this, Query)
        return joined(item(node.this) if is_nested else {alias_of(node)}, node)

    def joined(found: set[str], node: Any) -> set[str]:
        for join in node.args.get("joins") or []:
            side = join.side.upper()
            if side == "RIGHT":
                found = item(join.this)
            elif side == "FULL":
                found = set()
            elif not side:
                found = found | item(join.this)
        return found

    if query.args.get("from_") is not None:
        inner = joined(item(query.args["from_"].this), query)
    conditions += _conditions_of_inner_joins(query, inner)
    return inner, conditions


def _conditions_of_inner_joins(query: exp.Select, inner: set[str]) -> list[Any]:
    """Return what inner joins of rows demand that no outer join makes up."""
    found = []
    for join in query.find_all(exp.Join):
        if join.side or join.args.get("on") is None or join.parent_select is not query:
            continue
        if alias_of(join.this) in inner:
            found += list(conjuncts(join.args["on"]))
    return found


def equal_columns(conditions: Iterable[Any]) -> dict[Column, set[Column]]:
    """Return for each column the others that it is equal to, directly or through others."""
    classes: dict[Column, set[Column]] = {}
    for condition in conditions:
        if not isinstance(condition, exp.EQ):
            continue
        left, right = operand_of(condition.left), operand_of(condition.right)
        if left is None or right is None:
            continue
        together = classes.get(left, {left}) | classes.get(right, {right})
        for column in together:
            classes[column] = together
    return classes
