"""Reading one query in steps, each of which has been asked for before its answer is waited for.

So one thread can send to every shard before it reads from any. Everything goes over the socket
(see `postgresql_wire.py` for why that is sound): what begins the transaction and describes the
query, then what reads its rows, ends the transaction and resets the session. For a text whose
columns had all a binary form the last time, all of it is sent at once.

The rows come as DataRow messages, which cost a server less than COPY does: 3.99 s of its time
against 4.55 s for TPC-H lineitem at scale 1 (PostgreSQL 18), the client reading to nowhere.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from contextlib import suppress
from typing import NoReturn

import psycopg2

from dask_shardsql.engine.cancel import is_cancelled
from dask_shardsql.engine.copy_binary import CopyDecoder
from dask_shardsql.engine.copy_kernel.layout import Status
from dask_shardsql.engine.drivers.base import AskAgain, Columns, OnBatch, Query
from dask_shardsql.engine.drivers.postgresql_libpq import Session
from dask_shardsql.engine.drivers.postgresql_script import (
    KnownTexts,
    Request,
    Script,
    simple_query,
)
from dask_shardsql.engine.drivers.postgresql_types import (
    Described,
    columns_of,
    described_by,
    fields_of,
    makes_nulls,
)
from dask_shardsql.engine.drivers.postgresql_wire import (
    NO_COLUMNS,
    NO_PARAMETERS,
    PATIENCE,
    SILENT,
    ServerError,
    check_count,
    other_encoding,
    parse_error,
    parse_row,
    receive_some,
    send,
    tell_what_is_wrong,
)
from dask_shardsql.errors import ColumnError, ConnectionLostError, ShardSQLError

__all__ = ["PostgreSQLStage"]

_WAIT_MILLISECONDS = 200
_AGAIN_SECONDS = 0.05
_LAST_SECONDS = 1.0  # that a server has to stop what it was asked to stop
_GOES_BY = ("client_encoding", "standard_conforming_strings")  # libpq, to quote parameters
_ROW, _FIELDS, _PLACEHOLDERS, _ERROR, _PARAMETER, _READY, _BOUND, _COMPLETE = b"DTtESZ2C"
_IDLE = ord("I")  # no transaction
_MAY_BE_LONG = b"DTENA"
_MOST_SHORT = 30_000  # bytes of another message: what is longer is not PostgreSQL's protocol
_NOT_FOR_US = b"1nINA"  # parsed; no columns, an empty query, notices, notifications
_COMPLETIONS = re.compile(rb"(?:C\0\0\0.[A-Z0-9 ]+\0)+", re.DOTALL)

_known = KnownTexts()


class PostgreSQLStage:
    """One query on one plain session: see :class:`dask_shardsql.engine.drivers.base.Stage`.

    Parameters
    ----------
    session : Session
        Idle and plain.
    query : Query
        The query.
    script : Script
        What to send for it.
    refuse : callable
        Makes an exception of what the server says, and of the text it says it of.
    at_once : bool
        Whether the rows may be asked for with the description.
    """

    def __init__(
        self,
        session: Session,
        query: Query,
        script: Script,
        refuse: Callable[[ServerError, str], ShardSQLError],
        *,
        at_once: bool = False,
    ) -> None:
        self._session = session
        self._descriptor = session.fileno()
        self._query = query
        self._script = script
        self._refuse = refuse
        self._received = self._fields = self._description = b""
        self._changed: dict[str, str] = {}
        self._described: Described | None = None
        self._decoder: CopyDecoder | None = None
        self._failure: ServerError | None = None
        self._failed = ""  # what the server says that of
        self._is_parsed, self._is_known = True, query.sql in _known
        self._at_once = at_once and not query.find_not_null and self._is_known
        self._awaits_rows, self._takes_rows, self._has_ended = self._at_once, False, False
        self._status, self._is_reset = 0, True
        self._sent: list[str] = []
        self._answered = 0  # of these
        self._is_over = self._is_large = False
        # until all is over: whatever interrupts us in between, nobody is lent such a session
        session.spoiled = True
        self._send(script.all_at_once if self._at_once else script.description)

    def describe(self) -> Columns:
        """Wait for the description; where the server refuses the query, the session is clean."""
        try:
            description, _ = self._answer()
        except ShardSQLError:
            _known.note(self._query.sql, known=False)
            raise
        if not description:
            raise ColumnError(NO_COLUMNS)
        self._description = description
        find_not_null = self._query.find_not_null and not makes_nulls(self._script.sql)
        described = None if find_not_null else described_by(description)
        if described is None and self._at_once:
            self._ask_again()
        if described is None:
            described = columns_of(fields_of(description), self._rows, find_not_null)
            self._is_parsed = False
        if not described.columns:
            raise ColumnError(NO_COLUMNS)
        self._described = described
        return described.columns

    def request(self, columns: Columns, on_batch: OnBatch) -> None:
        """Ask for the rows, as these columns."""
        described = self._described
        if described is None:
            raise RuntimeError("a query must be described before its rows are asked for")
        kinds = described.kinds(columns)
        if self._at_once and not all(kinds):
            self._ask_again()
        unrepresentable, size = self._query.unrepresentable, self._query.batch_bytes
        self._decoder = CopyDecoder(columns, kinds, unrepresentable, on_batch, size)
        if not self._at_once:
            if columns == described.columns:  # else it is not the text that decides
                self._is_known = all(kinds) and not described.looked_up
            self._awaits_rows = True
            in_binary = [bool(kind) for kind in kinds]
            self._send(self._script.rows(in_binary, parse=not self._is_parsed))

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
        patience = PATIENCE
        while True:
            if self._takes_rows and self._received[:1] in (b"", b"D"):
                if self._received:
                    decoder.put_back(self._received)
                    self._received = b""
                wait = _WAIT_MILLISECONDS if whole else 0
                status = decoder.receive(self._descriptor, wait, small=not whole)
                if status in (Status.WAITING, Status.FULL):
                    self._is_large = status == Status.FULL
                    if not whole:
                        return False
                    if status == Status.FULL or not is_cancelled(self._query.owner):
                        patience = PATIENCE
                    elif (patience := patience - 1) < 0:
                        raise ConnectionLostError(SILENT)
                    continue  # WAITING: Python's own signals come through here
                if status != Status.MESSAGE:
                    tell_what_is_wrong(self._descriptor)
                self._received = decoder.take_rest()
            try:
                answer = self._read_messages(deadline=None if whole else 0.0)
            except TimeoutError:
                return False
            if answer == _READY:
                if self._is_answered:
                    break
                if self._failure is None:
                    decoder.deliver()
        self._settle()
        self._raise_failure()
        _known.note(self._query.sql, known=self._is_known)
        return True

    def abandon(self) -> None:
        """End the transaction, or close the session where an answer is still on its way."""
        if self._is_over or self._session.closed:
            return  # nor touch a descriptor that may be another connection's by now
        try:
            with suppress(ShardSQLError, TimeoutError):
                if self._is_answered:
                    self._send(self._script.roll_back)
                    self._read_messages(deadline=time.monotonic() + _LAST_SECONDS)
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
        rest = self._decoder.take_rest() if self._decoder is not None else b""
        while time.monotonic() < deadline:
            self._session.request_cancel()
            soon = min(time.monotonic() + _AGAIN_SECONDS, deadline)
            with suppress(TimeoutError):
                while not self._takes_rows:
                    self._read_messages(deadline=soon)
                    if self._is_answered:
                        return
                rest, self._received = rest + self._received, b""
                # among rows, what is received ends so: failed, or out of the transaction
                while rest[-6:] not in (b"Z\0\0\0\5E", b"Z\0\0\0\5I"):
                    rest = rest[-6:] + receive_some(self._descriptor, soon)
                return

    def _send(self, request: Request) -> None:
        send(self._descriptor, request.messages)
        self._sent += request.texts

    @property
    def _is_answered(self) -> bool:
        return self._answered == len(self._sent)

    def _answer(self) -> tuple[bytes, list[tuple[str | None, ...]]]:
        """Return the description and the rows of the query that was sent, or raise."""
        rows: list[tuple[str | None, ...]] = []
        self._fields = b""
        while self._read_messages(rows) == _READY and not self._is_answered:
            pass  # up to the last answer, or to the rows that were asked for at once
        if self._at_once and self._is_answered:
            self._settle()  # the transaction has ended: nothing but a failure keeps rows from it
        self._raise_failure()
        return b"" if self._at_once and self._is_answered else self._fields, rows

    def _rows(self, sql: str) -> list[tuple[str | None, ...]]:
        """Run a query of our own in the transaction."""
        self._send(Request(simple_query(sql), (sql,)))
        return self._answer()[1]

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._refusal(self._failure)

    def _refusal(self, failure: ServerError) -> ShardSQLError:
        if self._failed != self._script.sql:  # a text of our own
            failure = failure._replace(position=None)
        return self._refuse(failure, self._script.sql)

    def _ask_again(self) -> NoReturn:
        _known.note(self._query.sql, known=False)
        raise AskAgain

    def _read_messages(
        self,
        rows: list[tuple[str | None, ...]] | None = None,
        deadline: float | None = None,
    ) -> int:
        """Read up to the next ReadyForQuery, or to the rows, and return what it was.

        Rows that are for the decoder are left where they are.
        """
        received, at = self._received, 0
        while True:
            end = at + 5
            if len(received) >= end:
                length = int.from_bytes(received[at + 1 : end], "big", signed=True)
                if received[at] == _ROW and self._takes_rows:
                    self._received = received[at:]
                    return _ROW
                if length < 4 or (length > _MOST_SHORT and received[at] not in _MAY_BE_LONG):
                    raise ConnectionLostError("the server sent a message of an impossible length")
                end = at + 1 + length
            if len(received) < end:
                self._received = received[at:]  # whatever interrupts us, the rest is known
                self._received = received = self._received + self._receive_more(deadline)
                at = 0
                continue
            kind = received[at]
            if kind == _COMPLETE and not self._takes_rows:
                completed = _COMPLETIONS.match(received, at)
                end = end if completed is None else completed.end()
            elif kind == _ROW:
                if self._has_ended:
                    raise ConnectionLostError("the server sent rows behind their end")
                if rows is not None:
                    rows.append(parse_row(received[at + 5 : end]))
            elif kind == _FIELDS:
                self._fields = received[at + 5 : end]
            elif kind == _ERROR:
                self._takes_rows = False
                self._is_reset &= self._answering == self._script.sql
                self._note_failure(parse_error(received[at + 5 : end]))
            elif kind == _PARAMETER:
                self._note(received[at + 5 : end])
            elif kind == _READY:
                self._received, self._takes_rows, self._has_ended = received[end:], False, False
                self._status, self._answered = received[at + 5], self._answered + 1
                return kind
            elif kind == _BOUND and self._awaits_rows and (self._fields or not self._at_once):
                self._check_description()
                self._received, self._takes_rows = received[end:], True
                self._awaits_rows = False
                return kind
            elif kind == _COMPLETE:
                check_count(received[at + 5 : end], self._decoder.rows if self._decoder else 0)
                self._takes_rows, self._has_ended = False, True
            elif kind == _PLACEHOLDERS:
                if received[at + 5 : end] != b"\0\0":  # how many there are
                    self._note_failure(NO_PARAMETERS)
            elif kind != _BOUND and kind not in _NOT_FOR_US:
                raise ConnectionLostError(f"the server answered with a message {chr(kind)!r}")
            at = end

    def _receive_more(self, deadline: float | None) -> bytes:
        try:
            while True:
                if deadline is not None:
                    return receive_some(self._descriptor, deadline)
                with suppress(TimeoutError):
                    return receive_some(self._descriptor, time.monotonic() + _LAST_SECONDS)
                if is_cancelled(self._query.owner):
                    raise ConnectionLostError(SILENT)
        except ConnectionLostError:
            if self._failure is None:
                raise
            raise self._refusal(self._failure) from None  # why it ended the session

    def _note_failure(self, failure: ServerError) -> None:
        """Keep the first: what follows from it is refused because of it."""
        if self._failure is None:
            self._failure, self._failed = failure, self._answering

    @property
    def _answering(self) -> str:
        """The text that is being answered."""
        return self._sent[min(self._answered, len(self._sent) - 1)]

    def _check_description(self) -> None:
        """Compare the second description of a text that had to be sent twice."""
        if not self._is_parsed and self._fields != self._description:
            raise ColumnError("the query's columns have changed while it was read: read it again")

    def _note(self, body: bytes) -> None:
        """Take note of a parameter of the session that has changed."""
        name, value = [*body.decode("utf-8", "replace").split("\0"), ""][:2]
        if name in _GOES_BY:
            self._changed[name] = value
        if name == "client_encoding" and (other := other_encoding(value)) is not None:
            self._note_failure(other)

    def _settle(self) -> None:
        """The session is idle again: look whether libpq's picture of it is still true."""
        if self._received:
            raise ConnectionLostError("the server sent more than it was asked for")
        self._is_over = True
        known = self._session.get_parameter_status
        self._session.spoiled = (
            not self._is_reset
            or self._status != _IDLE
            or any(known(name) != value for name, value in self._changed.items())
        )
