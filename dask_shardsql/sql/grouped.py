"""Splitting a query with groups: partial aggregates on the shards, then those of all shards."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from sqlglot import exp

from dask_shardsql.sql.aggregates import (
    TYPED,
    split_aggregate,
)
from dask_shardsql.sql.building import (
    STORED,
    copied,
    from_stored,
    name_all,
    parse_expression,
    parts,
    ref,
    refuse_aliases_in_order,
)
from dask_shardsql.sql.canonical import (
    function_name,
    given,
    inner_queries,
    is_aggregate,
    output_names,
    plain,
    written,
)
from dask_shardsql.sql.catalog import (
    Catalog,
)

__all__ = ["Describe", "Grouped", "RowsNeededError"]

Describe = Callable[[str], Sequence[str]]


class RowsNeededError(Exception):
    """An aggregate needs its rows."""


class Grouped:
    """One query with groups.

    Parameters
    ----------
    query : Select
        The query, whose FROM and WHERE are spread.
    catalog : Catalog
        What the server knows of it.
    describe : callable
        Asks the server for the types of a query's columns.
    store : callable
        Keeps a partial query, and returns the table with its answers.
    """

    def __init__(
        self,
        query: exp.Select,
        catalog: Catalog,
        describe: Describe,
        store: Callable[[exp.Select], exp.Table],
    ) -> None:
        self._query, self._catalog = query, catalog
        self._describe, self._store = describe, store
        group = query.args.get("group")
        groups = list(group.expressions) if group is not None else []
        unusual = exp.Rollup | exp.Cube | exp.GroupingSets | exp.Tuple
        if group is not None and (given(group) - {"expressions"}):
            raise RowsNeededError
        if any(isinstance(plain(one), unusual) for one in groups):
            raise RowsNeededError
        for part in parts(query):
            if inner_queries(part) or _loses_a_collation(part, catalog):
                raise RowsNeededError
        self._groups = [plain(one).copy() for one in groups]
        self._has_groups = bool(groups)
        self._extra: set[int] = set()  # those that are only values of a DISTINCT aggregate
        self._partials: list[str] = []
        self._made: dict[str, Any] = {}

    def final(self) -> exp.Select:
        """Keep the partial query, and return the final one."""
        refuse_aliases_in_order(self._query)
        types = self._types()
        final = self._query.copy()
        names = output_names(self._query)
        for name in ("expressions", "having", "order", "distinct"):
            value = final.args.get(name)
            if isinstance(value, list):
                final.set(name, [self._replaced(one, types) for one in value])
            elif value is not None:
                final.set(name, self._replaced(value, types))
        name_all(final, names)
        columns = [exp.alias_(one.copy(), f"g{n}") for n, one in enumerate(self._groups)]
        columns += [exp.alias_(parse_expression(t), f"a{n}") for n, t in enumerate(self._partials)]
        part = exp.Select(expressions=columns)
        for name in ("from_", "joins", "where"):
            part.set(name, copied(self._query.args.get(name)))
            final.set(name, None)
        if self._groups:
            numbers = [exp.Literal.number(n + 1) for n in range(len(self._groups))]
            part.set("group", exp.Group(expressions=numbers))
        if self._has_groups:
            by = [ref(f"g{n}") for n in range(len(self._groups)) if n not in self._extra]
            final.set("group", exp.Group(expressions=by))
        final.set("from_", from_stored(self._store(part)))
        return final

    def _calls(self) -> Iterator[Any]:
        def walk(node: Any) -> Iterator[Any]:
            if is_aggregate(node, self._catalog.aggregates):
                yield node
            elif isinstance(node, exp.Expr):
                for one in node.iter_expressions():
                    yield from walk(one)

        for part in parts(self._query):
            yield from walk(part)

    def _types(self) -> dict[str, str]:
        """Return the types of the arguments whose types matter, as the server tells them."""
        arguments: dict[str, Any] = {}
        for call in self._calls():
            name, given_to_it, _, is_distinct = _call(call)
            if not is_distinct and name in TYPED and len(given_to_it) == 1:
                arguments[written(given_to_it[0])] = given_to_it[0]
        if not arguments:
            return {}
        probe = exp.Select(
            expressions=[exp.alias_(a.copy(), f"a{n}") for n, a in enumerate(arguments.values())]
        )
        for name in ("from_", "joins", "where"):
            probe.set(name, copied(self._query.args.get(name)))
        return dict(zip(arguments, self._describe(written(probe)), strict=True))

    def _replaced(self, node: Any, types: dict[str, str]) -> Any:
        """Return an expression over groups and aggregates, over those of the shards."""
        if is_aggregate(node, self._catalog.aggregates):
            text = written(node)
            if text not in self._made:
                self._made[text] = self._combined(node, types)
            return self._made[text].copy()
        if not isinstance(node, exp.Ordered | exp.Order | exp.Having | exp.Alias | exp.Distinct):
            if plain(node) in self._groups:
                return ref(f"g{self._groups.index(plain(node))}")
            if isinstance(node, exp.Column):  # it depends on the groups
                if not self._has_groups:
                    raise RowsNeededError
                self._groups.append(node.copy())
                return ref(f"g{len(self._groups) - 1}")
        node = node.copy()
        for key, value in list(node.args.items()):
            if isinstance(value, exp.Expr):
                node.set(key, self._replaced(value, types))
            elif isinstance(value, list):
                node.set(
                    key,
                    [self._replaced(v, types) if isinstance(v, exp.Expr) else v for v in value],
                )
        return node

    def _combined(self, call: Any, types: dict[str, str]) -> Any:
        name, arguments, condition, is_distinct = _call(call)
        if is_distinct:
            return self._of_distinct(call)
        if not arguments:
            raise RowsNeededError
        if name == "string_agg" and arguments[-1].find(exp.Column) is not None:
            raise RowsNeededError  # each row has its own
        x, y = written(arguments[0]), written(arguments[-1])
        found = split_aggregate(name, types.get(x, ""), arguments=len(arguments))
        if found is None:
            raise RowsNeededError
        only = f"({written(condition)})" if condition is not None else ""
        f, and_f = (f" FILTER (WHERE {only})", f" AND {only}") if only else ("", "")
        columns = []
        for template in found.partials:
            text = template.format(x=x, y=y, f=f, and_f=and_f)
            if text not in self._partials:
                self._partials.append(text)
            columns.append(f"{STORED}.a{self._partials.index(text)}")
        return exp.Paren(this=parse_expression(found.final.format(*columns, y=y)))

    def _of_distinct(self, call: Any) -> Any:
        """Return an aggregate of distinct values over those of the shards: they are groups too."""
        call = call.copy()
        holder = exp.Paren(this=call)
        for node in list(_distinct_values(call)):
            value = plain(node)
            if value not in self._groups:
                self._groups.append(value.copy())
                self._extra.add(len(self._groups) - 1)
            node.replace(ref(f"g{self._groups.index(value)}"))
        return holder


def _loses_a_collation(part: Any, catalog: Catalog) -> bool:
    """Whether a collation that is chosen decides beyond what is stored, whose own it then is."""
    for node in part.find_all(exp.Collate):
        while isinstance(node, exp.Collate | exp.Paren | exp.Filter | exp.Ordered | exp.Alias) or (
            is_aggregate(node, catalog.aggregates)
        ):
            if node is part:
                return False
            node = node.parent
        if not isinstance(node, exp.Select | exp.Order | exp.Group | exp.Distinct | exp.Tuple):
            return True
    return False


def _distinct_values(call: Any) -> Iterator[Any]:
    """Return all that an aggregate of distinct values looks at."""
    if isinstance(call, exp.Filter):
        yield call.expression.this
        call = call.this
    if isinstance(call, exp.WithinGroup):
        raise RowsNeededError
    for value in [*call.args.values()]:
        for one in value if isinstance(value, list) else [value]:
            if isinstance(one, exp.Order):
                for ordered in one.expressions:
                    yield ordered.this
                one = one.this
            if isinstance(one, exp.Distinct):
                for item in one.expressions:
                    is_row = isinstance(item, exp.Anonymous) and function_name(item) == "row"
                    yield from item.expressions if is_row else [item]
            elif isinstance(one, exp.Expr) and one.find(exp.Column) is not None:
                yield one


def _call(node: Any) -> tuple[str, list[Any], Any, bool]:
    """Return the name of an aggregate, its arguments, its FILTER, and whether it is DISTINCT.

    There are no arguments where they have an order.
    """
    condition = None
    if isinstance(node, exp.Filter):
        condition, node = node.expression.this, node.this
    if isinstance(node, exp.WithinGroup):
        return "", [], condition, False
    name = function_name(node)
    found: list[Any] = []
    for value in node.args.values():
        both = value if isinstance(value, list) else [value]
        found += [one for one in both if isinstance(one, exp.Expr)]
    is_distinct = any(
        isinstance(one.this if isinstance(one, exp.Order) else one, exp.Distinct) for one in found
    )
    if any(isinstance(one, exp.Order | exp.Distinct | exp.Limit) for one in found):
        return name, [], condition, is_distinct
    return name, found, condition, is_distinct
