"""SQLite as the database that gathers: the query runs in memory over the rows of all shards.

What a query reads SQLite itself tells: the program that EXPLAIN lists opens each table or index
that is read, and the authorizer hears of functions and rowids (but not of a column that only JOIN
... USING names). A database in memory then gets the tables of a shard, each made by its own
statement, so that affinities and collations are the same; the rows of all shards, which SQLite
copies from file to file and no Python value stands for; and the shard's views. The user's own text
runs there.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from dask_shardsql.engine.drivers.base import Columns, OnBatch, Query
from dask_shardsql.engine.drivers.gathering import Estimate, Extract, Survey, TargetFailedError
from dask_shardsql.engine.drivers.rows import double_quoted, folded
from dask_shardsql.errors import MergeRefusedError, SchemaMismatchError
from dask_shardsql.topology import ShardedTable

__all__ = ["SQLiteGathering", "estimate"]

_SOURCE = "dask_shardsql_source"
_ROWS, _SAMPLE = 16_384, 1000
_ROWIDS = (-(2**63), 2**63 - 1)
_SCHEMA = "SELECT type, name, tbl_name, sql FROM sqlite_master"
_OPENED = "SELECT rootpage, tbl_name FROM sqlite_master UNION ALL SELECT 1, 'sqlite_master'"
_COLUMNS = "SELECT name, type, hidden FROM pragma_table_xinfo(?) ORDER BY cid"
_GENERATED = (2, 3)
_OF_ONE_FILE = ("dbstat", "sqlite_", "pragma_")
# what they say is of one connection, or of where a row is stored
_FUNCTIONS = ("changes", "last_insert_rowid", "sqlite_offset", "total_changes")


class SQLiteGathering:
    """See :class:`dask_shardsql.engine.drivers.gathering.Gathering`.

    Parameters
    ----------
    connection : sqlite3.Connection
        Idle; its `beside` is interrupted when it is.
    query : Query
        The query.
    sharded : sequence of ShardedTable
        The sharded tables.
    execute : callable
        Runs a text with the parameters of a query.
    read : callable
        Reads the answer to a query from a connection; as :meth:`Driver.read`.
    """

    def __init__(
        self,
        connection: Any,
        query: Query,
        sharded: Sequence[ShardedTable],
        execute: Callable[[Any, str, Query], Any],
        read: Callable[[Any, Query, Callable[[Columns], Columns], OnBatch], None],
    ) -> None:
        self._connection, self._query, self._sharded = connection, query, sharded
        self._execute, self._read = execute, read
        self._schema: list[tuple[str, str, str, str | None]] = []
        self._extracts: tuple[Extract, ...] = ()
        self._memory: Any = None
        self._has_own_rows = False

    def survey(self) -> Survey:
        """Begin, and return what is needed of the tables.

        Raises
        ------
        MergeRefusedError
            The query cannot be answered in this way.
        """
        self._connection.execute("BEGIN")
        self._schema = self._connection.execute(_SCHEMA).fetchall()
        sharded = self._sharded_names()
        reads, functions = self._found_by(self._connection)
        self._refuse_what_differs(reads, functions)
        tables = self._tables()
        names = sorted({folded(table) for table, _ in reads} & set(tables))
        others = tuple(name for name in names if name not in sharded)
        if len(others) == len(names):
            return Survey(self._query.sql, (), others=others)
        (encoding,) = self._connection.execute("PRAGMA encoding").fetchone()
        self._extracts = tuple(
            self._extract(tables[name], sharded.get(name, ""), encoding) for name in names
        )
        return Survey(self._query.sql, self._extracts, self._query.sql, others=others)

    def prepare(self) -> None:
        """Make a database in memory, with all tables, still empty, and all views."""
        connection = self._connection
        (milliseconds,) = connection.execute("PRAGMA busy_timeout").fetchone()
        self._memory = connection.beside = sqlite3.connect(
            ":memory:",
            uri=True,  # so that files can be attached read-only
            timeout=milliseconds / 1000,
            isolation_level=None,
            check_same_thread=False,
        )
        self._memory.execute(f"PRAGMA encoding = '{self._extracts[0].database}'")
        self._memory.execute("PRAGMA ignore_check_constraints = ON")
        needed = {one.table for one in self._extracts}
        for kind, name, _, sql in self._schema:
            if kind not in ("table", "view") or _is_virtual(sql) or name.startswith("sqlite_"):
                continue
            try:
                self._memory.execute(sql or "")
            except sqlite3.Error:
                if name in needed:
                    raise
        connection.execute("ROLLBACK")

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
            except (sqlite3.Error, MergeRefusedError) as error:
                failure = error
            if failure is not None:
                raise TargetFailedError(failure)
        self._copy(source, [one for one in self._extracts if one.key], count)

    def read(self, resolve: Callable[[Columns], Columns], on_batch: OnBatch) -> None:
        """Run the query in memory."""
        memory = self._memory
        needed = {one.table for one in self._extracts}
        for kind, _, table, sql in self._schema:
            if kind == "index" and sql and table in needed:
                with _one_row_each(table), suppress(sqlite3.OperationalError):
                    memory.execute(sql)
        reads, _ = self._found_by(memory)
        tables = self._tables()
        missing = {folded(table) for table, _ in reads} & set(tables) - set(map(folded, needed))
        if missing:
            raise MergeRefusedError(
                "hidden-name",
                f"it reads {', '.join(sorted(missing))}, which was not known before: name it once "
                "more in the query",
            )
        memory.execute("PRAGMA query_only = ON")
        self._read(memory, self._query, resolve, on_batch)

    def abandon(self) -> None:
        """Close the database in memory, and end the transaction."""
        memory, self._memory, self._connection.beside = self._memory, None, None
        with suppress(sqlite3.Error):
            if memory is not None:
                memory.close()
        with suppress(sqlite3.Error):
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")

    def _tables(self) -> dict[str, str]:
        """Return the names of the tables, as they are, by the names that all spellings share."""
        return {
            folded(name): name
            for kind, name, _, sql in self._schema
            if kind == "table" and not _is_virtual(sql) and not name.startswith("sqlite_")
        }

    def _sharded_names(self) -> dict[str, str]:
        """Return the shard key of each sharded table."""
        tables, keys = self._tables(), {}
        for table in self._sharded:
            name = folded(table.name).removeprefix("main.")
            if name not in tables:
                raise MergeRefusedError(
                    "unknown-table",
                    f"the topology's sharded table {table.name!r} is no table of the file",
                )
            keys[name] = table.key
        return keys

    def _found_by(self, connection: Any) -> tuple[set[tuple[str, str]], set[str]]:
        """Return the tables and columns that the query reads, and the functions it calls."""
        reads: set[tuple[str, str]] = set()
        functions: set[str] = set()

        def note(action: int, one: str | None, other: str | None, *_: str | None) -> int:
            if action == sqlite3.SQLITE_READ:
                reads.add((one or "", other or ""))
            elif action == sqlite3.SQLITE_FUNCTION:
                functions.add(folded(other or ""))
            return sqlite3.SQLITE_OK

        connection.set_authorizer(note)
        try:
            text = f"EXPLAIN {self._query.sql}"
            steps = self._execute(connection, text, self._query).fetchall()
        finally:
            connection.set_authorizer(None)
        table_at = dict(connection.execute(_OPENED).fetchall())
        opened = {step[3] for step in steps if step[1] in ("OpenRead", "ReopenIdx") and not step[4]}
        reads |= {(table_at[page], "") for page in opened}
        if any(step[1] == "VOpen" for step in steps):  # which table, it does not say
            views = [sql or "" for kind, _, _, sql in self._schema if kind == "view"]
            texts = folded("\n".join([text, *views]))
            of_modules = {name for _, name, _, sql in self._schema if _is_virtual(sql)}
            reads |= {(name, "") for name in {*of_modules, "dbstat"} if folded(name) in texts}
        return reads, functions

    def _refuse_what_differs(self, reads: set[tuple[str, str]], functions: set[str]) -> None:
        """Refuse what says something of one file, or may read a table in a way that is not seen."""
        called = sorted(functions & set(_FUNCTIONS))
        if called:
            raise MergeRefusedError(
                "function",
                f"it calls {called[0]}(), which says something of one connection or file: leave "
                "that out",
            )
        virtual = {folded(name) for _, name, _, sql in self._schema if _is_virtual(sql)}
        own = {folded(name) for _, name, _, _ in self._schema if not name.startswith("sqlite_")}
        tables = self._tables()
        for table, column in sorted(reads):
            name = folded(table)
            if name in virtual:
                raise MergeRefusedError(
                    "virtual-table",
                    f"it reads the virtual table {table!r}, whose module may read other tables",
                )
            if name in own:
                if name in tables and folded(column) == "rowid" and not self._has(table, "rowid"):
                    raise MergeRefusedError(
                        "system-column",
                        f"it reads the rowid of {table!r}, which says where a row is stored on its "
                        "shard: leave that out",
                    )
            # SQLite itself looks at this one column to find table-valued functions
            elif name.startswith(_OF_ONE_FILE) and (name, column) != ("sqlite_master", "ROWID"):
                raise MergeRefusedError(
                    "system-table",
                    f"it reads {table!r}, which says something of one file: leave that out",
                )

    def _has(self, table: str, column: str) -> bool:
        found = self._connection.execute(_COLUMNS, (table,)).fetchall()
        return column in (folded(name) for name, _, _ in found)

    def _extract(self, table: str, key: str, encoding: str) -> Extract:
        types = _types(self._connection, table)
        names = ", ".join(
            double_quoted(name or "") for name, *_, generated in types if not generated
        )
        name = double_quoted(table)
        return Extract(
            table, key, f"SELECT {names} FROM {name}", names, types=types, database=encoding
        )

    def _copy(self, source: Any, extracts: Sequence[Extract], count: Callable[[int], None]) -> None:
        """Copy rows from a shard's file, all of one snapshot."""
        memory = self._memory
        memory.execute(f"ATTACH ? AS {_SOURCE}", (source.uri,))
        try:
            memory.execute("BEGIN")
            for extract in extracts:
                with _one_row_each(extract.table):
                    self._copy_table(extract, count)
            memory.execute("COMMIT")
        finally:
            with suppress(sqlite3.Error):
                if memory.in_transaction:
                    memory.execute("ROLLBACK")
                memory.execute(f"DETACH {_SOURCE}")

    def _copy_table(self, extract: Extract, count: Callable[[int], None]) -> None:
        memory, table = self._memory, double_quoted(extract.table)
        insert = (
            f"INSERT INTO main.{table} ({extract.into}) SELECT {extract.into} "
            f"FROM {_SOURCE}.{table}"
        )
        held = _held(memory)
        for where, bounds in _parts(memory, table, extract):
            memory.execute(insert + where, bounds)
            before, held = held, _held(memory)
            count(held - before)


