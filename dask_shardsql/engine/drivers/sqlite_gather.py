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
from dask_shardsql.engine.drivers.gathering import Extract, Survey, TargetFailedError
from dask_shardsql.engine.drivers.rows import double_quoted, folded
from dask_shardsql.engine.drivers.sqlite_tables import COLUMNS, types_of
from dask_shardsql.errors import MergeRefusedError
from dask_shardsql.topology import ShardedTable

__all__ = ["SQLiteGathering"]

_SOURCE = "dask_shardsql_source"
_ROWS = 16_384
_ROWIDS = (-(2**63), 2**63 - 1)
_SCHEMA = "SELECT type, name, tbl_name, sql FROM sqlite_master"
_OPENED = "SELECT rootpage, tbl_name FROM sqlite_master UNION ALL SELECT 1, 'sqlite_master'"
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
        reads, functions, views = self._found_by(self._connection)
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
        definitions = {name: sql or "" for kind, name, _, sql in self._schema if kind == "view"}
        defined = tuple(
            Extract(name, "", "", "", database=encoding, definition=definitions[name])
            for name in sorted(views & set(definitions))
        )
        text = self._query.sql
        return Survey(text, self._extracts, text, others=others, tables=defined)

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
        reads, _, _ = self._found_by(memory)
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

    def _found_by(self, connection: Any) -> tuple[set[tuple[str, str]], set[str], set[str]]:
        """Return the columns, with their tables, that the query reads, functions, and views."""
        reads: set[tuple[str, str]] = set()
        functions: set[str] = set()
        views: set[str] = set()

        def note(
            action: int, one: str | None, other: str | None, _: str | None, view: str | None
        ) -> int:
            views.add(view or "")
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
            defined = [sql or "" for kind, _, _, sql in self._schema if kind == "view"]
            texts = folded("\n".join([text, *defined]))
            of_modules = {name for _, name, _, sql in self._schema if _is_virtual(sql)}
            reads |= {(name, "") for name in {*of_modules, "dbstat"} if folded(name) in texts}
        return reads, functions, views

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
        found = self._connection.execute(COLUMNS, (table,)).fetchall()
        return column in (folded(name) for name, _, _ in found)

    def _extract(self, table: str, key: str, encoding: str) -> Extract:
        types = types_of(self._connection, table)
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


def _is_virtual(sql: str | None) -> bool:
    return sql is not None and sql.upper().startswith("CREATE VIRTUAL")


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
