"""The SQLite driver: files opened read-only with the standard library's ``sqlite3``.

==================================================  ============================================
Declared type (any case), tried in this order       Arrow
==================================================  ============================================
NUMERIC(p, s), DECIMAL(p, s), DEC(p, s)             decimal128(p, s); decimal256 for p > 38
BOOLEAN, BOOL                                       bool: 0 and 1
DATE, DATETIME, TIME, TIMESTAMP (WITH TIME ZONE)    string: SQLite has no such type
contains INT                                        int64
contains CHAR, CLOB or TEXT                         string
contains BLOB                                       binary
contains REAL, FLOA or DOUB                         float64
NUMERIC, DECIMAL, DEC                               float64
any other, none, and CAST(... AS NUMERIC)           none: name one with ``types=``, or CAST
==================================================  ============================================

The INT, CHAR, BLOB and REAL lines are SQLite's own rules of affinity ("Datatypes In SQLite",
section 3.1). A column of the answer has the declared type of the table's column it comes from,
through views and subqueries, else the affinity of its CAST. Any other expression (``count(*)``,
``a + b``) has no type before a row is read. A column declared without a type has none before SQLite
3.41, which began to call it a BLOB. Any SQLite column may hold any value: one that does
not fit (a text in an INTEGER column, 1.5 in an integer one) is an
:class:`~dask_shardsql.UnrepresentableValueError`, or NULL where that was asked for.

With ``types=`` an ISO text can be read as ``date32``, ``timestamp`` or ``time64``, and a number
or its text as a decimal.
"""

from __future__ import annotations

import datetime as dt
import os
import re
import sqlite3
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any
from urllib.parse import quote, urlencode
from uuid import UUID

import pyarrow as pa

from dask_shardsql.config import Settings
from dask_shardsql.engine.drivers.base import Columns, OnBatch, Query
from dask_shardsql.engine.drivers.gathering import Gathering, GathersOnly
from dask_shardsql.engine.drivers.rows import double_quoted, plain_params, read_rows
from dask_shardsql.engine.drivers.sqlite_gather import SQLiteGathering
from dask_shardsql.engine.drivers.sqlite_tables import estimate
from dask_shardsql.errors import (
    ConfigurationError,
    ConnectionLostError,
    ParameterError,
    QueryError,
    ShardSQLError,
    StatementError,
)
from dask_shardsql.sql.statement import sendable
from dask_shardsql.sql.types import Column, arrow_type_of
from dask_shardsql.topology import Server, ShardedTable

__all__ = ["SQLiteDriver"]

_URI_KEYWORDS = ("immutable", "nolock", "vfs")
_QUERY_WORDS = ("select", "values", "with")

# SQLite's tokens that can hide a semicolon or a placeholder: its comments do not nest, and an
# unclosed one ends with the text ("SQL Comment Syntax"); "$" may be inside of a word.
_TOKEN = re.compile(
    r"""
      (?P<line>--[^\n]*)
    | (?P<block>/\*.*?(?:\*/|\Z))
    | (?P<quoted>'(?:[^']|'')*(?:'|\Z) | "(?:[^"]|"")*(?:"|\Z) | `(?:[^`]|``)*(?:`|\Z))
    | (?P<bracket>\[[^\]]*(?:\]|\Z))
    | (?P<parameter>\?[0-9]* | [:@$](?:[\w$]|::)+(?:\([^)\s]*\))?)
    | (?P<end>;)
    | (?P<blank>\s+)
    | (?P<word>[\w$]+)
    | (?P<other>.)
    """,
    re.VERBOSE | re.DOTALL,
)
_DECIMAL = re.compile(r"(?:NUMERIC|DECIMAL|DEC) ?\( ?(\d+) ?(?:, ?(\d+) ?)?\)")
_AS_TEXT = re.compile(r"DATE|DATETIME|TIMESTAMPTZ|TIME(STAMP)?( WITH(OUT)? TIME ZONE)?")
_AFFINITIES = (
    (("INT",), pa.int64()),
    (("CHAR", "CLOB", "TEXT"), pa.string()),
    (("BLOB",), pa.binary()),
    (("REAL", "FLOA", "DOUB"), pa.float64()),
)
_NAMES = ("dask_shardsql_declared", "dask_shardsql_affinities")
_TYPES = (
    f"SELECT d.name, d.type, a.type FROM pragma_table_info('{_NAMES[0]}') d "
    f"JOIN pragma_table_info('{_NAMES[1]}') a ON a.cid = d.cid ORDER BY d.cid"
)
_LOST = ("SQLITE_IOERR", "SQLITE_CANTOPEN", "SQLITE_NOTADB", "SQLITE_CORRUPT")


