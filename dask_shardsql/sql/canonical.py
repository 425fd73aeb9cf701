"""Reading the text that PostgreSQL itself has written of a query: names, conditions, scopes.

In that text (``pg_get_viewdef``) every expression is in parentheses, every ``*`` is written out,
and in a query of several tables every column has its table's alias, which no table inside or
outside of it shares.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

import sqlglot
from sqlglot import exp
from sqlglot.errors import SqlglotError

from dask_shardsql.sql.lists import put_back, without_lists

__all__ = [
    "SYNONYMS",
    "NotSplitError",
    "Query",
    "alias_of",
    "all_of",
    "as_text",
    "column_of",
    "conjuncts",
    "function_name",
    "given",
    "inner_queries",
    "is_aggregate",
    "is_column",
    "name_of",
    "operand_of",
    "output_names",
    "parse",
    "plain",
    "quoted",
    "renames",
    "same_words",
    "table_name",
    "written",
]

SYNONYMS = {"variance": "var_samp", "stddev": "stddev_samp"}
"""Functions of two names, of which a parser may keep the other one."""
_SYNONYM = re.compile(r"\b(variance|stddev)(?=\()")

_LONGEST = 1 << 18

Query = exp.Select | exp.SetOperation


class NotSplitError(Exception):
    """The query is not understood, or it is of a kind that is not split.

    Parameters
    ----------
    reason : str
        A word for why, which stays the same.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def parse(sql: str, *, is_canonical: bool = True) -> Any:
    """Return the syntax tree of one query, in which a long list of constants is one node.

    Parameters
    ----------
    sql : str
        The query.
    is_canonical : bool, default True
        Whether the server has written it, or it was made of what the server has written; in what
        users write no lists are looked for.

    Raises
    ------
    NotSplitError
        It is not understood, or so long that this would take longer than what it is for.
    """
    text, lists = without_lists(sql) if is_canonical else (sql, [])
    if len(text) > _LONGEST:
        raise NotSplitError("too-long")
    try:
        found = sqlglot.parse_one(text, dialect="postgres")
    except (SqlglotError, RecursionError):
        raise NotSplitError("not-understood") from None
    if not isinstance(found, Query):
        raise NotSplitError("not-understood")
    put_back(found, lists)
    return found


def written(node: exp.Expr) -> str:
    """Return a syntax tree as text."""
    try:
        return node.sql(dialect="postgres")
    except (SqlglotError, RecursionError):
        raise NotSplitError("not-understood") from None


def given(node: exp.Expr) -> set[str]:
    """Return what a node has: not what it could have."""
    return {name for name, value in node.args.items() if value not in (None, False, [], "")}


def name_of(identifier: Any) -> str:
    """Return a name as PostgreSQL takes it: in lower case unless it is quoted."""
    if not isinstance(identifier, exp.Identifier):
        return ""
    return identifier.name if identifier.quoted else identifier.name.lower()


def quoted(name: str) -> exp.Identifier:
    """Return a name to be written down."""
    return exp.to_identifier(name, quoted=True)


def table_name(table: exp.Table) -> str:
    """Return a table's name as the server has written it, with its schema if that was there."""
    parts = [table.args.get("db"), table.this]
    return ".".join(written(part) for part in parts if part is not None)


def alias_of(source: exp.Expr) -> str:
    """Return the name by which the columns of a table or query in FROM are known."""
    alias = source.args.get("alias")
    if isinstance(alias, exp.TableAlias):
        return name_of(alias.this)
    return name_of(source.this) if isinstance(source, exp.Table) else ""


def plain(node: Any) -> Any:
    """Return what is inside of parentheses."""
    while isinstance(node, exp.Paren):
        node = node.this
    return node


def conjuncts(condition: Any) -> Iterator[Any]:
    """Return the conditions that must all hold."""
    condition = plain(condition)
    if isinstance(condition, exp.And):
        yield from conjuncts(condition.left)
        yield from conjuncts(condition.right)
    elif condition is not None:
        yield condition


def all_of(conditions: Iterable[exp.Expr]) -> Any:
    """Return one condition of several; None of none."""
    found: Any = None
    for condition in conditions:
        one = exp.Paren(this=condition.copy())
        found = one if found is None else exp.And(this=found, expression=one)
    return found


def column_of(node: Any) -> tuple[str, str] | None:
    """Return the alias and the name of a column; the alias is empty if it is written without."""
    node = plain(node)
    if not isinstance(node, exp.Column) or not isinstance(node.this, exp.Identifier):
        return None
    if node.args.get("db"):
        return None
    return name_of(node.args.get("table")), name_of(node.this)


def operand_of(node: Any) -> tuple[str, str] | None:
    """Return the alias and the name of a column, which is another one where it is cast to text."""
    node = plain(node)
    if isinstance(node, exp.Cast) and written(node.to) == "TEXT":
        column = column_of(node.this)
        return None if column is None else as_text(column)
    return column_of(node)


def as_text(column: tuple[str, str]) -> tuple[str, str]:
    """Return what stands for a column that is cast to text."""
    return column[0], f"{column[1]}\0"  # which no name has


def is_column(node: Any, column: tuple[str, str]) -> bool:
    """Whether a node is that column, written with its alias."""
    return column_of(node) == column


def renames(source: exp.Expr) -> bool:
    """Whether the columns of a table or query in FROM get other names."""
    alias = source.args.get("alias")
    return isinstance(alias, exp.TableAlias) and bool(alias.columns)


def inner_queries(node: Any) -> list[Any]:
    """Return the queries in an expression, not those inside of them."""
    found: list[Any] = []
    left = [node]
    while left:
        one = left.pop()
        if isinstance(one, Query):
            found.append(one)
        elif isinstance(one, exp.Expr):
            left += one.iter_expressions()
    return found


def function_name(node: exp.Expr) -> str:
    """Return the name by which a function is called, or another one that it has."""
    if isinstance(node, exp.Anonymous):
        found = str(node.this).lower() if isinstance(node.this, str) else name_of(node.this)
    else:
        found = written(node).partition("(")[0].strip().lower()
    return SYNONYMS.get(found, found)


def same_words(text: str) -> str:
    """Return a text with one name for functions that have two."""
    return _SYNONYM.sub(lambda match: SYNONYMS[match.group()], text)


def is_aggregate(node: exp.Expr, aggregates: Iterable[str]) -> bool:
    """Whether it is a call of one of the aggregates, with its FILTER or WITHIN GROUP."""
    while isinstance(node, exp.Filter | exp.WithinGroup):
        node = node.this
    # to the parser a cast is a function, and so is every value of a long list
    is_call = isinstance(node, exp.Func) and not isinstance(node, exp.Cast)
    return is_call and function_name(node) in aggregates


def output_names(query: Any) -> list[str]:
    """Return the names of a query's columns; those that nobody can ask for have any."""
    while isinstance(query, exp.SetOperation | exp.Subquery):
        query = query.this
    names = []
    for item in query.expressions:
        if isinstance(item, exp.Alias):
            names.append(name_of(item.args["alias"]))
        else:
            column = column_of(item)
            names.append("?column?" if column is None else column[1])
    return names
