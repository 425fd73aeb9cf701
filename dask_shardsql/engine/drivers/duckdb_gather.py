"""DuckDB as the database that gathers: the query runs in memory over the rows of all shards.

A database in memory, of the file's own name, gets the schema of a shard, and of its tables only
those without which DuckDB does not understand the query; whatever is not among them is not to be
found there. They get the rows of all shards, which DuckDB copies from file to file. The user's own
text runs there, with the file's settings, and can read no shard's own slice.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any
from weakref import WeakKeyDictionary

import duckdb

from dask_shardsql.engine.drivers.base import Columns, OnBatch, Query
from dask_shardsql.engine.drivers.duckdb_tables import (
    HERE,
    TABLES,
    collations_of,
    definitions_of,
    full_name,
    types_of,
    width_of,
)
from dask_shardsql.engine.drivers.gathering import Extract, Survey, TargetFailedError
from dask_shardsql.engine.drivers.rows import double_quoted, folded, plain_params
from dask_shardsql.errors import MergeRefusedError
from dask_shardsql.topology import ShardedTable

__all__ = ["DuckDBGathering", "interrupt_beside"]

_SOURCE = "dask_shardsql_source"
_ROWS = 1 << 20
_VIEWS = f"SELECT schema_name, view_name FROM duckdb_views() WHERE {HERE} AND NOT internal"
_SETTINGS = "SELECT name, value FROM duckdb_settings() WHERE value IS NOT NULL"
# these are of a connection, or are set when the file is no more needed
_ACCESS = ("allowed_directories", "allowed_paths", "enable_external_access")
_NOT_COPIED = (*_ACCESS, "access_mode", "python_enable_replacements", "timezone")
_REFUSED = (
    ("system-column", r"rowid", "where a row is stored on its shard"),
    (
        "system-table",
        r"duckdb_\w+|pragma_\w+|information_schema|pg_catalog|sqlite_master|describe|show",
        "something of one file",
    ),
)

# the databases in memory that work for a connection
_beside: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()


class DuckDBGathering:
    """See :class:`dask_shardsql.engine.drivers.gathering.Gathering`.

    Parameters
    ----------
    connection : duckdb.DuckDBPyConnection
        Idle, with a file that is open read-only.
    query : Query
        The query.
    sharded : sequence of ShardedTable
        The sharded tables.
    pins : sequence of str
        Statements that a new connection needs.
    read : callable
        Reads the answer to a query from a connection; as :meth:`Driver.read`.
    """

    def __init__(
        self,
        connection: Any,
        query: Query,
        sharded: Sequence[ShardedTable],
        pins: Sequence[str],
        read: Callable[[Any, Query, Callable[[Columns], Columns], OnBatch], None],
    ) -> None:
        self._connection, self._query, self._sharded = connection, query, sharded
        self._pins, self._read = pins, read
        self._extracts: tuple[Extract, ...] = ()
        self._memory: Any = None
        self._has_own_rows = False

    def survey(self) -> Survey:
        """Return what is needed of the tables.

        Raises
        ------
        MergeRefusedError
            The query cannot be answered in this way.
        """
        tables = self._rows(TABLES)
        keys = self._keys(tables)
        text = self._text()
        named = [table for table in tables if folded(table[1]) in text]
        self._refuse_what_differs(text, named)
        self._make()
        read = self._needed(named, tables)
        others = tuple(".".join(table) for table in read if table not in keys)
        if len(others) == len(read):
            return Survey(self._query.sql, (), others=others)
        self._extracts = tuple(self._extract(*table, keys.get(table, "")) for table in read)
        defined = tuple(
            Extract(name, "", "", "", definition=definition)
            for name, definition in self._named_definitions().items()
        )
        text = self._query.sql
        return Survey(text, self._extracts, text, others=others, tables=defined)

    def prepare(self) -> None:
        """Do nothing: the survey has made the database in memory."""

    def add_own(self) -> int:
        """Do nothing: its own rows are taken like the others'."""
        return 0

    def take(self, source: Any, count: Callable[[int], None]) -> None:
        """Copy the rows of a shard; before those of the first one, this shard's own."""
        if not self._has_own_rows:
            self._has_own_rows = True
            failure: Exception | None = None
            try:
                self._copy(self._connection, self._extracts, count)
            except (duckdb.Error, MergeRefusedError) as error:
                failure = error
            if failure is not None:
                raise TargetFailedError(failure)
        self._copy(source, [one for one in self._extracts if one.key], count)

    def read(self, resolve: Callable[[Columns], Columns], on_batch: OnBatch) -> None:
        """Run the query in memory."""
        ((*allowed, access),) = self._rows(
            "SELECT " + ", ".join(f"current_setting('{name}')" for name in _ACCESS)
        )
        if not access:
            for name, value in zip(_ACCESS, allowed, strict=False):
                self._memory.execute(f"SET {name} = {value}")
            self._memory.execute("SET enable_external_access = false")
        self._read(self._memory, self._query, resolve, on_batch)

    def abandon(self) -> None:
        """Close the database in memory."""
        memory, self._memory = self._memory, None
        _beside.pop(self._connection, None)
        with suppress(duckdb.Error):
            if memory is not None:
                memory.close()

    def _rows(self, sql: str) -> list[tuple[Any, ...]]:
        rows: list[tuple[Any, ...]] = self._connection.execute(sql).fetchall()
        return rows

    def _keys(self, tables: Sequence[tuple[Any, ...]]) -> dict[tuple[Any, ...], str]:
        """Return the shard key of each sharded table."""
        ((current,),) = self._rows("SELECT current_schema()")
        found = {(folded(schema), folded(name)): (schema, name) for schema, name in tables}
        keys = {}
        for table in self._sharded:
            schema, _, name = folded(table.name).rpartition(".")
            if (schema or folded(current), name) not in found:
                raise MergeRefusedError(
                    "unknown-table",
                    f"the topology's sharded table {table.name!r} is no table of the file: write "
                    "it with its schema if that is not the current one",
                )
            keys[found[schema or folded(current), name]] = table.key
        return keys

    def _text(self) -> str:
        """Return the query, with the definitions of the views and macros that it names."""
        definitions = map(folded, self._named_definitions().values())
        return "\n".join([folded(self._query.sql), *definitions]).replace('""', '"')

    def _named_definitions(self) -> dict[str, str]:
        """Return those of the views and macros that it names, also in one another."""
        text, left = folded(self._query.sql), definitions_of(self._connection)
        found: dict[str, str] = {}
        while named := {name: left[name] for name in left if folded(name) in text}:
            left = {name: left[name] for name in left if name not in named}
            text = "\n".join([text, *map(folded, named.values())])
            found |= named
        return found

    def _refuse_what_differs(self, text: str, named: Sequence[tuple[str, str]]) -> None:
        """Refuse what says something of one file."""
        columns = {
            folded(name) for table in named for name, _ in types_of(self._connection, *table)
        }
        for reason, words, what in _REFUSED:
            found = re.search(rf"\b(?:{words})\b", text)
            if found and found[0] not in columns:
                raise MergeRefusedError(
                    reason, f"it names {found[0]!r}, which says {what}: leave that out"
                )

    def _extract(self, schema: str, name: str, key: str) -> Extract:
        full = full_name(schema, name)
        shown = name if schema == "main" else f"{schema}.{name}"
        types = types_of(self._connection, schema, name)
        select = f"SELECT {', '.join(double_quoted(column) for column, _ in types)} FROM {full}"
        collations = collations_of(self._connection, schema, name)
        return Extract(shown, key, select, full, full_name=full, types=types, database=collations)

    def _open(self) -> Any:
        """Open a database in memory with the settings of this shard's."""
        memory = duckdb.connect(":memory:")
        plain = dict(memory.execute(_SETTINGS).fetchall())
        settings = {
            name: value
            for name, value in self._rows(_SETTINGS)
            if plain.get(name) != value and name.lower() not in _NOT_COPIED
        }
        if settings:
            memory.close()
            memory = duckdb.connect(":memory:", config=settings)
        try:
            for pin in self._pins:
                memory.execute(pin)
        except BaseException:
            memory.close()
            raise
        return memory

    def _make(self) -> None:
        """Make a database in memory, with all views, macros and types, and no table."""
        ((catalog, schema),) = self._rows("SELECT current_database(), current_schema()")
        self._memory = memory = _beside[self._connection] = self._open()
        name = double_quoted(catalog)
        if catalog not in ("memory", "system", "temp"):
            memory.execute(f"ATTACH ':memory:' AS {name}")
        memory.execute(f"USE {name}")
        with self._attached(self._connection):
            memory.execute(f"COPY FROM DATABASE {_SOURCE} TO {name} (SCHEMA)")
        left = [full_name(*table) for table in memory.execute(TABLES).fetchall()]
        while left:  # those that others refer to come last
            kept = [table for table in left if not self._drops(table)]
            if len(kept) == len(left):
                memory.execute(f"DROP TABLE {kept[0]}")  # which says why not
            left = kept
        memory.execute(f"USE {name}.{double_quoted(schema)}")

    def _needed(
        self, named: Sequence[tuple[str, str]], tables: Sequence[tuple[str, str]]
    ) -> list[tuple[str, str]]:
        """Make the tables without which the query cannot be understood, and return them."""
        others = [table for table in tables if table not in named]
        views = self._rows(_VIEWS)
        names = [folded(name) for _, name in (*tables, *views)]
        needed = []
        with self._attached(self._connection):
            self._create(named)
            if not self._is_understood():  # it names a table in some other way
                self._create(others)
                named = tables
            for table in sorted(named):
                name = folded(table[1])
                self._memory.execute(f"DROP TABLE {full_name(*table)}")
                # without it, a name could mean another one
                is_alone = names.count(name) == 1 and not name.startswith("pg_")
                if not (is_alone and self._is_understood()):
                    self._create([table])
                    needed.append(table)
        return needed

    def _create(self, tables: Sequence[tuple[str, str]]) -> None:
        """Make tables as they are in the file that is attached, without rows or constraints."""
        for table in tables:
            name = full_name(*table)
            self._memory.execute(f"CREATE TABLE {name} AS FROM {_SOURCE}.{name} LIMIT 0")

    def _is_understood(self) -> bool:
        with suppress(duckdb.BinderException, duckdb.CatalogException):
            params = plain_params(self._query.params)
            self._memory.execute("DESCRIBE\n" + self._query.sql, params).fetchall()
            return True
        return False

    @contextmanager
    def _attached(self, source: Any) -> Iterator[None]:
        where = f"SELECT path FROM duckdb_databases() WHERE {HERE}"
        ((path,),) = source.execute(where).fetchall()
        quoted = path.replace("'", "''")
        self._memory.execute(f"ATTACH '{quoted}' AS {_SOURCE} (READ_ONLY)")
        try:
            yield
        finally:
            with suppress(duckdb.Error):
                self._memory.execute(f"DETACH {_SOURCE}")

    def _drops(self, table: str) -> bool:
        with suppress(duckdb.CatalogException, duckdb.DependencyException):
            self._memory.execute(f"DROP TABLE {table}")
            return True
        return False

    def _copy(self, source: Any, extracts: Sequence[Extract], count: Callable[[int], None]) -> None:
        """Copy rows from a shard's file, which cannot change while it is open."""
        with self._attached(source):
            for one in extracts:
                table = f"{_SOURCE}.{one.full_name}"
                for where in _parts(self._memory, table, one):
                    ((nbytes,),) = self._memory.execute(
                        f"SELECT sum({width_of(one)}) FROM {table} {where}"
                    ).fetchall()
                    count(int(nbytes or 0))
                    self._memory.execute(
                        f"INSERT INTO {one.into} BY NAME SELECT * FROM {table} {where}"
                    )


def interrupt_beside(connection: Any) -> None:
    """Interrupt what is run in memory for a connection."""
    memory = _beside.get(connection)
    if memory is not None:
        memory.interrupt()


def _parts(memory: Any, table: str, extract: Extract) -> Iterator[str]:
    """Cut a table into ranges of its rowid, where that is not a column of its own."""
    if any(folded(name or "") == "rowid" for name, _ in extract.types):
        yield ""
        return
    ((most,),) = memory.execute(f"SELECT max(rowid) FROM {table}").fetchall()
    for low in range(0, (-1 if most is None else most) + 1, _ROWS):
        yield f"WHERE rowid BETWEEN {low} AND {low + _ROWS - 1}"
