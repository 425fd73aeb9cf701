"""Reading one query in steps, each of which has been asked for before its answer is waited for.

So one thread can send to every shard before it reads from any. Everything goes over the socket
(see `postgresql_wire.py` for why that is sound): what describes the query and begins its
transaction, then the COPY together with what ends the transaction and resets the session.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress

import psycopg2

from dask_shardsql.engine.cancel import is_cancelled
from dask_shardsql.engine.copy_arena import Kinds
from dask_shardsql.engine.copy_binary import CopyDecoder
from dask_shardsql.engine.copy_kernel.layout import Status
from dask_shardsql.engine.drivers.base import Columns, OnBatch, Query
from dask_shardsql.engine.drivers.postgresql_types import (
    Described,
    columns_of,
    described_by,
    fields_of,
    makes_nulls,
)
from dask_shardsql.engine.drivers.postgresql_wire import (
    ServerError,
    Session,
    parse_error,
    parse_row,
    receive_some,
    send_query,
    tell_what_is_wrong,
)
from dask_shardsql.errors import ColumnError, ConnectionLostError, ShardSQLError

__all__ = ["PostgreSQLStage"]

_WAIT_MILLISECONDS = 200
_AGAIN_SECONDS = 0.05
_LAST_SECONDS = 1.0  # that a server has to stop what it was asked to stop
_PATIENCE = 5  # how often to wait for a server when the query was cancelled
_SILENT = "the server does not answer any more"
_IS_READY = b"Z\0\0\0\5"  # ReadyForQuery, but for the byte that tells of the transaction
_GOES_BY = ("client_encoding", "standard_conforming_strings")  # libpq, to quote parameters
_ROW, _FIELDS, _ERROR, _PARAMETER, _READY, _COPY_OUT, _DATA, _COPY_DONE = b"DTESZHdc"
_MAY_BE_LONG = b"DTENA"
_MOST_SHORT = 30_000  # bytes of another message: what is longer is not PostgreSQL's protocol
_NOT_FOR_US = b"CINA"  # completions, an empty query, notices, notifications


class PostgreSQLStage:
    """One query on one plain session: see :class:`dask_shardsql.engine.drivers.base.Stage`.

    Parameters
    ----------
    session : Session
        Idle and plain.
    query : Query
        The query.
    describe : str
        What begins the transaction and describes the query.
    copy : callable
        Makes the COPY of the columns' kinds.
    commit, roll_back : str
        What ends the transaction and resets the session.
    refuse : callable
        Makes an exception of what the server says, and of the text it says it of.
    """

    def __init__(
        self,
        session: Session,
        query: Query,
        describe: str,
        copy: Callable[[Sequence[Kinds]], str],
        commit: str,
        roll_back: str,
        refuse: Callable[[ServerError, str], ShardSQLError],
    ) -> None:
        self._session = session
        self._descriptor = session.fileno()
        self._query = query
        self._copy, self._commit, self._roll_back = copy, commit, roll_back
        self._refuse = refuse
        self._received = self._fields = b""
        self._changed: dict[str, str] = {}
        self._described: Described | None = None
        self._decoder: CopyDecoder | None = None
        self._failure: ServerError | None = None
        self._copying = False
        self._answers = 0  # that are still to come
        self._is_over = self._is_large = False
        self._sent = describe
        # until all is over: whatever interrupts us in between, nobody is lent such a session
        session.spoiled = True
        send_query(self._descriptor, describe)
        self._answers = 1

    def describe(self) -> Columns:
        """Wait for the description; where the server refuses the query, the session is clean."""
        description, _ = self._answer()
        find_not_null = self._query.find_not_null and not makes_nulls(self._sent)
        described = None if find_not_null else described_by(description)
        if described is None:
            described = columns_of(fields_of(description), self._rows, find_not_null)
        if not described.columns:
            raise ColumnError("the query returns no columns")
        self._described = described
        return described.columns

    def request(self, columns: Columns, on_batch: OnBatch) -> None:
        """Ask for the rows, as these columns."""
        described = self._described
        if described is None:
            raise RuntimeError("a query must be described before its rows are asked for")
        kinds = described.kinds(columns)
        unrepresentable, size = self._query.unrepresentable, self._query.batch_bytes
        self._decoder = CopyDecoder(columns, kinds, unrepresentable, on_batch, size)
        self._sent = self._copy(kinds)
        send_query(self._descriptor, self._sent, self._commit)
        self._answers = 2

    def fileno(self) -> int:
        """Return the socket's descriptor, to be polled."""
        return self._descriptor

    @property
    def is_large(self) -> bool:
        """Whether there are more rows than a few."""
        return self._is_large

    def advance(self, *, whole: bool) -> bool:
        """Take what has come; return whether that was all.

        Parameters
        ----------
        whole : bool
            Whether to wait for the rest, however long it is. Otherwise not more is read than the
            first few hundred KiB of rows.
        """
        decoder = self._decoder
        if decoder is None:
            raise RuntimeError("no rows were asked for")
        patience = _PATIENCE
        while True:
            if self._copying and self._received[:1] in (b"", b"d"):
                if self._received:
                    decoder.put_back(self._received)
                    self._received = b""
                wait = _WAIT_MILLISECONDS if whole else 0
                status = decoder.receive(self._descriptor, wait, small=not whole)
                if status in (Status.WAITING, Status.FULL):
                    self._is_large = status == Status.FULL
                    if not whole:
                        return False
                    if status == Status.FULL or not is_cancelled(self._query.query_id):
                        patience = _PATIENCE
                    elif (patience := patience - 1) < 0:
                        raise ConnectionLostError(_SILENT)
                    continue  # WAITING: Python's own signals come through here
                if status != Status.MESSAGE:
                    tell_what_is_wrong(self._descriptor)
                self._received = decoder.take_rest()
            if self._read_messages([]) == _READY:
                self._answers -= 1
                if self._answers == 0:
                    break
                if self._failure is None:
                    decoder.finish()
        self._settle()
        if self._failure is not None:
            raise self._refuse(self._failure, self._sent)
        return True

    def abandon(self) -> None:
        """End the transaction, or close the session where an answer is still on its way."""
        if self._is_over or self._session.closed:
            return  # nor touch a descriptor that may be another connection's by now
        try:
            with suppress(ShardSQLError):
                if self._answers == 0:
                    send_query(self._descriptor, self._roll_back)
                    self._answers = 1
                    self._read_messages([], time.monotonic() + _LAST_SECONDS)
                    self._answers = 0
                    self._settle()
                else:
                    self._stop()
        finally:
            if not self._is_over:
                with suppress(psycopg2.Error):
                    self._session.close()

    def _stop(self) -> None:
        """Let the server stop what it runs, as one that sends nothing does not see a closed socket.

        A request to cancel that comes before what it is to stop does nothing: so it is repeated.
        """
        deadline = time.monotonic() + _LAST_SECONDS
        rest = self._received or (self._decoder.take_rest() if self._decoder is not None else b"")
        # what is received ends so; enough to know, as the session is closed in any case
        while rest[-6:-1] != _IS_READY and time.monotonic() < deadline:
            self._session.request_cancel()
            with suppress(TimeoutError):
                soon = time.monotonic() + _AGAIN_SECONDS
                while rest[-6:-1] != _IS_READY:
                    rest = rest[-6:] + receive_some(self._descriptor, min(soon, deadline))

    def _answer(self) -> tuple[bytes, list[tuple[str | None, ...]]]:
        """Return the description and the rows of the query that was sent, or raise."""
        rows: list[tuple[str | None, ...]] = []
        self._fields = b""
        self._read_messages(rows)
        self._answers -= 1
        if self._failure is not None:
            raise self._refuse(self._failure, self._sent)
        return self._fields, rows

    def _rows(self, sql: str) -> list[tuple[str | None, ...]]:
        """Run a query of our own in the transaction."""
        send_query(self._descriptor, sql)
        self._answers = 1
        return self._answer()[1]

    def _read_messages(
        self, rows: list[tuple[str | None, ...]], deadline: float | None = None
    ) -> int:
        """Read up to the next ReadyForQuery, CopyOutResponse or CopyData, and return which it is.

        A CopyData is left where it is, for the decoder.
        """
        received, at = self._received, 0
        while True:
            end = at + 5
            if len(received) >= end:
                length = int.from_bytes(received[at + 1 : end], "big", signed=True)
                if received[at] == _DATA and self._copying:
                    self._received = received[at:]
                    return _DATA
                if length < 4 or (length > _MOST_SHORT and received[at] not in _MAY_BE_LONG):
                    raise ConnectionLostError("the server sent a message of an impossible length")
                end = at + 1 + length
            if len(received) < end:
                received, at = received[at:] + self._receive_more(deadline), 0
                continue
            kind = received[at]
            if kind == _ROW:
                rows.append(parse_row(received[at + 5 : end]))
            elif kind == _FIELDS:
                self._fields = received[at + 5 : end]
            elif kind == _ERROR:
                self._failure = self._failure or parse_error(received[at + 5 : end])
            elif kind == _PARAMETER:
                self._note(received[at + 5 : end])
            elif kind in (_READY, _COPY_OUT):
                self._received, self._copying = received[end:], kind == _COPY_OUT
                return kind
            elif kind == _COPY_DONE:
                self._copying = False
            elif kind not in _NOT_FOR_US:
                raise ConnectionLostError(f"the server answered with a message {chr(kind)!r}")
            at = end

    def _receive_more(self, deadline: float | None) -> bytes:
        try:
            while True:
                with suppress(TimeoutError):
                    return receive_some(
                        self._descriptor, deadline or time.monotonic() + _LAST_SECONDS
                    )
                if deadline is not None or is_cancelled(self._query.query_id):
                    raise ConnectionLostError(_SILENT)
        except ConnectionLostError:
            if self._failure is None:
                raise
            raise self._refuse(self._failure, self._sent) from None  # why it ended the session

    def _note(self, body: bytes) -> None:
        """Take note of a parameter of the session that has changed."""
        name, value = [*body.decode("utf-8", "replace").split("\0"), ""][:2]
        self._changed[name] = value
        if name == "client_encoding" and value != "UTF8":
            self._failure = self._failure or ServerError(
                f"the query sets client_encoding to {value}, in which its own texts may then come: "
                "take that out of it",
                "0A000",
            )

    def _settle(self) -> None:
        """The session is idle again: look whether libpq's picture of it is still true."""
        if self._received:
            raise ConnectionLostError("the server sent more than it was asked for")
        self._is_over = True
        known = {name: self._session.get_parameter_status(name) for name in _GOES_BY}
        self._session.spoiled = any(self._changed.get(n, was) != was for n, was in known.items())
