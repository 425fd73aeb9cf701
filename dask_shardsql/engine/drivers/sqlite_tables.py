"""What the tables and views of a SQLite file are, how large, and whether those of all are alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dask_shardsql.engine.drivers.base import Query
from dask_shardsql.engine.drivers.gathering import Estimate, Extract, refuse_other_view
from dask_shardsql.engine.drivers.rows import double_quoted
from dask_shardsql.errors import SchemaMismatchError

__all__ = ["COLUMNS", "estimate", "types_of"]

COLUMNS = "SELECT name, type, hidden FROM pragma_table_xinfo(?) ORDER BY cid"
_VIEW = "SELECT sql FROM sqlite_master WHERE type = 'view' AND name = ?"
_GENERATED, _SAMPLE = (2, 3), 1000


def estimate(connection: Any, query: Query, extracts: Sequence[Extract]) -> list[Estimate]:
    """Return about how much each of the extracts has in a file; whatever the query.

    Raises
    ------
    SchemaMismatchError
        A sharded table, or a view, is not what it is on the shard that gathers.
    """
    try:
        connection.execute("BEGIN")
        for one in extracts:
            if one.key:
                _compare(connection, one)
            if one.definition:
                _compare_view(connection, one)
        return [_size(connection, one) if one.select else Estimate() for one in extracts]
    finally:
        connection.execute("ROLLBACK")


def types_of(connection: Any, table: str) -> tuple[tuple[str | None, ...], ...]:
    """Return each column's name, type, collation, and whether it is computed."""
    columns = connection.execute(COLUMNS, (table,)).fetchall()
    compared = ", ".join(f"+{double_quoted(name)}" for name, _, _ in columns)
    # a plus keeps the collation, and every index out of it
    text = f"EXPLAIN SELECT 1 FROM {double_quoted(table)} ORDER BY {compared}"
    steps = connection.execute(text).fetchall()
    (collations,) = (step[5] for step in steps if step[1] in ("SorterOpen", "OpenEphemeral"))
    each = collations.removesuffix(")").split(",")[1:]
    return tuple(
        (name, kind.upper(), collation, "generated" if hidden in _GENERATED else "")
        for (name, kind, hidden), collation in zip(columns, each, strict=True)
    )


def _compare(connection: Any, extract: Extract) -> None:
    (encoding,) = connection.execute("PRAGMA encoding").fetchone()
    found, table = types_of(connection, extract.table), extract.table
    problem = ""
    if encoding != extract.database:
        problem = f"the file is in {encoding} here, and in {extract.database}"
    elif len(found) != len(extract.types):
        problem = f"{table!r} has {len(found)} columns here, and {len(extract.types)}"
    for here, there in zip(found, extract.types, strict=False):
        if here != there and not problem:
            shown = [" ".join(map(str, one)).strip() for one in (here, there)]
            problem = f"a column of {table!r} is ({shown[0]}) here, and ({shown[1]})"
    if problem:
        raise SchemaMismatchError(
            f"{problem} on the shard that gathers: values would be converted or ordered in another "
            "way. Make them agree"
        )


def _size(connection: Any, extract: Extract) -> Estimate:
    table = double_quoted(extract.table)
    if not connection.execute(COLUMNS, (extract.table,)).fetchall():
        return Estimate()  # a reference table that only the shard that gathers has
    ((rows,),) = connection.execute(f"SELECT count(*) FROM {table}")
    names = [double_quoted(name or "") for name, *_, generated in extract.types if not generated]
    widths = " + ".join(f"coalesce(length(CAST({name} AS BLOB)), 0) + 1" for name in names)
    sample = f"SELECT {widths} AS w FROM {table} LIMIT {_SAMPLE}"
    ((width,),) = connection.execute(f"SELECT avg(w) FROM ({sample})")
    return Estimate(rows, int(rows * ((width or 0) + 8)))


def _compare_view(connection: Any, extract: Extract) -> None:
    found = connection.execute(_VIEW, (extract.table,)).fetchone()
    refuse_other_view(extract, found[0] if found else "")
