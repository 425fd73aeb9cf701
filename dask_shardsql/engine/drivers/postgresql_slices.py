"""Cutting a query on PostgreSQL: the SQL of snapshots, bounds and slices.

A slice is a predicate that is compared by the server alone, in one snapshot. The session that
exports the snapshot also keeps a lock on every table that the query reads, the weakest there is:
``TRUNCATE``, ``VACUUM FULL`` and ``ALTER TABLE`` do not obey snapshots, and would otherwise empty
or rearrange a table between two slices.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from dask_shardsql.engine.drivers.base import Query
from dask_shardsql.engine.drivers.gathering import Estimate
from dask_shardsql.engine.drivers.rows import double_quoted
from dask_shardsql.engine.drivers.slicing import Part, Slicing
from dask_shardsql.errors import ColumnError, ConfigurationError, QueryError
from dask_shardsql.sql.statement import words_of

__all__ = ["BEGIN_HOLDING", "SLICE_SETTINGS", "cut", "hold", "measure", "planned"]

Run = Callable[[str], Sequence[Sequence[Any]]]

BEGIN_HOLDING = "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY"
#: For whoever reads a slice. A session that waits to change a table's shape waits for the holder
#: of the snapshot, and a slice would wait behind it: nobody could go on. And scans begin where
#: the table does, so that a query gives each slice its rows in the same order.
SLICE_SETTINGS = ("SET LOCAL lock_timeout = '10s'", "SET LOCAL synchronize_seqscans = off")

_STAY = (
    "SELECT pg_catalog.set_config(name, '0', true) FROM pg_catalog.pg_settings WHERE name IN "
    "('idle_in_transaction_session_timeout', 'transaction_timeout')"
)
_LEAVES = """
WITH RECURSIVE part(oid) AS (
    SELECT {table}::pg_catalog.regclass::pg_catalog.oid
    UNION
    SELECT i.inhrelid FROM pg_catalog.pg_inherits i JOIN part ON i.inhparent = part.oid
)
SELECT c.oid::pg_catalog.regclass::text, c.relkind::text,
    coalesce(pg_catalog.pg_relation_size(c.oid), 0)
        / pg_catalog.current_setting('block_size')::int8,
    coalesce(pg_catalog.pg_table_size(c.oid), 0)
