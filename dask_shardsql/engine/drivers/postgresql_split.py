"""Splitting a query in PostgreSQL's own words: what it knows of the query, and whether it agrees.

The text that is split is the server's. Nothing that is made of it is believed before the server has
read it again: the whole text as it was understood must be the same query to it, and the columns of
the final query must have the names, types and collations of the user's.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import psycopg2

from dask_shardsql.engine.drivers.gathering import Extract, Split
from dask_shardsql.engine.drivers.postgresql_catalog import (
    ATTRIBUTES,
    KEY_FACTS,
    RELATIONS,
    WIDTH,
    Relation,
)
from dask_shardsql.engine.drivers.postgresql_columns import Rows, columns_in, types_of
from dask_shardsql.sql.canonical import SYNONYMS, NotSplitError, parse, same_words, written
from dask_shardsql.sql.catalog import Catalog, Sharded
from dask_shardsql.sql.instants import FUNCTIONS, SETTING, with_one_instant
from dask_shardsql.sql.split import split
from dask_shardsql.sql.splitting import Partial, table_of
from dask_shardsql.topology import ShardedTable

__all__ = ["NotSplitError", "split_query"]

_AGAIN, _PROBE, _FINAL = (f"dask_shardsql_{name}" for name in ("again", "probe", "final"))
_SET_INSTANT = f"SELECT pg_catalog.set_config('{SETTING}', pg_catalog.now()::text, true)"
# of what is not IMMUTABLE: what depends on the settings that are pinned for every session alone
_PINNED = frozenset(
    [
        "age_between",
        "array_in",
        "array_out",
        "array_to_json",
        "array_to_string",
        "concat",
        "concat_ws",
        "date",
        "date_cmp",
        "date_part",
        "date_trunc",
        "extract",
        "format",
        "json_agg",
        "json_build_array",
        "json_build_object",
        "json_object_agg",
        "jsonb_agg",
        "jsonb_build_array",
        "jsonb_build_object",
        "jsonb_object_agg",
        "quote_literal",
        "quote_nullable",
        "row_to_json",
        "time",
        "timestamp",
        "timestamptz",
        "timetz",
        "timezone",
        "to_char",
        "to_date",
        "to_json",
        "to_jsonb",
        "to_timestamp",
    ]
)
_PINNED_PREFIXES = ("date_", "timestamp_", "timestamptz_")  # comparisons, sums with intervals
# equal values are the same bytes, whatever else they are compared with in the group
_INTEGERS, _TEXTS = {"int2", "int4", "int8"}, {"text", "varchar"}
_IDENTICAL = {"uuid", "date", "timestamp", "bool", "bytea"}
# a row of a table must fit a page, but for what is stored beside it
_ROW_BYTES, _FEW_COLUMNS = 8000, 100


def split_query(
    rows: Rows,
    view: str,
    gathered: Mapping[int, tuple[Relation, ShardedTable]],
    relations: Mapping[int, Relation],
    views: Collection[int],
    shards: Sequence[str],
    functions: Sequence[tuple[Any, ...]],
) -> Split:
    """Split the query that a temporary view is made of.

    Parameters
    ----------
    rows : callable
        Runs SQL with named values, and returns its rows.
    view : str
        The view's name.
    gathered : mapping
        By oid, the sharded tables that it reads.
    relations : mapping
        By oid, all that it reads.
    views : collection of int
        The oids of those of them that are views of sharded tables.
    shards : sequence of str
        Names of all shards.
    functions : sequence of tuple
        What the catalog says of all functions that it calls.

    Raises
    ------
    NotSplitError
        It cannot be split, or the server does not agree.
    """
    aggregates, has_instant = _aggregates(functions)

    def describe(select: str) -> Sequence[str]:
        rows(f"CREATE TEMPORARY VIEW {_PROBE} AS\n{select}")
        found = [kind for _, kind, *_ in rows(ATTRIBUTES, table=f"pg_temp.{_PROBE}")]
        rows(f"DROP VIEW pg_temp.{_PROBE}")
        return found

    try:
        # all functions are the server's own, and so must those be that are written anew; all else
        # is written with its schema, so that nothing of that name can come before it elsewhere
        settings: tuple[str, ...] = ("SET LOCAL search_path TO pg_catalog",)
        rows(*settings)
        text, texts = _text(rows, f"pg_temp.{view}"), {oid: _text(rows, oid) for oid in views}
        if has_instant:
            settings += (_SET_INSTANT,)
            text = _written_down(rows, with_one_instant(text))
            texts = {oid: with_one_instant(one) for oid, one in texts.items()}
        names = _names(rows, [*relations])
        sharded: dict[str, Sharded] = {}
        for oid, (relation, table) in gathered.items():
            one = _sharded(rows, oid, table)
            sharded |= dict.fromkeys((*names[oid], relation.full_name), one)
        reference = {n for oid in relations if oid not in gathered for n in names[oid]}
        for one_text in texts.values():
            _refuse_misreading(rows, _written_down(rows, one_text), written(parse(one_text)))
        by_name = {name: texts[oid] for oid in views for name in names[oid]}
        catalog = Catalog(
            sharded,
            frozenset(reference),
            by_name,
            aggregates,
            shards=tuple(shards),
            has_instant=has_instant,
        )
        found = split(text, catalog, describe)
        _refuse_misreading(rows, text, found.as_read)
        extracts = tuple(_extract(rows, n, one, settings) for n, one in enumerate(found.partials))
        if found.final:
            _refuse_other_columns(rows, view, found.final, {*gathered, *views})
        else:
            _refuse_other_columns(rows, view, text, set())
        way = (found.strategy, found.reason, found.shards, tuple(catalog.conditions))
        return Split(settings, extracts, found.final, text, (), *way)
    except psycopg2.Error as error:
        if error.pgcode is None or error.pgcode[:2] in ("57", "08", "58", "53", "40"):
            raise
        raise NotSplitError("not-understood") from None


def _aggregates(functions: Sequence[tuple[Any, ...]]) -> tuple[frozenset[str], bool]:
    """Return the names of the aggregates, and whether the query asks for the time.

    Functions whose result a shard decides are refused.
    """
    names: set[str] = set()
    has_instant = False
    for name, kind, volatile, arguments, is_own, _ in functions:
        if name in FUNCTIONS and not is_own:
            has_instant = True
            continue
        is_pinned = name in _PINNED or name.startswith(_PINNED_PREFIXES)
        is_pinned = is_pinned or (name == "age" and arguments == 2)
        if is_own or volatile == "v" or (volatile == "s" and not is_pinned):
            raise NotSplitError("volatile" if not is_own else "function")
        if kind == "a":
            names.add(str(SYNONYMS.get(name, name)))
    return frozenset(names), has_instant


def _names(rows: Rows, oids: Sequence[int]) -> dict[int, list[str]]:
    """Return the names by which the server may write relations, with their schema and without."""
    found = rows(
        "SELECT c.oid::int8, c.oid::pg_catalog.regclass::text, pg_catalog.format('%%I.%%I', "
        "n.nspname, c.relname) FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n "
        "ON n.oid = c.relnamespace WHERE c.oid = ANY(%(oids)s::int8[]::pg_catalog.oid[])",
        oids=list(oids),
    )
    return {oid: names for oid, *names in found}


def _sharded(rows: Rows, oid: int, table: ShardedTable) -> Sharded:
    """Return what is known of a sharded table's key: whether equal values are the same."""
    for found in rows(KEY_FACTS, table=oid, key=table.key):
        schema, kind, is_not_null, is_deterministic, columns = found
        alike = None
        if schema == "pg_catalog" and is_deterministic:
            groups = ((_INTEGERS, "integer"), (_TEXTS, "text"), (_IDENTICAL, kind))
            alike = next((name for kinds, name in groups if kind in kinds), None)
        group = None if alike is None else (alike, table.function)
        key_type = f"pg_catalog.{kind}" if alike else ""
        return Sharded(table.key, group, is_not_null, table.function, key_type, frozenset(columns))
    return Sharded(table.key)


