"""The PostgreSQL driver: psycopg2, with COPY for the rows.

Each answer is read in one read-only transaction that pins what decides how values are written
and compared. ``SET LOCAL`` inside the transaction, not at connect, so that it also holds behind
a transaction-pooling proxy.
"""

from __future__ import annotations

import io
import select
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any
from uuid import UUID

import psycopg2
import psycopg2.extensions as pgx

from dask_shardsql.config import Settings
from dask_shardsql.engine.copy_arena import Kinds
from dask_shardsql.engine.copy_binary import CopyDecoder, CopyFile
from dask_shardsql.engine.drivers import postgresql_slices
from dask_shardsql.engine.drivers.base import Columns, OnBatch, Query
from dask_shardsql.engine.drivers.postgresql_slices import BEGIN_HOLDING, SLICE_SETTINGS
from dask_shardsql.engine.drivers.postgresql_stage import PostgreSQLStage
from dask_shardsql.engine.drivers.postgresql_types import (
    Described,
    columns_of,
    fields_of_cursor,
    makes_nulls,
)
from dask_shardsql.engine.drivers.postgresql_wire import ServerError, Session
from dask_shardsql.engine.drivers.rows import double_quoted, plain_value
from dask_shardsql.engine.drivers.slicing import Part, Slicing
from dask_shardsql.errors import (
    ColumnError,
    ConnectionLostError,
    ParameterError,
    QueryError,
    ShardSQLError,
)
from dask_shardsql.sql.statement import single_query
from dask_shardsql.topology import Server

__all__ = ["PostgreSQLDriver"]

_CONNECT_DEFAULTS = {
    "keepalives": 1,
    "keepalives_idle": 30,
    "keepalives_interval": 10,
    "keepalives_count": 3,
    "tcp_user_timeout": 60_000,
}
_PINS = (
    "SET LOCAL TimeZone = 'UTC'; SET LOCAL DateStyle = 'ISO, MDY'; "
    "SET LOCAL IntervalStyle = 'postgres'; SET LOCAL extra_float_digits = 3; "
    "SET LOCAL bytea_output = 'hex'; SET LOCAL application_name = '{name}'; "
)
# A query can set parameters or take locks for its session: the next one must not find them.
_RESET = (
    "; RESET SESSION AUTHORIZATION; RESET ROLE; RESET ALL; "
    "SELECT pg_catalog.pg_advisory_unlock_all()"
)
_DESCRIBE = "SELECT * FROM (\n"
_DESCRIBE_END = "\n) AS dask_shardsql LIMIT 0"
_COPY_START, _COPY_END = "(\n", "\n)"
_BUFFER_BYTES = 1 << 20


