"""Reading over libpq, where a session's bytes are encrypted: described, then sent by COPY.

A COPY is what libpq hands over in the binary form without a structure of its own for every row.
The kernel takes it from libpq (`postgresql_libpq.py`); where the functions for that are hidden
within psycopg2, it comes through psycopg2's ``copy_expert``.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import psycopg2
import pyarrow as pa

from dask_shardsql.engine.cancel import is_cancelled
from dask_shardsql.engine.copy_arena import Kinds
from dask_shardsql.engine.copy_binary import CopyDecoder, CopyFile
from dask_shardsql.engine.copy_kernel.layout import Status
from dask_shardsql.engine.drivers.base import Columns, OnBatch, Query
from dask_shardsql.engine.drivers.postgresql_libpq import CopyOut
from dask_shardsql.engine.drivers.postgresql_params import merge_params, read_strings_as_standard
from dask_shardsql.engine.drivers.postgresql_script import RESET, Script, begin
from dask_shardsql.engine.drivers.postgresql_types import (
    Described,
    columns_of,
    fields_of_cursor,
    makes_nulls,
)
from dask_shardsql.engine.drivers.postgresql_wire import (
    NO_COLUMNS,
    PATIENCE,
    SILENT,
    ServerError,
    other_encoding,
)
from dask_shardsql.errors import ColumnError, ConnectionLostError, ShardSQLError

__all__ = ["describe", "describing", "end_transaction", "in_own_text", "read", "runner", "viewing"]

_DESCRIBE, _DESCRIBE_END = "SELECT * FROM (\n", "\n) AS dask_shardsql LIMIT 0"
_COPY_START, _COPY_END = "(\n", "\n)"
_VIEW_START, _VIEW_END = "CREATE TEMPORARY VIEW dask_shardsql_query AS\n", "\n"
_BUFFER_BYTES = 64 << 10  # what stays in a core's cache until it is decoded


def describe(cursor: Any, query: Query, script: Script | None = None) -> tuple[Described, str]:
    """Begin the transaction of a query, describe it, and return its text as well."""
    script = script or Script(begin(query), merge_params(cursor, query))
    text = script.sql
    read_strings_as_standard(cursor.connection)
    cursor.execute("; ".join((*script.begin, describing(text))))
    if not cursor.description:
        raise ColumnError(NO_COLUMNS)
    find_not_null = query.find_not_null and not makes_nulls(text)
    fields = fields_of_cursor(cursor.description)
    return columns_of(fields, runner(cursor), find_not_null), text


def read(
    cursor: Any,
    query: Query,
    resolve: Callable[[Columns], Columns],
    on_batch: OnBatch,
    refuse: Callable[[ServerError, str], ShardSQLError],
    script: Script | None = None,
) -> None:
    """Begin the transaction of a query, and read its rows.

    Whatever stops the COPY but the server's own refusal closes the connection.
    """
    described, text = describe(cursor, query, script)
    columns = resolve(described.columns)
    kinds = described.kinds(columns)
    session = cursor.connection

    def take_batch(batch: pa.RecordBatch) -> None:
        if (other := other_encoding(session.get_parameter_status("client_encoding"))) is not None:
            raise refuse(other, text)
        on_batch(batch)

    decoder = CopyDecoder(columns, kinds, query.unrepresentable, take_batch, query.batch_bytes)
    copy = _copy_of(text, kinds)
    take = _take_from_libpq if CopyOut.is_possible() else _take_from_psycopg2
    try:
        failure = take(cursor, copy, decoder, query)
        if failure is None:
            failure = other_encoding(session.get_parameter_status("client_encoding"))
        if failure is None:
            decoder.finish()
    except psycopg2.Error:
        raise
    except BaseException:  # do not wait for rows that nobody wants
        session.request_cancel()
        with suppress(psycopg2.Error):
            session.close()
        raise
    if failure is not None:
        raise refuse(*in_own_text(failure, copy))


def _take_from_libpq(
    cursor: Any, copy: str, decoder: CopyDecoder, query: Query
) -> ServerError | None:
    patience = PATIENCE

    def wait() -> None:
        """See whether there is still something to wait for."""
        nonlocal patience
        if is_cancelled(query.owner) and (patience := patience - 1) < 0:
            raise ConnectionLostError(SILENT)

    source = CopyOut(cursor.connection, wait)
    if (failure := source.start(copy)) is not None:
        return failure
    try:
        while decoder.receive_copy(source.address) == Status.WAITING:
            wait()  # and Python's own signals come through here
    finally:
        source.free(decoder.take_held())
    return source.finish(decoder.rows)


def _take_from_psycopg2(cursor: Any, copy: str, decoder: CopyDecoder, query: Query) -> None:
    with io.BufferedWriter(CopyFile(decoder), _BUFFER_BYTES) as buffer:
        cursor.copy_expert(copy, buffer)


def end_transaction(connection: Any, command: str) -> None:
    """End the transaction and reset the session; close it if it cannot even do that."""
    if connection.closed:
        return
    try:
        # a cursor of its own, as an error of another one may still be to be told
        with connection.cursor() as cursor:
            cursor.execute(command + RESET)
    except psycopg2.Error:
        with suppress(psycopg2.Error):
            connection.close()


def describing(text: str) -> str:
    """Return what describes a query without running it."""
    return _DESCRIBE + text + _DESCRIBE_END


def viewing(text: str) -> str:
    """Return what makes the temporary view ``dask_shardsql_query`` of a query."""
    return _VIEW_START + text + _VIEW_END


def runner(cursor: Any) -> Callable[[str], Sequence[Sequence[Any]]]:
    """Return what runs a query with a cursor and returns its rows."""

    def run(sql: str) -> Sequence[Sequence[Any]]:
        cursor.execute(sql)
        rows: Sequence[Sequence[Any]] = cursor.fetchall()
        return rows

    return run


def in_own_text(error: ServerError, sent: str) -> tuple[ServerError, str]:
    """Return an error with its position in the user's own text, and that."""
    prefix, end = (_DESCRIBE, _DESCRIBE_END) if _DESCRIBE in sent else (_COPY_START, _COPY_END)
    if sent.startswith(_VIEW_START):
        prefix, end = _VIEW_START, _VIEW_END
    if prefix not in sent:
        return error, sent
    # libpq's messages quote a text up to its end, which is ours
    error = error._replace(message=error.message.replace(end, ""))
    start = sent.index(prefix) + len(prefix)
    text = sent[start : sent.rfind(end)]
    if error.position is None:
        return error, text
    position = error.position - start
    if position > len(text) and error.sqlstate == "42601":
        return error._replace(message="syntax error at end of input", position=len(text) + 1), text
    within = 0 < position <= len(text) + 1
    return error._replace(position=position if within else None), text


def _copy_of(text: str, kinds: Sequence[Kinds]) -> str:
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