def estimate(connection: Any, query: Query, extracts: Sequence[Extract]) -> list[Estimate]:
    """Return about how much each of the extracts has in a file; whatever the query.

    Raises
    ------
    SchemaMismatchError
        A sharded table is not what it is on the shard that gathers.
    """
    try:
        connection.execute("BEGIN")
        for one in extracts:
            if one.key:
                _compare(connection, one)
        return [_size(connection, one) for one in extracts]
    finally:
        connection.execute("ROLLBACK")


def _is_virtual(sql: str | None) -> bool:
    return sql is not None and sql.upper().startswith("CREATE VIRTUAL")


def _types(connection: Any, table: str) -> tuple[tuple[str | None, ...], ...]:
    """Return each column's name, type, collation, and whether it is computed."""
    columns = connection.execute(_COLUMNS, (table,)).fetchall()
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
    found, table = _types(connection, extract.table), extract.table
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
    if not connection.execute(_COLUMNS, (extract.table,)).fetchall():
        return Estimate()  # a reference table that only the shard that gathers has
    ((rows,),) = connection.execute(f"SELECT count(*) FROM {table}")
    names = [double_quoted(name or "") for name, *_, generated in extract.types if not generated]
    widths = " + ".join(f"coalesce(length(CAST({name} AS BLOB)), 0) + 1" for name in names)
    sample = f"SELECT {widths} AS w FROM {table} LIMIT {_SAMPLE}"
    ((width,),) = connection.execute(f"SELECT avg(w) FROM ({sample})")
    return Estimate(rows, int(rows * ((width or 0) + 8)))


