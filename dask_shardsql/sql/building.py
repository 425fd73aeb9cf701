"""Writing down parts of a query anew: references to what is stored, names, the clauses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlglot import exp

from dask_shardsql.sql.canonical import (
    NotSplitError,
    column_of,
    output_names,
    parse,
    plain,
    quoted,
)

__all__ = [
    "BEHIND",
    "STORED",
    "copied",
    "from_stored",
    "name_all",
    "parse_expression",
    "parts",
    "ref",
    "refuse_alias",
    "refuse_aliases_in_order",
    "without_alias",
]

BEHIND = ("expressions", "group", "having", "order", "distinct", "windows")
"""What a query does with the rows that its FROM and WHERE give."""
STORED = "dask_shardsql_rows"
"""The alias of what is stored, where a final query reads nothing else."""


def parse_expression(text: str) -> Any:
    """Return the syntax tree of an expression."""
    return parse(f"SELECT {text}").expressions[0]


def ref(name: str) -> exp.Column:
    """Return a column of what is stored."""
    return exp.Column(this=exp.to_identifier(name), table=exp.to_identifier(STORED))


def from_stored(table: exp.Table) -> exp.From:
    """Return the clause that reads what is stored."""
    table.set("alias", exp.TableAlias(this=exp.to_identifier(STORED)))
    return exp.From(this=table)


def copied(node: Any) -> Any:
    """Return a copy of a clause, if there is one."""
    if isinstance(node, list):
        return [one.copy() for one in node]
    return None if node is None else node.copy()


def without_alias(item: Any) -> Any:
    """Return what a result is made of."""
    return item.this if isinstance(item, exp.Alias) else item


def name_all(query: exp.Select, names: Sequence[str]) -> None:
    """Give the results of a query their names."""
    items = [
        exp.alias_(without_alias(item), quoted(name))
        for item, name in zip(query.expressions, names, strict=True)
    ]
    query.set("expressions", items)


def parts(query: exp.Select) -> list[Any]:
    """Return what is done with the rows that FROM and WHERE give."""
    found: list[Any] = []
    for name in BEHIND:
        value = query.args.get(name)
        found += value if isinstance(value, list) else [value] if value is not None else []
    return found


def refuse_alias(expression: Any, names: Sequence[str], expressions: Sequence[Any]) -> None:
    """Refuse a name in ORDER BY that may be that of a result, or that of a column."""
    column = column_of(expression)
    if column is None or column[0]:
        return
    for name, other in zip(names, expressions, strict=True):
        if name == column[1] and plain(other) != plain(expression):
            raise NotSplitError("not-understood")


def refuse_aliases_in_order(query: exp.Select) -> None:
    """Refuse names in ORDER BY that may be those of results, or of columns."""
    expressions = [without_alias(item) for item in query.expressions]
    if (order := query.args.get("order")) is not None:
        for one in order.expressions:
            refuse_alias(one.this, output_names(query), expressions)