class PostgreSQLDriver:
    """Read PostgreSQL shards: see :class:`dask_shardsql.engine.drivers.base.Driver`."""

    name = "postgresql"

    def check(self, sql: str) -> str:
        """Return the text of the one query in `sql`."""
        return single_query(sql)

    def quote_identifier(self, name: str) -> str:
        """Return `name` in double quotes."""
        return double_quoted(name)

    def connect(self, server: Server, password: str | None, settings: Settings) -> Any:
        """Open a connection in autocommit mode, client encoding UTF8."""
        keywords: dict[str, Any] = dict(_CONNECT_DEFAULTS)
        keywords["connect_timeout"] = max(2, round(settings.connect_timeout))
        keywords["application_name"] = "dask_shardsql"
        keywords |= dict(server.keywords)
        keywords |= {key: secret.reveal() for key, secret in server.secrets}
        if password is not None:
            keywords["password"] = password
        connection = psycopg2.connect(
            **keywords, client_encoding="UTF8", connection_factory=Session
        )
        connection.autocommit = True
        connection.prepare()
        return connection

    def is_usable(self, connection: Any) -> bool:
        """Whether the connection is open, idle, and the server has said nothing on it."""
        if connection.closed or connection.spoiled or connection.info.transaction_status != 0:
            return False
        poller = select.poll()
        poller.register(connection.fileno(), select.POLLIN)
        return not poller.poll(0)

    def describe(self, connection: Any, query: Query) -> Columns:
        """Describe the query inside a transaction of its own."""
        if (stage := self.stage(connection, query)) is not None:
            try:
                return stage.describe()
            finally:
                stage.abandon()
        with connection.cursor() as cursor:
            text = self._merge_params(cursor, query)
            try:
                return self._begin_and_describe(cursor, query, text).columns
            finally:
                self._end(connection, "ROLLBACK")

    def read(
        self,
        connection: Any,
        query: Query,
        resolve: Callable[[Columns], Columns],
        on_batch: OnBatch,
    ) -> None:
        """Describe and COPY the answer in one transaction."""
        if (stage := self.stage(connection, query)) is not None:
            try:
                stage.request(resolve(stage.describe()), on_batch)
                stage.advance(whole=True)
            finally:
                stage.abandon()
            return
        try:
            with connection.cursor() as cursor:
                text = self._merge_params(cursor, query)
                described = self._begin_and_describe(cursor, query, text)
                columns = resolve(described.columns)
                kinds = described.kinds(columns)
                unrepresentable, size = query.unrepresentable, query.batch_bytes
                decoder = CopyDecoder(columns, kinds, unrepresentable, on_batch, size)
                self._copy(cursor, _copy_text(text, kinds), decoder)
        except BaseException:
            self._end(connection, "ROLLBACK")
            raise
        self._end(connection, "COMMIT")

    def stage(self, connection: Any, query: Query) -> PostgreSQLStage | None:
        """Begin to read in steps; None on a connection whose socket is not to be used directly."""
        if not connection.is_plain:
            return None
        with connection.cursor() as cursor:
            text = self._merge_params(cursor, query)
        return PostgreSQLStage(
            connection,
            query,
            _begin(query) + _DESCRIBE + text + _DESCRIBE_END,
            lambda kinds: _copy_text(text, kinds),
            "COMMIT" + _RESET,
            "ROLLBACK" + _RESET,
            _refused,
        )

    def _copy(self, cursor: Any, copy: str, decoder: CopyDecoder) -> None:
        """Run a COPY; whatever stops it but the server's own refusal closes the connection."""
        try:
            with io.BufferedWriter(CopyFile(decoder), _BUFFER_BYTES) as buffer:
                cursor.copy_expert(copy, buffer)
            decoder.finish()
        except psycopg2.Error:
            raise
        except BaseException:  # do not wait for rows that nobody wants
            self.close(cursor.connection)
            raise

    def cancel(self, connection: Any) -> None:
        """Send a cancel request to the backend."""
        connection.request_cancel()

    def close(self, connection: Any) -> None:
        """Close the connection."""
        with suppress(psycopg2.Error):
            connection.close()

    def translate(self, error: Exception, query: Query | None = None) -> ShardSQLError | None:
        """Map psycopg2's exceptions by their SQLSTATE class."""
        if not isinstance(error, psycopg2.Error | psycopg2.Warning):
            return None
        sqlstate = getattr(error, "pgcode", None)
        diag = getattr(error, "diag", None)
        message = getattr(diag, "message_primary", None) or str(error).strip() or repr(error)
        lost = isinstance(error, psycopg2.OperationalError | psycopg2.InterfaceError)
        # libpq tells no SQLSTATE of a server that went away in the middle of a COPY
        if sqlstate is None and (lost or type(error) is psycopg2.DatabaseError):
            return ConnectionLostError(message)
        position = getattr(diag, "statement_position", None)
        sent = getattr(getattr(error, "cursor", None), "query", None)
        said = ServerError(
            message,
            sqlstate,
            int(position) if position else None,
            getattr(diag, "message_detail", None),
            getattr(diag, "message_hint", None),
        )
        return _refused(said, sent.decode("utf-8", "replace") if isinstance(sent, bytes) else None)

    def _begin_and_describe(self, cursor: Any, query: Query, text: str) -> Described:
        cursor.execute(_begin(query) + _DESCRIBE + text + _DESCRIBE_END)
        description = cursor.description or ()
        if not description:
            raise ColumnError("the query returns no columns")

        def run(sql: str) -> Sequence[Sequence[Any]]:
            cursor.execute(sql)
            rows: Sequence[Sequence[Any]] = cursor.fetchall()
            return rows

        find_not_null = query.find_not_null and not makes_nulls(text)
        return columns_of(fields_of_cursor(description), run, find_not_null)

    def _merge_params(self, cursor: Any, query: Query) -> str:
        """Put the parameters into the text, quoted by libpq for this connection."""
        if cursor.connection.get_parameter_status("standard_conforming_strings") == "off":
            # in a round trip of its own: a text is lexed whole before any of it runs, and
            # single_query reads strings as the standard does
            cursor.execute("SET standard_conforming_strings = on")
        if query.params is None:
            return query.sql
        problem, text = "", b""
        try:
            text = cursor.mogrify(query.sql, _adaptable(query.params))
        except (IndexError, TypeError) as error:
            problem = f"the parameters do not fit the placeholders: {error}"
        except KeyError as error:
            problem = f"the query has a placeholder %({error.args[0]})s and no such parameter"
        except psycopg2.ProgrammingError as error:
            problem = f"a parameter has no SQL form: {error}"
        except (ValueError, UnicodeError) as error:
            problem = f"the parameters cannot be sent: {error}"
        if problem:
            raise ParameterError(
                problem,
                query=query.sql,
                hint="write one %s for each value of a sequence, or %(name)s for each key of a "
                "mapping, and %% for a percent sign",
            )
        # a placeholder inside quotes or a comment lets its value end them: look at the whole again
        return single_query(text.decode("utf-8"))

    def _end(self, connection: Any, command: str) -> None:
        """End the transaction; close the connection if it cannot even do that."""
        if connection.closed:
            return
        try:
            with connection.cursor() as cursor:
                cursor.execute(command + _RESET)
        except psycopg2.Error:
            self.close(connection)

    def measure(self, connection: Any, query: Query, slicing: Slicing) -> int:
        """Return about how many bytes there are to read, from the catalog or the planner."""
        with connection.cursor() as cursor:
            text = self._merge_params(cursor, query)
            try:
                cursor.execute(_begin(query))
                return postgresql_slices.measure(_runner(cursor), text, slicing)
            finally:
                self._end(connection, "ROLLBACK")

    def hold(
        self, connection: Any, query: Query, slicing: Slicing, slices: int
    ) -> tuple[str, tuple[str, ...]]:
        """Export a snapshot, in a transaction that stays open."""
        with connection.cursor() as cursor:
            text = self._merge_params(cursor, query)

            def describe(sql: str) -> int:
                cursor.execute(_DESCRIBE + sql + _DESCRIBE_END)
                return int(cursor.description[0].type_code)

            cursor.execute(BEGIN_HOLDING + _begin(query).removeprefix("BEGIN READ ONLY; "))
            return postgresql_slices.hold(_runner(cursor), describe, text, slicing, slices)

    def cut(self, query: Query, part: Part, snapshot: str, bounds: tuple[str, ...]) -> Query:
        """Return the query of one slice."""
        return postgresql_slices.cut(query, part, snapshot, bounds)

    def snapshot_is_lost(self, connection: Any, snapshot: str) -> bool:
        """Whether the snapshot cannot be imported."""
        with connection.cursor() as cursor:
            try:
                cursor.execute(_begin(Query("", snapshot=snapshot)))
            except psycopg2.Error:
                return True
            finally:
                self._end(connection, "ROLLBACK")
        return False