def _held(memory: Any) -> int:
    ((pages,),) = memory.execute("PRAGMA main.page_count").fetchall()
    ((size,),) = memory.execute("PRAGMA main.page_size").fetchall()
    return int(pages * size)


def _parts(memory: Any, table: str, extract: Extract) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Cut a table into ranges of its rowid, where it has one that can be named."""
    taken = {folded(name or "") for name, *_ in extract.types}
    rowid = next((name for name in ("rowid", "_rowid_", "oid") if name not in taken), None)
    try:
        memory.execute(f"SELECT {rowid} FROM {_SOURCE}.{table} LIMIT 0").fetchall()
    except sqlite3.OperationalError:
        rowid = None  # it is WITHOUT ROWID
    if rowid is None:
        yield "", ()
        return
    low, most = _ROWIDS
    last = f"SELECT {rowid} FROM {_SOURCE}.{table} WHERE {rowid} >= ? ORDER BY 1 LIMIT 1 OFFSET ?"
    while True:
        found = memory.execute(last, (low, _ROWS - 1)).fetchall()
        high = found[0][0] if found else most
        yield f" WHERE {rowid} BETWEEN ? AND ?", (low, high)
        if high == most:
            return
        low = high + 1


@contextmanager
def _one_row_each(table: str) -> Iterator[None]:
    """Refuse rows that one database could not hold together."""
    problem = ""
    try:
        yield
    except sqlite3.IntegrityError as error:
        problem = str(error)
    if problem:
        raise MergeRefusedError(
            "constraint",
            f"one database could not hold the rows that the shards have of {table!r} ({problem}): "
            "is its shard key the right one, and is it sharded?",
        )