class SQLiteDriver(GathersOnly):
    """Read SQLite files: see :class:`dask_shardsql.engine.drivers.base.Driver`.

    Placeholders are SQLite's: ``?`` for a sequence of parameters, ``:name`` for a mapping.
    Parameters may be NULL, integers of 64 bits, floats, texts and bytes; dates, times and UUIDs
    are sent as their ISO text.

    Notes
    -----
    Keywords of a shard: ``database`` (the file), ``timeout`` (how long to wait for a lock, in
    seconds; by default the setting ``connect-timeout``), and SQLite's URI parameters
    ``immutable``, ``nolock`` and ``vfs``. The file is opened with ``mode=ro`` and ``PRAGMA
    query_only``: no query can write to it, and a missing file is never created. The description
    is made from an empty temporary table and view, in the temporary database of the connection
    alone. An idle connection to a file that was replaced since is not used again.
    """

    name = "sqlite"

    def check(self, sql: str) -> str:
        """Return the text of the one query in `sql`."""
        return _single_query(sql)

    def quote_identifier(self, name: str) -> str:
        """Return `name` in double quotes."""
        return double_quoted(name)

    def connect(self, server: Server, password: str | None, settings: Settings) -> Any:
        """Open the file read-only, in autocommit mode."""
        keywords: dict[str, Any] = dict(server.keywords)
        path = str(keywords.pop("database", ""))
        if not path or path.startswith(":memory:"):
            raise ConfigurationError(
                "a sqlite shard needs database = the path of its file; a database in memory is "
                "seen by one connection only"
            )
        if password is not None or server.secrets:
            raise ConfigurationError(
                f"the sqlite shard {path!r} has a password or another secret, and a SQLite file "
                "has none: remove it from the topology"
            )
        timeout = _seconds(keywords.pop("timeout", settings.connect_timeout), path)
        unknown = sorted(set(keywords) - set(_URI_KEYWORDS))
        if unknown:
            raise ConfigurationError(
                f"the sqlite shard {path!r} has unknown keys: {', '.join(unknown)}; known are "
                f"database, timeout, {', '.join(_URI_KEYWORDS)}"
            )
        options = {"mode": "ro"} | {
            k: str(int(v) if v in (0, 1) else v) for k, v in keywords.items()
        }
        uri = f"file://{quote(os.path.abspath(path))}?{urlencode(options)}"
        connection = sqlite3.connect(
            uri,
            uri=True,
            timeout=timeout,
            isolation_level=None,
            check_same_thread=False,
            factory=_Connection,
        )
        try:
            connection.path, connection.file, connection.uri = path, _file(path), uri
            connection.execute("PRAGMA query_only = ON")
            connection.execute("PRAGMA schema_version")  # the file is not read before
        except BaseException:
            connection.close()
            raise
        return connection

    def is_usable(self, connection: Any) -> bool:
        """Whether the connection is open, outside of a transaction, and its file still there."""
        try:
            return not connection.in_transaction and connection.file == _file(connection.path)
        except sqlite3.Error:
            return False

    def describe(self, connection: Any, query: Query) -> Columns:
        """Describe the query inside a transaction of its own."""
        try:
            connection.execute("BEGIN")
            return self._describe(connection, query)
        finally:
            self._end(connection)

    def read(
        self,
        connection: Any,
        query: Query,
        resolve: Callable[[Columns], Columns],
        on_batch: OnBatch,
    ) -> None:
        """Describe and read the answer in one transaction, which is one snapshot."""
        try:
            connection.execute("BEGIN")
            columns = resolve(self._describe(connection, query))
            batches: list[pa.RecordBatch] = []
            try:
                self._fetch(connection, query, columns, batches.append)
            except sqlite3.OperationalError as error:
                if "decode to UTF-8" not in str(error):
                    raise
                batches.clear()
                connection.text_factory = _any_text  # again and slower, to name the value
                self._fetch(connection, query, columns, batches.append)
            for batch in batches:
                on_batch(batch)
        finally:
            self._end(connection)

    def cancel(self, connection: Any) -> None:
        """Interrupt what the connection runs."""
        for one in (connection.beside, connection):
            with suppress(sqlite3.Error, AttributeError):
                one.interrupt()

    def close(self, connection: Any) -> None:
        """Close the connection."""
        with suppress(sqlite3.Error):
            connection.close()

    def translate(self, error: Exception, query: Query | None = None) -> ShardSQLError | None:
        """Map sqlite3's exceptions by SQLite's result codes."""
        if not isinstance(error, sqlite3.Error | sqlite3.Warning):
            return None
        message = str(error) or repr(error)
        code = str(getattr(error, "sqlite_errorname", None) or "")
        sql = query.sql if query else None
        if code.startswith(_LOST) or "closed database" in message:
            return ConnectionLostError(message)
        if not code and re.search(r"\bbind", message):
            return _parameter_error(message, sql)
        if code == "SQLITE_INTERRUPT":
            return QueryError(message, sqlstate="57014", query=sql)
        hint = None
        if code.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
            hint = "another process writes to the file: try again, or raise the shard's timeout"
        return QueryError(message, hint=hint, query=sql)

    def gathering(
        self, connection: Any, query: Query, sharded: Sequence[ShardedTable]
    ) -> Gathering:
        """Begin to gather for a query."""
        return SQLiteGathering(connection, query, sharded, _execute, self.read)

    estimate = staticmethod(estimate)

    def _describe(self, connection: Any, query: Query) -> Columns:
        """Let SQLite name and type the columns of an empty temporary view and table.

        The view has declared types but takes no parameters; the table has affinities, also those
        of casts. The inner LIMIT keeps SQLite from running any part of the query.
        """
        declared, affinities = _NAMES
        connection.execute("PRAGMA query_only = OFF")
        connection.execute("SAVEPOINT dask_shardsql")
        connection.execute(f"CREATE TEMP VIEW {declared} AS\n{_without_parameters(query.sql)}")
        empty = f"SELECT * FROM (SELECT * FROM (\n{query.sql}\n) LIMIT -1) LIMIT 0"
        _execute(connection, f"CREATE TEMP TABLE {affinities} AS {empty}", query).close()
        found = connection.execute(_TYPES).fetchall()
        connection.execute("ROLLBACK TO dask_shardsql")
        connection.execute("RELEASE dask_shardsql")
        connection.execute("PRAGMA query_only = ON")
        names = [name for name, _, _ in found]
        if any(re.fullmatch(r"(.*):\d+", name, re.DOTALL) for name in names):
            # so does SQLite tell columns of one name apart; the query itself has them as they are
            cursor = _execute(connection, query.sql, query)
            names = [entry[0] for entry in cursor.description]
            cursor.close()
        types = [
            " ".join((declared or affinity).upper().split()) for _, declared, affinity in found
        ]
        return tuple(
            Column(name, type_name, _arrow_type(type_name))
            for name, type_name in zip(names, types, strict=True)
        )

    def _fetch(self, connection: Any, query: Query, columns: Columns, on_batch: OnBatch) -> None:
        cursor = _execute(connection, query.sql, query)
        try:
            read_rows(cursor.fetchmany, columns, query.unrepresentable, on_batch)
        finally:
            cursor.close()

    def _end(self, connection: Any) -> None:
        """End the transaction; close the connection if it cannot even do that."""
        try:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            connection.execute("PRAGMA query_only = ON")
            connection.text_factory = str
        except sqlite3.Error:
            self.close(connection)