FROM part JOIN pg_catalog.pg_class c ON c.oid = part.oid"""
_RANGES = """
SELECT found.rows, found.filled, bound.literal
FROM (
    SELECT pg_catalog.count(*) AS rows, pg_catalog.count(c) AS filled,
        pg_catalog.percentile_disc(ARRAY[{fractions}]::float8[]) WITHIN GROUP (ORDER BY c) AS bounds
    FROM ({column}) AS q (c)
) AS found LEFT JOIN LATERAL (
    -- ::bpchar and ::bit would cut a value to one character
    SELECT pg_catalog.quote_literal(found.bounds[n]) || CASE
        WHEN pg_catalog.pg_typeof(found.bounds[n]) NOT IN ('bpchar'::pg_catalog.regtype, 'bit')
        THEN '::' || pg_catalog.format_type(pg_catalog.pg_typeof(found.bounds[n]), NULL)
        ELSE '' END AS literal, n
    FROM pg_catalog.generate_subscripts(found.bounds, 1) AS s (n)
) AS bound ON true
ORDER BY bound.n"""
_KINDS = {"v": "a view", "f": "a foreign table"}
_WITH_CTID = "rpm"  # tables, partitioned tables, materialized views
_INTEGERS = (20, 21, 23)
_NO_ORDER, _NO_COLUMN = "42883", "42703"


def measure(run: Run, text: str, slicing: Slicing) -> int:
    """Return about how many bytes a query reads, or raise where it cannot be cut as asked."""
    _refuse_choices(text, slicing)
    if slicing.method == "range":
        _ordered(run, "EXPLAIN " + _ranges(text, slicing, (0.5,)), slicing)
    elif slicing.column is not None:
        _ordered(run, f"EXPLAIN {_column(text, slicing)}", slicing)
    if slicing.table is not None:
        tables = _leaves(run, slicing)
        if slicing.method == "ctid":
            for name, kind, _, _ in tables:
                _refuse_without_ctid(name, kind)
        if all(kind in _WITH_CTID for _, kind, _, _ in tables):
            return sum(nbytes for _, _, _, nbytes in tables)
    return planned(run, text).nbytes


def planned(run: Run, text: str) -> Estimate:
    """Return about how much a query gives, as the planner sees it."""
    ((plan,),) = run(f"EXPLAIN (FORMAT JSON) {text}")
    top = (json.loads(plan) if isinstance(plan, str) else plan)[0]["Plan"]
    return Estimate(int(top["Plan Rows"]), int(top["Plan Rows"]) * int(top["Plan Width"]))


def hold(
    run: Run, describe: Callable[[str], int], text: str, slicing: Slicing, slices: int
) -> tuple[str, tuple[str, ...]]:
    """Export the snapshot of a transaction that has just begun, and find the slices' bounds.

    `describe` runs a query for nothing but its columns, and returns the type of the first.
    """
    run(_STAY)
    kind = describe(text)  # and locks what it reads, with every partition
    bounds: tuple[str, ...] = ()
    if slicing.method == "ctid":
        pages = [pages for _, _, pages, _ in _leaves(run, slicing)]
        bounds = tuple(f"'({page},0)'" for page in page_bounds(pages, slices))
    elif slicing.method == "range":
        bounds = _range_bounds(run, text, slicing, slices)
    else:
        kind = describe(_column(text, slicing))
        bounds = ("hashint8" if kind in _INTEGERS else "hashtext",)
    ((snapshot,),) = run("SELECT pg_catalog.pg_export_snapshot()")
    return snapshot, bounds


def cut(query: Query, part: Part, snapshot: str, bounds: tuple[str, ...]) -> Query:
    """Return the query of one slice."""
    where = f"WHERE {predicate(part, bounds)}"
    if query.params is not None:
        where = where.replace("%", "%%")
    if part.slicing.table is not None:
        sql = f"{query.sql} {where}"
    else:
        sql = f"SELECT * FROM (\n{query.sql}\n) AS dask_shardsql {where}"
    return replace(query, sql=sql, snapshot=snapshot)


def predicate(part: Part, bounds: tuple[str, ...]) -> str:
    """Return what is true for exactly the rows of one slice; the first has no lower bound, the
    last no upper one.

    NULLs are in the last slice: alone, where the bounds are one fewer than for as many ranges.
    """
    slicing, number, slices = part.slicing, part.number, part.slices
    last = number == slices - 1
    if slicing.method == "ctid":
        ends = [f"ctid >= {bounds[number - 1]}::tid"] if number else []
        ends += [] if last else [f"ctid < {bounds[number]}::tid"]
        return " AND ".join(ends)
    column = double_quoted(slicing.column or "")
    if slicing.method == "hash":
        value = f"{column}::int8" if bounds[0] == "hashint8" else f'{column}::text COLLATE "C"'
        hashed = f"coalesce(pg_catalog.{bounds[0]}({value}), 0)"
        return f"({hashed} & 2147483647) % {slices} = {number}"
    # IS NULL would also hold for a row of NULLs, and IS NOT NULL fail for a row with one
    is_null = f"{column} IS NOT DISTINCT FROM NULL"
    if not bounds:
        return {0: f"{column} IS DISTINCT FROM NULL"}.get(number, is_null if last else "false")
    if last and len(bounds) < slices - 1:
        return is_null
    ends = [f"{column} >= {bounds[number - 1]}"] if number else []
    ends += [f"{column} < {bounds[number]}"] if number < len(bounds) else []
    return f"({' AND '.join(ends)}{f' OR {is_null}' if last else ''})"


def page_bounds(pages: Sequence[int], slices: int) -> list[int]:
    """Return the pages at which to cut, so that of all tables together each slice has as many."""
    sizes, goal_of_all = sorted(pages), sum(pages)
    bounds, page, before, number = [], 0, 0, 0
    for cut_number in range(1, slices):
        goal = -(-goal_of_all * cut_number // slices)
        while number < len(sizes):
            more = (sizes[number] - page) * (len(sizes) - number)
            if before + more >= goal:
                break
            before, page, number = before + more, sizes[number], number + 1
        tables = max(1, len(sizes) - number)
        bounds.append(page + -(-(goal - before) // tables))
    return bounds


def _range_bounds(run: Run, text: str, slicing: Slicing, slices: int) -> tuple[str, ...]:
    """Return percentiles of the column; where NULLs fill a slice of their own, of one range less.

    No percentiles at all mean that there are no values, or no more than one range for them.
    """
    every = [n / slices for n in range(1, slices)]
    fewer = [n / (slices - 1) for n in range(1, slices - 1)]
    found = _ordered(run, _ranges(text, slicing, (*every, *fewer)), slicing)
    rows, filled, _ = found[0]
    literals = tuple(literal for _, _, literal in found)
    if not filled:
        return ()
    if len(literals) != len(every) + len(fewer):
        raise _cannot_range(slicing)
    alone = (rows - filled) * slices >= rows
    return literals[len(every) :] if alone else literals[: len(every)]


def _ranges(text: str, slicing: Slicing, fractions: Sequence[float]) -> str:
    written = ", ".join(map(repr, fractions))
    return _RANGES.format(fractions=written, column=_column(text, slicing))


def _column(text: str, slicing: Slicing) -> str:
    """Return the query of nothing but the column."""
    source = slicing.table or f"(\n{text}\n) AS dask_shardsql"
    return f"SELECT {double_quoted(slicing.column or '')} FROM {source}"


def _ordered(run: Run, sql: str, slicing: Slicing) -> Sequence[Sequence[Any]]:
    try:
        return run(sql)
    except Exception as error:
        state = getattr(error, "pgcode", None)
        if state == _NO_ORDER:
            raise _cannot_range(slicing) from error
        if state == _NO_COLUMN:
            column = slicing.column or ""
            raise ColumnError(
                f"there is no column {column!r} that partition_by could cut by", (column,)
            ) from error
        raise


def _cannot_range(slicing: Slicing) -> ConfigurationError:
    return ConfigurationError(
        f"column {slicing.column!r} cannot be cut into ranges: its type has no order that "
        "percentiles can be taken of. Use partition_method='hash', or partition by another column"
    )


def _leaves(run: Run, slicing: Slicing) -> list[tuple[str, str, int, int]]:
    """Return name, kind, pages and bytes of a table, and of the partitions and heirs it has."""
    table = "'" + (slicing.table or "").replace("'", "''") + "'"
    return [(n, k, int(p), int(b)) for n, k, p, b in run(_LEAVES.format(table=table))]


def _refuse_without_ctid(name: str, kind: str) -> None:
    if kind not in _WITH_CTID:
        what = _KINDS.get(kind, "no table")
        raise ConfigurationError(
            f"{name} is {what}, whose rows have no place that they could be cut by. Name a column "
            "to cut by: partition_by='...'"
        )


def _refuse_choices(text: str, slicing: Slicing) -> None:
    """Refuse what chooses some of several rows: every slice runs the query and chooses anew."""
    if slicing.table is not None:
        return
    before = ["", ""]
    for word in words_of(text):
        if before[1] not in ("as", ".") and (
            word in ("limit", "fetch") or (before[1] == "distinct" and word == "on")
        ):
            clause = "DISTINCT ON" if word == "on" else word.upper()
            raise QueryError(
                f"a query with {clause} cannot be split: every slice would run it, and might "
                "choose other rows than the next",
                query=text,
                hint=f"leave out partitions_per_shard and partition_size, or {clause}",
            )
        before = [before[1], word]