def _runner(cursor: Any) -> Callable[[str], Sequence[Sequence[Any]]]:
    def run(sql: str) -> Sequence[Sequence[Any]]:
        cursor.execute(sql)
        rows: Sequence[Sequence[Any]] = cursor.fetchall()
        return rows

    return run


def _begin(query: Query) -> str:
    """Return what begins the transaction that a query is read in."""
    begin = "BEGIN READ ONLY; "
    if query.snapshot is not None:
        snapshot = query.snapshot.replace("'", "''")
        begin = "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY; "
        begin += f"SET TRANSACTION SNAPSHOT '{snapshot}'; {SLICE_SETTINGS}"
    name = f"dask_shardsql:{query.query_id}".replace("'", "")[:63]
    return begin + _PINS.format(name=name)


def _copy_text(text: str, kinds: Sequence[Kinds]) -> str:
    """Return the COPY of a query; columns that are of no kind are sent in their text form.

    That is what their output function writes, which a cast to text is not for every type, and which
    ``format`` calls. It makes an empty text of a NULL, and IS NULL holds for a row of NULLs too.
    """
    if not all(kinds):
        names = [f"c{number}" for number in range(len(kinds))]
        chosen = [
            name
            if kind
            else f"CASE WHEN pg_catalog.num_nulls({name}) = 0 "
            f"THEN pg_catalog.format('%s', {name}) END"
            for name, kind in zip(names, kinds, strict=True)
        ]
        whole = f"SELECT {', '.join(chosen)} FROM {_COPY_START}{text}{_COPY_END}"
        return f"COPY ({whole} AS dask_shardsql ({', '.join(names)})) TO STDOUT (FORMAT binary)"
    return f"COPY {_COPY_START}{text}{_COPY_END} TO STDOUT (FORMAT binary)"


def _refused(error: ServerError, sent: str | None) -> ShardSQLError:
    """Return our error for a server's, its position that in the user's own text."""
    message, sqlstate, position, detail, hint = error
    if sqlstate is not None and (sqlstate[:2] in ("08", "28") or sqlstate[:4] == "57P0"):
        return ConnectionLostError(message, sqlstate=sqlstate)
    start = -1
    if sent is not None:
        for prefix, end in ((_DESCRIBE, _DESCRIBE_END), (_COPY_START, _COPY_END)):
            if (start := sent.find(prefix)) >= 0:
                start += len(prefix)
                sent = sent[start : sent.rfind(end)]
                break
    if position is not None and start >= 0 and sent is not None:
        position -= start
        if position > len(sent) and sqlstate == "42601":
            message, position = "syntax error at end of input", len(sent) + 1
        if not 0 < position <= len(sent) + 1:
            position = None
    return QueryError(
        message, sqlstate=sqlstate, position=position, detail=detail, hint=hint, query=sent
    )


def _adaptable(params: Any) -> Any:
    """Return the parameters with NumPy, pandas, Arrow and UUID values as psycopg2 takes them."""
    if isinstance(params, Mapping):
        return {key: _adapt(value) for key, value in params.items()}
    if isinstance(params, str | bytes) or not hasattr(params, "__iter__"):
        raise ParameterError(
            f"params must be a sequence or a mapping of values, not {type(params).__name__}"
        )
    return tuple(_adapt(value) for value in params)


def _adapt(value: Any) -> Any:
    import numpy as np
    import pandas as pd

    if isinstance(value, np.ndarray | pd.Series | pd.Index):
        return [_adapt(item) for item in value]
    if isinstance(value, UUID):
        return pgx.AsIs(f"'{value}'::uuid")
    if type(value) in (list, tuple):
        return type(value)(_adapt(item) for item in value)
    return plain_value(value)
