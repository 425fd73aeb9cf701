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
from dask_shardsql.engine.drivers.gathering import Estimate, Extract, Survey, TargetFailedError
from dask_shardsql.engine.drivers.rows import double_quoted, folded, plain_params
from dask_shardsql.errors import MergeRefusedError, SchemaMismatchError
from dask_shardsql.topology import ShardedTable

__all__ = ["DuckDBGathering", "estimate", "interrupt_beside"]

_SOURCE = "dask_shardsql_source"
_ROWS, _SAMPLE = 1 << 20, 10_000
_HERE = "database_name = current_database()"
_TABLES = f"SELECT schema_name, table_name FROM duckdb_tables() WHERE {_HERE}"
_VIEWS = f"SELECT schema_name, view_name FROM duckdb_views() WHERE {_HERE} AND NOT internal"
_DEFINITIONS = f"""
    SELECT view_name, sql FROM duckdb_views() WHERE {_HERE} AND NOT internal
    UNION ALL SELECT function_name, macro_definition FROM duckdb_functions()
    WHERE {_HERE} AND NOT internal AND macro_definition IS NOT NULL"""
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
_WIDTHS = {"BOOLEAN": 1, "TINYINT": 1, "SMALLINT": 2, "INTEGER": 4, "FLOAT": 4, "DATE": 4}
_WIDTHS |= {"BIGINT": 8, "DOUBLE": 8, "TIME": 8, "TIMESTAMP": 8, "HUGEINT": 16, "UUID": 16}
_WIDTHS |= {f"U{name}": width for name, width in _WIDTHS.items() if name.endswith("INT")}
_WIDTHS |= {"UINTEGER": 4, "TIMESTAMP WITH TIME ZONE": 8, "INTERVAL": 16}

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
        tables = self._rows(_TABLES)
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
        return Survey(self._query.sql, self._extracts, self._query.sql, others=others)

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
        text, left = folded(self._query.sql), self._rows(_DEFINITIONS)
        while named := [one for one in left if folded(one[0]) in text]:
            left = [one for one in left if one not in named]
            text = "\n".join([text, *(folded(definition) for _, definition in named)])
        return text.replace('""', '"')

    def _refuse_what_differs(self, text: str, named: Sequence[tuple[str, str]]) -> None:
        """Refuse what says something of one file."""
        columns = {folded(name) for table in named for name, _ in _types(self._connection, *table)}
        for reason, words, what in _REFUSED:
            found = re.search(rf"\b(?:{words})\b", text)
            if found and found[0] not in columns:
                raise MergeRefusedError(
                    reason, f"it names {found[0]!r}, which says {what}: leave that out"
                )

    def _extract(self, schema: str, name: str, key: str) -> Extract:
        full = _full(schema, name)
        shown = name if schema == "main" else f"{schema}.{name}"
        types = _types(self._connection, schema, name)
        select = f"SELECT {', '.join(double_quoted(column) for column, _ in types)} FROM {full}"
        collations = _collations(self._connection, schema, name)
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
        left = [_full(*table) for table in memory.execute(_TABLES).fetchall()]
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
                self._memory.execute(f"DROP TABLE {_full(*table)}")
                # without it, a name could mean another one
                is_alone = names.count(name) == 1 and not name.startswith("pg_")
                if not (is_alone and self._is_understood()):
                    self._create([table])
                    needed.append(table)
        return needed

    def _create(self, tables: Sequence[tuple[str, str]]) -> None:
        """Make tables as they are in the file that is attached, without rows or constraints."""
        for table in tables:
            name = _full(*table)
            self._memory.execute(f"CREATE TABLE {name} AS FROM {_SOURCE}.{name} LIMIT 0")

    def _is_understood(self) -> bool:
        with suppress(duckdb.BinderException, duckdb.CatalogException):
            params = plain_params(self._query.params)
            self._memory.execute("DESCRIBE\n" + self._query.sql, params).fetchall()
            return True
        return False

    @contextmanager
    def _attached(self, source: Any) -> Iterator[None]:
        where = f"SELECT path FROM duckdb_databases() WHERE {_HERE}"
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
                        f"SELECT sum({_width(one)}) FROM {table} {where}"
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


def estimate(connection: Any, query: Query, extracts: Sequence[Extract]) -> list[Estimate]:
    """Return about how much each of the extracts has in a file; whatever the query.

    Raises
    ------
    SchemaMismatchError
        A sharded table is not what it is on the shard that gathers.
    """
    tables = {_full(*table): table for table in connection.execute(_TABLES).fetchall()}
    sizes = []
    for one in extracts:
        if one.key:
            _compare(connection, one, tables)
        if one.full_name not in tables:
            sizes.append(Estimate())  # a reference table that only the shard that gathers has
            continue
        sample = f"SELECT {_width(one)} AS w FROM {one.full_name} LIMIT {_SAMPLE}"
        text = f"SELECT (SELECT count(*) FROM {one.full_name}), avg(w) FROM ({sample})"
        ((rows, width),) = connection.execute(text).fetchall()
        sizes.append(Estimate(rows, int(rows * (width or 0))))
    return sizes


def _full(schema: str, name: str) -> str:
    return f"{double_quoted(schema)}.{double_quoted(name)}"


def _types(connection: Any, schema: str, name: str) -> tuple[tuple[str, str], ...]:
    """Return each column's name and type, with an enum's labels."""
    found = connection.execute(f"DESCRIBE {_full(schema, name)}").fetchall()
    return tuple((row[0], row[1]) for row in found)


def _collations(connection: Any, schema: str, name: str) -> str:
    """Return in which order the columns of a table have which collations."""
    text = f"{_TABLES.replace('table_name FROM', 'table_name, sql FROM')} AND table_name = ?"
    ((_, _, sql),) = (
        row for row in connection.execute(text, [name]).fetchall() if row[0] == schema
    )
    return " ".join(re.findall(r"(\S+ \S+ COLLATE [\w.]+)", sql))


def _compare(connection: Any, extract: Extract, tables: dict[str, tuple[str, str]]) -> None:
    name, problem = extract.table, ""
    if extract.full_name not in tables:
        problem = f"the table {name!r} is missing here, and is there"
    else:
        found = dict(_types(connection, *tables[extract.full_name]))
        wanted = {name or "": kind or "" for name, kind in extract.types}
        for column in sorted({*found, *wanted}):
            here, there = found.get(column, "missing"), wanted.get(column, "missing")
            if here != there and not problem:
                problem = f"column {column!r} of {name!r} is {here} here, and {there}"
        here = _collations(connection, *tables[extract.full_name])
        if here != extract.database and not problem:
            problem = f"the collations of {name!r} are ({here}) here, and ({extract.database})"
    if problem:
        raise SchemaMismatchError(
            f"{problem} on the shard that gathers: values would be converted or ordered in another "
            "way. Make them agree"
        )


def _width(extract: Extract) -> str:
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


def _parts(memory: Any, table: str, extract: Extract) -> Iterator[str]:
    """Cut a table into ranges of its rowid, where that is not a column of its own."""
    if any(folded(name or "") == "rowid" for name, _ in extract.types):
        yield ""
        return
    ((most,),) = memory.execute(f"SELECT max(rowid) FROM {table}").fetchall()
    for low in range(0, (-1 if most is None else most) + 1, _ROWS):
        yield f"WHERE rowid BETWEEN {low} AND {low + _ROWS - 1}"
