"""The PostgreSQL driver: psycopg2 connects, and its socket is read from directly.

Encrypted sessions are read through libpq. Each answer is read in one read-only transaction that
pins what decides how values are written and compared. ``SET LOCAL`` inside the transaction, not at
connect, so that it also holds behind a transaction-pooling proxy.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import psycopg2

from dask_shardsql.config import Settings
from dask_shardsql.engine.drivers import postgresql_copy, postgresql_slices
from dask_shardsql.engine.drivers.base import Columns, OnBatch, Query
from dask_shardsql.engine.drivers.gathering import Estimate, Extract, Split
from dask_shardsql.engine.drivers.narrowing import Aggregate, Narrowing
from dask_shardsql.engine.drivers.postgresql_catalog import NO_JIT
from dask_shardsql.engine.drivers.postgresql_columns import asking, compare_tables
from dask_shardsql.engine.drivers.postgresql_copy import end_transaction, in_own_text, runner
from dask_shardsql.engine.drivers.postgresql_gather import PostgreSQLGathering
from dask_shardsql.engine.drivers.postgresql_libpq import Session
from dask_shardsql.engine.drivers.postgresql_merge import PostgreSQLMerging
from dask_shardsql.engine.drivers.postgresql_params import merge_params, read_strings_as_standard
from dask_shardsql.engine.drivers.postgresql_script import Script, begin, pins
from dask_shardsql.engine.drivers.postgresql_slices import BEGIN_HOLDING, planned
from dask_shardsql.engine.drivers.postgresql_stage import PostgreSQLStage
from dask_shardsql.engine.drivers.postgresql_wire import ServerError
from dask_shardsql.engine.drivers.rows import double_quoted
from dask_shardsql.engine.drivers.slicing import Part, Slicing
from dask_shardsql.errors import ConnectionLostError, QueryError, ShardSQLError
from dask_shardsql.sql.predicates import postgresql, postgresql_term
from dask_shardsql.sql.statement import single_query
from dask_shardsql.topology import Server, ShardedTable

__all__ = ["PostgreSQLDriver"]

_PLACEHOLDER = re.compile(r"%(\(\w+\))?s")
_CONNECT_DEFAULTS = {
    "keepalives": 1,
    "keepalives_idle": 30,
    "keepalives_interval": 10,
    "keepalives_count": 3,
    "tcp_user_timeout": 60_000,
}
_TEXTS = ("text", "char")


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
        if connection.closed or connection.spoiled or connection.get_transaction_status() != 0:
            return False
        return not connection.poller.poll(0)

    def describe(self, connection: Any, query: Query) -> Columns:
        """Describe the query inside a transaction of its own."""
        if (stage := self.stage(connection, query)) is not None:
            try:
                return stage.describe()
            finally:
                stage.abandon()
        with connection.cursor() as cursor:
            try:
                return postgresql_copy.describe(cursor, query)[0].columns
            finally:
                end_transaction(connection, "ROLLBACK")

    def read(
        self,
        connection: Any,
        query: Query,
        resolve: Callable[[Columns], Columns],
        on_batch: OnBatch,
        script: Script | None = None,
    ) -> None:
        """Describe and read the answer in one transaction."""
        if (stage := self.stage(connection, query, script)) is not None:
            try:
                stage.request(resolve(stage.describe()), on_batch)
                stage.advance(whole=True)
            finally:
                stage.abandon()
            return
        try:
            with connection.cursor() as cursor:
                postgresql_copy.read(cursor, query, resolve, on_batch, _refused, script)
        except BaseException:
            end_transaction(connection, "ROLLBACK")
            raise
        end_transaction(connection, "COMMIT")

    def script(self, connection: Any, query: Query) -> Script:
        """Return what is to be sent: parameters are quoted alike for all connections."""
        with connection.cursor() as cursor:
            return Script(begin(query), merge_params(cursor, query))

    def stage(
        self,
        connection: Any,
        query: Query,
        script: Script | None = None,
        *,
        at_once: bool = False,
    ) -> PostgreSQLStage | None:
        """Begin to read in steps; None on a connection whose socket is not to be used directly."""
        if not connection.is_plain:
            return None
        script = script or self.script(connection, query)
        read_strings_as_standard(connection)
        return PostgreSQLStage(connection, query, script, _refused, at_once=at_once)

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
        sent = getattr(getattr(error, "cursor", None), "query", None)
        lost = isinstance(error, psycopg2.OperationalError | psycopg2.InterfaceError)
        # libpq tells no SQLSTATE of a server that went away in the middle of a COPY
        if sqlstate is None and (lost or type(error) is psycopg2.DatabaseError):
            return ConnectionLostError(_how_it_was_lost(message, sent))
        position = getattr(diag, "statement_position", None)
        said = ServerError(
            message,
            sqlstate,
            int(position) if position else None,
            getattr(diag, "message_detail", None),
            getattr(diag, "message_hint", None),
        )
        if isinstance(sent, bytes):
            return _refused(*in_own_text(said, sent.decode("utf-8", "replace")))
        return _refused(said, None)

    def measure(self, connection: Any, query: Query, slicing: Slicing) -> int:
        """Return about how many bytes there are to read, from the catalog or the planner."""
        with connection.cursor() as cursor:
            text = merge_params(cursor, query)
            read_strings_as_standard(connection)
            try:
                cursor.execute("; ".join(begin(query)))
                return postgresql_slices.measure(runner(cursor), text, slicing)
            finally:
                end_transaction(connection, "ROLLBACK")

    def hold(
        self, connection: Any, query: Query, slicing: Slicing, slices: int
    ) -> tuple[str, tuple[str, ...]]:
        """Export a snapshot, in a transaction that stays open."""
        with connection.cursor() as cursor:
            text = merge_params(cursor, query)
            read_strings_as_standard(connection)

            def describe(sql: str) -> int:
                cursor.execute(postgresql_copy.describing(sql))
                return int(cursor.description[0].type_code)

            cursor.execute("; ".join((BEGIN_HOLDING, *pins(query))))
            return postgresql_slices.hold(runner(cursor), describe, text, slicing, slices)

    def cut(self, query: Query, part: Part, snapshot: str, bounds: tuple[str, ...]) -> Query:
        """Return the query of one slice."""
        return postgresql_slices.cut(query, part, snapshot, bounds)

    def narrow(self, query: Query, narrowing: Narrowing) -> Query:
        """Return the query for less of its answer."""

        computed = {one.name: one for one in narrowing.computed}

        def column(name: str) -> str:
            if (one := computed.get(name)) is not None:
                return f"{postgresql_term(one.of, column)}::{one.type_name}"
            return f"dask_shardsql.{double_quoted(name)}"

        def selected(name: str) -> str:
            return column(name) + (f" AS {double_quoted(name)}" if name in computed else "")

        keys = [
            f'{column(one.name)} COLLATE "C"' if one.kind in _TEXTS else column(one.name)
            for one in narrowing.groups
        ]
        columns = ", ".join(
            [f"{key} AS key_{n}" for n, key in enumerate(keys)]
            + [_aggregated(one, column) for one in narrowing.aggregates]
            or map(selected, narrowing.columns)
        )
        where = " AND ".join(postgresql(node, column) for node in narrowing.where)
        before, behind = f"SELECT {columns} FROM (\n", "\n) AS dask_shardsql"
        behind += f" WHERE {where}" if where else ""
        # to PostgreSQL, blanks at the end of a char are nothing
        lengths = [f"octet_length({column(f.name)})" for f in narrowing.groups if f.kind == "char"]
        behind += f" GROUP BY {', '.join([*keys, *lengths])}" if keys else ""
        behind += f" LIMIT {narrowing.limit}" if narrowing.limit is not None else ""
        if narrowing.is_counted:
            before, behind = f"SELECT count(*) AS count FROM ({before}", f"{behind}) AS counted"
        if query.params is not None:
            before, behind = before.replace("%", "%%"), behind.replace("%", "%%")
        return replace(query, sql=before + query.sql + behind)

    def gathering(
        self, connection: Any, query: Query, sharded: Sequence[ShardedTable]
    ) -> PostgreSQLGathering:
        """Begin to gather for a query."""
        plain = replace(query, find_not_null=False)  # a temporary table guarantees nothing

        def read(script: Script, resolve: Callable[[Columns], Columns], on_batch: OnBatch) -> None:
            self.read(connection, plain, resolve, on_batch, script)

        return PostgreSQLGathering(connection, plain, sharded, read)

    def merging(self, connection: Any, query: Query, split: Split, shard: str) -> PostgreSQLMerging:
        """Begin to merge what is answered to a query in parts."""
        plain = replace(query, find_not_null=False)

        def read(script: Script, resolve: Callable[[Columns], Columns], on_batch: OnBatch) -> None:
            self.read(connection, plain, resolve, on_batch, script)

        return PostgreSQLMerging(connection, plain, split, shard, read)

    def estimate(
        self, connection: Any, query: Query, extracts: Sequence[Extract]
    ) -> list[Estimate]:
        """Return about how much each of them has, as the planner sees it."""
        with connection.cursor() as cursor:
            try:
                settings = next((one.settings for one in extracts if one.settings), ())
                cursor.execute("; ".join((*begin(query), NO_JIT, *settings)))
                compare_tables(asking(cursor), [one for one in extracts if one.full_name])
                run = runner(cursor)
                return [planned(run, one.select) if one.select else Estimate() for one in extracts]
            finally:
                end_transaction(connection, "ROLLBACK")

    def planned(self, connection: Any, query: Query) -> Estimate:
        """Return how much a query gives, as the planner sees it."""
        with connection.cursor() as cursor:
            try:
                cursor.execute("; ".join(begin(query)))
                return planned(runner(cursor), merge_params(cursor, query))
            finally:
                end_transaction(connection, "ROLLBACK")

    def snapshot_is_lost(self, connection: Any, snapshot: str) -> bool:
        """Whether the snapshot cannot be imported."""
        with connection.cursor() as cursor:
            try:
                cursor.execute("; ".join(begin(Query("", snapshot=snapshot))))
            except psycopg2.Error:
                return True
            finally:
                end_transaction(connection, "ROLLBACK")
        return False


def _aggregated(one: Aggregate, column: Callable[[str], str]) -> str:
    """Return what makes a value of a column."""
    value = postgresql_term(one.of, column)
    if one.function == "sum" and one.type_name == "float8":
        value += "::float8"
    if one.function in ("min", "max") and one.type_name == "text":
        value += ' COLLATE "C"'
    return f"{one.function}({value})::{one.type_name} AS {double_quoted(one.name)}"


def _how_it_was_lost(message: str, sent: Any) -> str:
    """Return what libpq says of it, without what psycopg2 says where libpq says nothing."""
    said = (line.strip() for line in message.splitlines())
    nothing = ("invalid socket", "no message from the libpq")
    known = " ".join(line for line in said if not line.endswith(nothing))
    if "PGRES_COPY" in message or (isinstance(sent, bytes) and sent.startswith(b"COPY ")):
        lost = "the connection was lost while rows were copied"
        return f"{lost}: {known}" if known else lost
    return known or "the connection was lost"


def _refused(error: ServerError, sql: str | None) -> ShardSQLError:
    """Return our error for a server's; its position is in the user's own text."""
    message, sqlstate, position, detail, hint = error
    if hint is None and sqlstate == "25006":
        hint = "shards are only read: leave out what changes or locks rows"
    if hint is None and sql and position:
        placeholders = _PLACEHOLDER.finditer(sql)
        if any(found.start() < position <= found.end() for found in placeholders):
            hint = "%s and %(name)s stand for values only where these are given, as params"
    if sqlstate is not None and (sqlstate[:2] in ("08", "28") or sqlstate[:4] == "57P0"):
        return ConnectionLostError(message, sqlstate=sqlstate)
    return QueryError(
        message, sqlstate=sqlstate, position=position, detail=detail, hint=hint, query=sql
    )