def _refuse_misreading(rows: Rows, text: str, as_read: str) -> None:
    """Refuse a text that is another query to the server than what was understood of it."""
    again = same_words(_written_down(rows, as_read))
    # what the server reads of its own text it may write in another way, as casts of arrays
    if again != same_words(text) and again != same_words(_written_down(rows, text)):
        raise NotSplitError("not-understood")


def _written_down(rows: Rows, text: str) -> str:
    """Return what the server writes of a query."""
    rows(f"CREATE TEMPORARY VIEW {_AGAIN} AS\n{text}")
    found = _text(rows, f"pg_temp.{_AGAIN}")
    rows(f"DROP VIEW pg_temp.{_AGAIN}")
    return found


def _text(rows: Rows, view: str | int) -> str:
    """Return what the server has written of a view, which is named, or an oid."""
    ((found,),) = rows(
        "SELECT pg_catalog.pg_get_viewdef(%(view)s::pg_catalog.regclass)", view=str(view)
    )
    return str(found).rstrip().removesuffix(";")


def _extract(rows: Rows, number: int, partial: Partial, settings: tuple[str, ...]) -> Extract:
    """Make the temporary table for a partial query, and return what is copied into it."""
    name = table_of(number)
    rows(f"CREATE TEMPORARY TABLE {name} ON COMMIT DROP AS\n{partial.select}\nWITH NO DATA")
    (columns,) = columns_in(rows, [f"pg_temp.{name}"])
    if any(one.names_objects for one in columns):
        raise NotSplitError("column-type")
    if len(columns) > _FEW_COLUMNS and rows(WIDTH, table=f"pg_temp.{name}")[0][0] > _ROW_BYTES:
        raise NotSplitError("row-width")
    in_text = any(one.needs_text for one in columns)
    types = types_of(columns, "")
    tables = ", ".join(table.rpartition(".")[2] for table in partial.tables)
    return Extract(
        tables, "", partial.select, name, in_text, "", types, (), settings, "", partial.shards
    )


def _refuse_other_columns(rows: Rows, view: str, final: str, sharded: set[int]) -> None:
    """Refuse a final query whose columns are not the user's, or that reads a shard's own slice."""
    rows(f"CREATE TEMPORARY VIEW {_FINAL} AS\n{final}")
    both = [rows(ATTRIBUTES, table=f"pg_temp.{one}") for one in (view, _FINAL)]
    if both[0] != both[1]:
        raise NotSplitError("column-type")
    if sharded & {row[0] for row in rows(RELATIONS, view=f"pg_temp.{_FINAL}")}:
        raise NotSplitError("not-understood")
