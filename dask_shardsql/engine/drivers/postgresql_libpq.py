"""What libpq can do and psycopg2 does not offer: cancel without its locks, hand over a COPY.

psycopg2 passes on a COPY one row at a time, each through a call into Python that holds the
interpreter's lock. Here the kernel calls ``PQgetCopyData`` itself, of the same libpq and on the
same connection.

Why that is sound. These are calls that libpq documents for everybody, made by the one thread that
holds the session, while psycopg2 is in none of its own. libpq itself keeps the state of the
connection: a COPY is taken up to its last result, after which psycopg2 finds it idle, or the
connection is closed. What libpq calls on the way, for a notice, is a function of psycopg2's that
does not touch Python.
"""

from __future__ import annotations

import ctypes
import functools
import select
import sys
import threading
import weakref
from array import array
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import psycopg2
import psycopg2.extensions as pgx

from dask_shardsql.engine.copy_kernel.layout import COPY
from dask_shardsql.engine.drivers.postgresql_wire import ServerError, check_count, error_of
from dask_shardsql.errors import ConnectionLostError

__all__ = ["CopyOut", "Session"]

_CANCEL_BUFFER = 256  # as libpq recommends
_CANCEL_SECONDS = 1.0
_WAIT_MILLISECONDS = 200
_COMMAND_OK, _COPY_OUT = 1, 3  # ExecStatusType
_FIELDS = b"MCPDH"  # PG_DIAG_...: message, SQLSTATE, position, detail, hint

_POINTER, _TEXT, _NUMBER = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int
_SIGNATURES: dict[str, tuple[Any, ...]] = {  # the result, and the arguments
    "PQcancel": (_NUMBER, _POINTER, _TEXT, _NUMBER),
    "PQclear": (None, _POINTER),
    "PQcmdStatus": (_TEXT, _POINTER),
    "PQconsumeInput": (_NUMBER, _POINTER),
    "PQerrorMessage": (_TEXT, _POINTER),
    "PQfreeCancel": (None, _POINTER),
    "PQfreemem": (None, _POINTER),
    "PQgetCancel": (_POINTER, _POINTER),
    "PQgetCopyData": (_NUMBER, _POINTER, _POINTER, _NUMBER),
    "PQgetResult": (_POINTER, _POINTER),
    "PQgssEncInUse": (_NUMBER, _POINTER),
    "PQisBusy": (_NUMBER, _POINTER),
    "PQresultErrorField": (_TEXT, _POINTER, _NUMBER),
    "PQresultErrorMessage": (_TEXT, _POINTER),
    "PQresultStatus": (_NUMBER, _POINTER),
    "PQsendQuery": (_NUMBER, _POINTER, _TEXT),
}


@functools.cache
def _libpq() -> dict[str, Any]:
    """Return the functions of the libpq that psycopg2 uses; those that are not found are not in."""
    library = ctypes.CDLL(psycopg2._psycopg.__file__)
    found = {}
    for name, (result, *arguments) in _SIGNATURES.items():
        with suppress(AttributeError):
            function = library[name]
            function.restype, function.argtypes = result, arguments
            found[name] = function
    return found


class Session(pgx.connection):
    """A psycopg2 connection that knows whether its socket may be read from."""

    #: Whether libpq must not be used on it any more, although it seems to be in order.
    spoiled = False

    @functools.cached_property
    def is_plain(self) -> bool:
        """Whether what goes over the socket is the protocol itself, not encrypted."""
        is_encrypted_by_gss = _libpq().get("PQgssEncInUse")  # psycopg2 does not tell
        return (
            sys.platform == "linux"
            and self.info.protocol_version == 3
            and not self.info.ssl_in_use
            and is_encrypted_by_gss is not None
            and not is_encrypted_by_gss(self.pgconn_ptr)
            and not self.async_
        )

    @functools.cached_property
    def poller(self) -> select.poll:
        """Tells whether the server has said something."""
        poller = select.poll()
        poller.register(self.fileno(), select.POLLIN)
        return poller

    @functools.cached_property
    def _canceller(self) -> int | None:
        """What libpq cancels with: made with the connection, which may be closed by then."""
        make, free = (_libpq().get(name) for name in ("PQgetCancel", "PQfreeCancel"))
        if make is None or free is None:
            return None
        made: int | None = make(self.pgconn_ptr)
        if made is not None:
            weakref.finalize(self, free, made).atexit = False
        return made

    def prepare(self) -> None:
        """Make ready for :meth:`request_cancel`; to be called once, by who has connected."""
        _ = self._canceller

    def request_cancel(self) -> None:
        """Ask the server to stop what this connection runs; from any thread, more than once.

        psycopg2's own method holds the interpreter's lock until the server has taken the request,
        which a server or a network that hangs never does; nor does libpq's return before that. So
        it is waited for no longer than a second. Should it come later, nobody is lent this session
        any more whose query it could stop.
        """
        thread = threading.Thread(target=self._cancel, name="dask_shardsql-cancel", daemon=True)
        thread.start()
        thread.join(_CANCEL_SECONDS)
        if thread.is_alive():
            self.spoiled = True

    def _cancel(self) -> None:
        if self._canceller is None:
            with suppress(psycopg2.Error):
                self.cancel()
            return
        buffer = ctypes.create_string_buffer(_CANCEL_BUFFER)
        _libpq()["PQcancel"](self._canceller, buffer, _CANCEL_BUFFER)


