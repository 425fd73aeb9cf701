"""Any database with a Python module of PEP 249: MySQL, Oracle, SQL Server through ODBC, ...

=========================================  =====================================================
PEP 249 type object of the column          Arrow
=========================================  =====================================================
BINARY                                     binary
STRING                                     string
DATETIME                                   timestamp[us]; a value with a zone or a time alone does
                                           not fit it
NUMBER with precision p and scale s        decimal128(p, s); int64 for a scale of 0 and p <= 18
NUMBER without a precision, ROWID, none    none: name one with ``types=``
=========================================  =====================================================

PEP 249 says no more than that of a column, before a row is read. A value that does not fit its
column's Arrow type is an :class:`~dask_shardsql.UnrepresentableValueError`, or NULL where that was
asked for.
"""

from __future__ import annotations

import datetime as dt
import importlib
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from decimal import Decimal
from types import NoneType
from typing import Any
from uuid import UUID

import pyarrow as pa

from dask_shardsql.config import Settings
from dask_shardsql.engine.drivers.base import Columns, OnBatch, Query
from dask_shardsql.engine.drivers.rows import double_quoted, plain_params, read_rows
from dask_shardsql.errors import (
    ColumnError,
    ConfigurationError,
    ConnectionLostError,
    ParameterError,
    QueryError,
    ShardSQLError,
)
from dask_shardsql.sql.statement import single_query
from dask_shardsql.sql.types import Column, arrow_type_of
from dask_shardsql.topology import Server

__all__ = ["DBAPIDriver"]

_LOST = ("08", "28")
_INT64_DIGITS = 18
_TYPES = {"BINARY": pa.binary(), "STRING": pa.string(), "DATETIME": pa.timestamp("us")}
_PLACEHOLDERS = {
    "qmark": (r"\?", "?"),
    "numeric": (r":\d+", ":1"),
    "named": (r"(?<!:):([A-Za-z_]\w*)", ":name"),
    "format": (r"%s", "%s"),
    "pyformat": (r"%\(([^)]*)\)s|%s", "%s or %(name)s"),
}
# What PEP 249 modules have an SQL form for.
_ADAPTABLE = (
    *(NoneType, int, float, str, bytes, bytearray, memoryview, Decimal, UUID),
    *(dt.date, dt.time, dt.timedelta, list, tuple, dict),
)
# What must not be searched for placeholders: strings, identifiers and comments.
_OPAQUE = re.compile(r"'(?:[^']|'')*'|\"(?:[^\"]|\"\")*\"|`[^`]*`|--[^\n]*|/\*.*?\*/", re.DOTALL)


@dataclass
class _Session:
    """A connection and the module it is of."""

    module: Any
    connection: Any
    closed: bool = False