class _Connection(sqlite3.Connection):
    """A connection that knows which file it opened, and which other one works for it."""

    path: str
    uri: str
    file: tuple[int, int] | None
    beside: sqlite3.Connection | None = None


def _execute(connection: Any, sql: str, query: Query) -> Any:
    if query.params is None:
        return connection.execute(sql)
    problem = ""
    try:
        return connection.execute(sql, plain_params(query.params, _bindable_value))
    except (OverflowError, UnicodeError, ValueError) as error:
        problem = str(error)
    raise _parameter_error(problem, query.sql)


def _parameter_error(problem: str, sql: str | None) -> ParameterError:
    return ParameterError(
        f"the parameters do not fit the query: {problem}",
        query=sql,
        hint="write one ? for each value of a sequence, or :name for each key of a mapping; values "
        "are None, 64-bit integers, floats, texts, bytes, dates, times or UUIDs",
    )


def _bindable_value(value: Any) -> Any:
    if isinstance(value, dt.datetime):
        return value.isoformat(" ")
    if isinstance(value, dt.date | dt.time):
        return value.isoformat()
    return str(value) if isinstance(value, UUID) else value


def _arrow_type(type_name: str) -> pa.DataType:
    """Return the Arrow type of a declared type in capitals; the null type where there is none."""
    if decimal := _DECIMAL.fullmatch(type_name):
        return arrow_type_of("numeric", int(decimal[1]), int(decimal[2] or 0))
    base = re.sub(r" ?\(.*?\)", "", type_name)
    if base in ("BOOLEAN", "BOOL"):
        return pa.bool_()
    if _AS_TEXT.fullmatch(base):
        return pa.string()
    for parts, kind in _AFFINITIES:
        if any(part in base for part in parts):
            return kind
    return pa.float64() if base in ("NUMERIC", "DECIMAL", "DEC") else pa.null()


