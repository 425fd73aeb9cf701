"""What the tables, views and macros of a DuckDB file are, and whether those of all are alike."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from dask_shardsql.engine.drivers.base import Query
from dask_shardsql.engine.drivers.gathering import Estimate, Extract, refuse_other_view
from dask_shardsql.engine.drivers.rows import double_quoted
from dask_shardsql.errors import SchemaMismatchError

__all__ = [
    "HERE",
    "TABLES",
    "collations_of",
    "definitions_of",
    "estimate",
    "full_name",
    "types_of",
    "width_of",
]

HERE = "database_name = current_database()"
TABLES = f"SELECT schema_name, table_name FROM duckdb_tables() WHERE {HERE}"
_DEFINITIONS = f"""
    SELECT view_name, sql FROM duckdb_views() WHERE {HERE} AND NOT internal
    UNION ALL SELECT function_name, macro_definition FROM duckdb_functions()
    WHERE {HERE} AND NOT internal AND macro_definition IS NOT NULL"""
_SAMPLE = 10_000
_WIDTHS = {"BOOLEAN": 1, "TINYINT": 1, "SMALLINT": 2, "INTEGER": 4, "FLOAT": 4, "DATE": 4}
_WIDTHS |= {"BIGINT": 8, "DOUBLE": 8, "TIME": 8, "TIMESTAMP": 8, "HUGEINT": 16, "UUID": 16}
_WIDTHS |= {f"U{name}": width for name, width in _WIDTHS.items() if name.endswith("INT")}
_WIDTHS |= {"UINTEGER": 4, "TIMESTAMP WITH TIME ZONE": 8, "INTERVAL": 16}


def estimate(connection: Any, query: Query, extracts: Sequence[Extract]) -> list[Estimate]:
    """Return about how much each of the extracts has in a file; whatever the query.

    Raises
    ------
    SchemaMismatchError
        A sharded table, a view or a macro is not what it is on the shard that gathers.
    """
    tables = {full_name(*table): table for table in connection.execute(TABLES).fetchall()}
    definitions = definitions_of(connection)
    sizes = []
    for one in extracts:
        if one.definition:
            refuse_other_view(one, definitions.get(one.table, ""))
        if one.key:
            _compare(connection, one, tables)
        if one.full_name not in tables:
            sizes.append(Estimate())  # a reference table that only the shard that gathers has
            continue
        sample = f"SELECT {width_of(one)} AS w FROM {one.full_name} LIMIT {_SAMPLE}"
        text = f"SELECT (SELECT count(*) FROM {one.full_name}), avg(w) FROM ({sample})"
        ((rows, width),) = connection.execute(text).fetchall()
        sizes.append(Estimate(rows, int(rows * (width or 0))))
    return sizes


def types_of(connection: Any, schema: str, name: str) -> tuple[tuple[str, str], ...]:
    """Return each column's name and type, with an enum's labels."""
    found = connection.execute(f"DESCRIBE {full_name(schema, name)}").fetchall()
    return tuple((row[0], row[1]) for row in found)


def collations_of(connection: Any, schema: str, name: str) -> str:
    """Return in which order the columns of a table have which collations."""
    text = f"{TABLES.replace('table_name FROM', 'table_name, sql FROM')} AND table_name = ?"
    ((_, _, sql),) = (
        row for row in connection.execute(text, [name]).fetchall() if row[0] == schema
    )
    return " ".join(re.findall(r"(\S+ \S+ COLLATE [\w.]+)", sql))


def _compare(connection: Any, extract: Extract, tables: dict[str, tuple[str, str]]) -> None:
    name, problem = extract.table, ""
    if extract.full_name not in tables:
        problem = f"the table {name!r} is missing here, and is there"
    else:
        found = dict(types_of(connection, *tables[extract.full_name]))
        wanted = {name or "": kind or "" for name, kind in extract.types}
        for column in sorted({*found, *wanted}):
            here, there = found.get(column, "missing"), wanted.get(column, "missing")
            if here != there and not problem:
                problem = f"column {column!r} of {name!r} is {here} here, and {there}"
        here = collations_of(connection, *tables[extract.full_name])
        if here != extract.database and not problem:
            problem = f"the collations of {name!r} are ({here}) here, and ({extract.database})"
    if problem:
        raise SchemaMismatchError(
            f"{problem} on the shard that gathers: values would be converted or ordered in another "
            "way. Make them agree"
        )


def width_of(extract: Extract) -> str:
    """Return an expression for the bytes of a row."""
    fixed, texts = 1, []
    for name, kind in extract.types:
        column = double_quoted(name or "")
        if kind in _WIDTHS:
            fixed += _WIDTHS[kind]
        elif (kind or "").startswith("DECIMAL"):
            fixed += 16
        else:
            texts.append(f"coalesce(strlen(CAST({column} AS VARCHAR)), 0)")
    return " + ".join([str(fixed), *texts])


def full_name(schema: str, name: str) -> str:
    """Return the name of a table, quoted."""
    return f"{double_quoted(schema)}.{double_quoted(name)}"


def definitions_of(connection: Any) -> dict[str, str]:
    """Return the texts of all views and macros, by name, also of several of one."""
    found: dict[str, str] = {}
    for name, definition in sorted(connection.execute(_DEFINITIONS).fetchall()):
        found[name] = "\n".join(filter(None, [found.get(name), definition]))
    return found