class DBAPIDriver:
    """Read through a PEP 249 module: see :class:`dask_shardsql.engine.drivers.base.Driver`.

    Placeholders are the module's own: its ``paramstyle`` says which.

    Notes
    -----
    Keywords of a shard: ``module`` (what to import: ``mysql.connector``, ``pyodbc``); every other
    one goes to its ``connect()``, passwords as ``password``. Modules that tie a connection to a
    thread need to be told not to (``check_same_thread = false`` for ``sqlite3``).

    PEP 249 has no read-only transaction, so nothing keeps a query with side effects from having
    them: each answer is read in a transaction that is rolled back. Use a login that may only
    read. Names are quoted in double quotes, as in standard SQL (MySQL: ``ANSI_QUOTES``). A
    query is described by ``SELECT * FROM (<query>) dask_shardsql WHERE 1=0``.
    """

    name = "dbapi"

    def check(self, sql: str) -> str:
        """Return the text of the one query in `sql`, by the lexical rules of standard SQL."""
        return single_query(sql)

    def quote_identifier(self, name: str) -> str:
        """Return `name` in double quotes."""
        return double_quoted(name)

    def connect(self, server: Server, password: str | None, settings: Settings) -> Any:
        """Import the module and call its ``connect()``."""
        keywords: dict[str, Any] = dict(server.keywords)
        module = _module(str(keywords.pop("module", "")))
        keywords |= {key: secret.reveal() for key, secret in server.secrets}
        if password is not None:
            keywords["password"] = password
        problem = ""
        try:
            return _Session(module, module.connect(**keywords))
        except TypeError as error:
            problem = str(error)
        raise ConfigurationError(
            f"{module.__name__}.connect() does not take the shard's keywords "
            f"({', '.join(sorted(keywords))}): {problem}"
        )

    def is_usable(self, connection: Any) -> bool:
        """Whether the connection was not closed; PEP 249 can tell no more without a round trip."""
        try:
            return not connection.closed and not getattr(connection.connection, "closed", False)
        except Exception:  # noqa: BLE001 - a module's own property
            return False

    def describe(self, connection: Any, query: Query) -> Columns:
        """Run the query without rows, in a transaction that is rolled back."""
        with _cursor(connection) as cursor:
            return _describe(cursor, connection.module, query)

    def read(
        self,
        connection: Any,
        query: Query,
        resolve: Callable[[Columns], Columns],
        on_batch: OnBatch,
    ) -> None:
        """Describe and read the answer in one transaction that is rolled back."""
        with _cursor(connection) as cursor:
            columns = resolve(_describe(cursor, connection.module, query))
            _execute(cursor, connection.module, query.sql, query)
            names = [entry[0] for entry in cursor.description or ()]
            if len(set(names)) < len(names) or len(names) != len(columns):
                raise ColumnError(
                    f"the query returns the columns {', '.join(names)}, and was described with "
                    f"{', '.join(column.name for column in columns)}. Give each its own name",
                    tuple(names),
                )
            read_rows(cursor.fetchmany, columns, query.unrepresentable, on_batch)

    def cancel(self, connection: Any) -> None:
        """Call the connection's ``cancel()`` or ``interrupt()``, if it has one."""
        for name in ("cancel", "interrupt"):
            if (stop := getattr(connection.connection, name, None)) is not None:
                with suppress(Exception):
                    stop()
                return

    def close(self, connection: Any) -> None:
        """Close the connection."""
        connection.closed = True
        with suppress(Exception):
            connection.connection.close()

    def translate(self, error: Exception, query: Query | None = None) -> ShardSQLError | None:
        """Map the exceptions of any PEP 249 module that this process has loaded."""
        if not _is_module_error(error):
            return None
        message = str(error).strip() or repr(error)
        sqlstate = _sqlstate(error)
        if sqlstate is not None and (sqlstate[:2] in _LOST or sqlstate[:4] == "57P0"):
            return ConnectionLostError(message, sqlstate=sqlstate)
        return QueryError(message, sqlstate=sqlstate, query=query.sql if query else None)


def _module(name: str) -> Any:
    if not name:
        raise ConfigurationError(
            'a dbapi shard needs module = the name of a PEP 249 module ("mysql.connector")'
        )
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        raise ConfigurationError(
            f"cannot import {name!r} here: {error}. Install it in every process that reads the "
            "shards"
        ) from error
    missing = [a for a in ("connect", "paramstyle", "threadsafety") if not hasattr(module, a)]
    if missing:
        raise ConfigurationError(
            f"{name!r} is not a module of PEP 249: it has no {', '.join(missing)}"
        )
    if module.threadsafety < 1:
        raise ConfigurationError(f"the module {name!r} cannot be used by threads (threadsafety 0)")
    return module


@contextmanager
def _cursor(session: _Session) -> Iterator[Any]:
    """Lend a cursor; afterwards the transaction is rolled back, or the connection closed.

    PEP 249 does not tell a lost connection from a refused query. An error after which not even a
    rollback works is taken for a lost connection.
    """
    lost = ""
    try:
        cursor = session.connection.cursor()
        try:
            yield cursor
        finally:
            with suppress(Exception):
                cursor.close()
    except session.module.Error as error:
        if _rolled_back(session):
            raise
        lost = str(error).strip() or repr(error)
    except BaseException:
        _rolled_back(session)
        raise
    else:
        _rolled_back(session)
    if lost:
        raise ConnectionLostError(lost)