class CopyOut:
    """A ``COPY ... TO STDOUT`` whose rows the kernel takes from libpq.

    Parameters
    ----------
    session : Session
        Idle, or in a transaction; nobody else uses it before the COPY is over.
    wait : callable
        Called whenever nothing has come for a while; what it raises ends the waiting.
    """

    def __init__(self, session: Session, wait: Callable[[], None]) -> None:
        self._session, self._wait, self._libpq = session, wait, _libpq()
        self._connection = int(session.pgconn_ptr or 0)
        facts = {
            COPY.CONNECTION: self._connection,
            COPY.DESCRIPTOR: session.fileno(),
            COPY.GET: _address("PQgetCopyData"),
            COPY.FREE: _address("PQfreemem"),
            COPY.CONSUME: _address("PQconsumeInput"),
        }
        self._facts = array("q", [facts[fact] for fact in COPY])
        #: Where the kernel finds what it has to know.
        self.address = self._facts.buffer_info()[0]

    @staticmethod
    def is_possible() -> bool:
        """Whether all the functions are there: not so where libpq is hidden within psycopg2."""
        return len(_libpq()) == len(_SIGNATURES)

    def start(self, sql: str) -> ServerError | None:
        """Send the COPY and wait for its beginning, or for why the server refuses it.

        Raises
        ------
        ConnectionLostError
            The connection was lost.
        """
        if not self._libpq["PQsendQuery"](self._connection, sql.encode("utf-8")):
            raise ConnectionLostError(_said(self._libpq["PQerrorMessage"](self._connection)))
        status, _, failure = self._result() or (0, b"", None)
        if failure is not None:
            with suppress(ConnectionLostError):  # the server has said why
                self.finish(0)
            return failure
        if status != _COPY_OUT:
            raise ConnectionLostError("the server did not begin to send rows")
        return None

    def finish(self, received: int) -> ServerError | None:
        """Wait for the end of all, once no more rows come; return why the server gave up, if so.

        Parameters
        ----------
        received : int
            How many rows have come.

        Raises
        ------
        ConnectionLostError
            The connection was lost, or rows were.
        """
        failure = None
        for status, tag, failure in iter(self._result, None):
            if failure is not None:
                with suppress(ConnectionLostError):  # the server has said why
                    self.finish(received)
                break
            if status != _COMMAND_OK:
                raise ConnectionLostError("the server did not end what it was asked for")
            check_count(tag, received)
        return failure

    def free(self, held: int) -> None:
        """Free what libpq has given out and nobody has taken."""
        if held:
            self._libpq["PQfreemem"](held)

    def _result(self) -> tuple[int, bytes, ServerError | None] | None:
        """Wait for the next result: its status, its command tag, and what went wrong."""
        while self._libpq["PQisBusy"](self._connection):
            if not self._session.poller.poll(_WAIT_MILLISECONDS):
                self._wait()
            if not self._libpq["PQconsumeInput"](self._connection):
                raise ConnectionLostError(_said(self._libpq["PQerrorMessage"](self._connection)))
        result = self._libpq["PQgetResult"](self._connection)
        if not result:
            return None
        try:
            status = self._libpq["PQresultStatus"](result)
            failure = None if status in (_COMMAND_OK, _COPY_OUT) else self._error(result)
            return status, self._libpq["PQcmdStatus"](result), failure
        finally:
            self._libpq["PQclear"](result)

    def _error(self, result: int) -> ServerError:
        said = [self._libpq["PQresultErrorField"](result, code) for code in _FIELDS]
        error = error_of(*(field and field.decode("utf-8", "replace") for field in said))
        if error.sqlstate is None:  # libpq's own: no server says such a thing
            raise ConnectionLostError(_said(self._libpq["PQresultErrorMessage"](result)))
        return error


def _address(name: str) -> int:
    return ctypes.cast(_libpq()[name], ctypes.c_void_p).value or 0


def _said(message: bytes) -> str:
    return message.decode("utf-8", "replace").strip()