def _single_query(sql: str) -> str:
    """Find the one statement of a text by SQLite's lexical rules."""
    sql = sendable(sql)
    first = end = None
    for token in _TOKEN.finditer(sql):
        if token.lastgroup in ("line", "block", "blank"):
            continue
        if token.lastgroup == "end":
            end = token.start() if end is None else end
            continue
        if end is not None:
            raise StatementError(
                "only one statement can be run, and a second one starts here",
                position=token.start() + 1,
                query=sql,
                hint="run the statements one by one",
            )
        first = first or token.group()
    if first is None:
        raise StatementError("the query is empty", query=sql)
    if first.lower() not in _QUERY_WORDS:
        raise StatementError(
            f"only a query can be read from the shards, and this text starts with {first[:30]!r}",
            query=sql,
            hint="write SELECT, VALUES or WITH ... SELECT",
        )
    return sql if end is None else sql[:end]


def _without_parameters(sql: str) -> str:
    tokens = _TOKEN.finditer(sql)
    return "".join(" NULL " if t.lastgroup == "parameter" else t.group() for t in tokens)


def _any_text(value: bytes) -> str:
    return value.decode("utf-8", "surrogateescape")


def _file(path: str) -> tuple[int, int] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _seconds(value: Any, path: str) -> float:
    try:
        return float(value)
    except ValueError:
        pass
    raise ConfigurationError(f"the sqlite shard {path!r} has timeout {value!r}: it must be seconds")