def _rolled_back(session: _Session) -> bool:
    try:
        session.connection.rollback()
    except (AttributeError, session.module.NotSupportedError):
        return True  # PEP 249: a database without transactions
    except Exception:  # noqa: BLE001 - whatever it is, the connection must not be used again
        session.closed = True
        with suppress(Exception):
            session.connection.close()
        return False
    return True


def _describe(cursor: Any, module: Any, query: Query) -> Columns:
    text = f"SELECT * FROM (\n{query.sql}\n) dask_shardsql WHERE 1=0"
    _execute(cursor, module, text, query)
    if not cursor.description:
        raise ColumnError("the query returns no columns")
    columns = tuple(_column(module, entry) for entry in cursor.description)
    cursor.fetchall()  # some modules refuse the next statement before
    return columns


def _column(module: Any, entry: Any) -> Column:
    name, code, precision, scale = entry[0], entry[1], entry[4], entry[5]
    for type_name, kind in _TYPES.items():
        if _same(getattr(module, type_name, None), code):
            return Column(name, type_name, kind)
    if not _same(getattr(module, "NUMBER", None), code):
        return Column(name, "", pa.null())
    if not precision or precision < 0 or precision > 76 or scale is None:
        return Column(name, "NUMBER", pa.null())
    kind = arrow_type_of("numeric", precision, scale)
    if scale == 0 and precision <= _INT64_DIGITS:
        kind = pa.int64()
    return Column(name, f"NUMBER({precision},{scale})", kind)


def _same(type_object: Any, code: Any) -> bool:
    """Whether a type object stands for a type code: PEP 249 lets it equal several of them."""
    return type_object is not None and code is not None and bool(type_object == code)


def _execute(cursor: Any, module: Any, sql: str, query: Query) -> None:
    if query.params is None:
        cursor.execute(sql)
        return
    params = plain_params(query.params)
    problem = ""
    try:
        cursor.execute(sql, params)
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:
        problem = str(error)
    except module.Error as error:
        if not _mismatch(query.sql, params, module.paramstyle):
            raise
        problem = str(error)
    if problem:
        _, example = _PLACEHOLDERS.get(module.paramstyle, ("", "?"))
        raise ParameterError(
            f"the parameters do not fit the query: {problem}",
            query=query.sql,
            hint=f"the module {module.__name__!r} has paramstyle {module.paramstyle!r}: write "
            f"{example}",
        )


def _mismatch(sql: str, params: Any, paramstyle: str) -> bool:
    """Whether the parameters cannot fit the placeholders: asked only when the module refuses."""
    values = list(params.values() if isinstance(params, Mapping) else params)
    if not all(isinstance(value, _ADAPTABLE) for value in values):
        return True
    if isinstance(params, Mapping) and paramstyle in ("qmark", "numeric"):
        paramstyle = "named"  # some modules take both
    pattern, _ = _PLACEHOLDERS.get(paramstyle, ("", ""))
    text = sql.replace("%%", "") if "format" in paramstyle else _OPAQUE.sub(" ", sql)
    found = [match.group(match.lastindex or 0) for match in re.finditer(pattern, text)]
    if isinstance(params, Mapping):
        return bool(set(found) - set(params))
    return len(set(found) if paramstyle == "numeric" else found) != len(params)


def _is_module_error(error: Exception) -> bool:
    """Whether a class of the exception is the Error or Warning of a loaded PEP 249 module."""
    classes = set(type(error).__mro__)
    for module in list(sys.modules.values()):
        names = getattr(module, "__dict__", {})
        if names.get("apilevel") and classes & {names.get("Error"), names.get("Warning")}:
            return True
    return False


def _sqlstate(error: Exception) -> str | None:
    first = error.args[0] if error.args else None
    for found in (getattr(error, "sqlstate", None), getattr(error, "pgcode", None), first):
        if isinstance(found, str) and re.fullmatch(r"[0-9A-Z]{5}", found):
            return found
    return None
