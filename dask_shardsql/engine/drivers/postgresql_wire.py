"""Using the socket of a psycopg2 connection without psycopg2.

psycopg2 hands over a COPY one row at a time, each through a call into Python that holds the
interpreter's lock: that, not the decoding, is most of its cost; other rows it asks for as text.
Here queries are written to the connection's socket and the answers read from it, rows by the
compiled kernel in large pieces; and a query can be sent to many servers before any answer is
waited for.

Why that is sound. libpq keeps no thread of its own and touches the socket only within a call. It
is idle before (its last call has returned, with the server's ReadyForQuery) and finds the server
ready again afterwards: the answer is read up to its own ReadyForQuery, and the state of the
transaction is the one that libpq knows from before, or "failed", from which the ROLLBACK that
follows leads out all the same. Bytes that libpq would have to decrypt (TLS, GSSAPI) are not for us:
then `copy_expert` is used. A change of a parameter that libpq goes by, and of which it would not
know, spoils the connection for the next query. Whatever else goes wrong in the middle closes it.

Messages: PostgreSQL manual, "Message Flow" and "Message Formats".
"""

from __future__ import annotations

import ctypes
import functools
import os
import select
import struct
import sys
import time
import weakref
from contextlib import suppress
from typing import Any, NamedTuple, NoReturn

import psycopg2
import psycopg2.extensions as pgx

from dask_shardsql.errors import ConnectionLostError

__all__ = [
    "NO_PARAMETERS",
    "ServerError",
    "Session",
    "check_count",
    "parse_error",
    "parse_row",
    "receive_some",
    "send",
    "tell_what_is_wrong",
]

_CHUNK = 64 << 10
_CANCEL_BUFFER = 256  # as libpq recommends


class Session(pgx.connection):
    """A psycopg2 connection that knows whether its socket may be read from."""

    #: Whether libpq must not be used on it any more, although it seems to be in order.
    spoiled = False

    @functools.cached_property
    def is_plain(self) -> bool:
        """Whether what goes over the socket is the protocol itself, not encrypted."""
        return (
            sys.platform == "linux"
            and self.info.protocol_version == 3
            and not self.info.ssl_in_use
            and not _is_gss_encrypted(self)
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
        try:
            make, free = _library().PQgetCancel, _library().PQfreeCancel
        except (AttributeError, OSError):
            return None
        make.argtypes, make.restype = [ctypes.c_void_p], ctypes.c_void_p
        free.argtypes, free.restype = [ctypes.c_void_p], None
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
        which a server or a network that hangs never does.
        """
        canceller = self._canceller
        if canceller is None:
            with suppress(psycopg2.Error):
                self.cancel()
            return
        function = _library().PQcancel
        function.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int]
        function.restype = ctypes.c_int
        function(canceller, ctypes.create_string_buffer(_CANCEL_BUFFER), _CANCEL_BUFFER)


class ServerError(NamedTuple):
    """What an ErrorResponse says."""

    message: str
    sqlstate: str | None
    position: int | None = None
    detail: str | None = None
    hint: str | None = None


NO_PARAMETERS = ServerError(
    "there is no parameter $1",
    "42P02",
    hint="placeholders are written %s, or %(name)s, and their values given as params",
)


def check_count(body: bytes, received: int) -> None:
    """Compare how many rows a CommandComplete says were sent with how many were received."""
    tag, _, count = body.rstrip(b"\0").rpartition(b" ")
    if tag == b"SELECT" and count != b"%d" % received:
        raise ConnectionLostError(
            f"{received} rows have come of those that the server says it has sent. Is there a "
            "proxy in between that drops messages?"
        )


def send(descriptor: int, data: bytes) -> None:
    """Write to a socket that does not block; wait while it takes no more."""
    while data:
        try:
            data = data[os.write(descriptor, data) :]
        except BlockingIOError:
            poller = select.poll()
            poller.register(descriptor, select.POLLOUT)
            poller.poll()
        except OSError as error:
            raise ConnectionLostError(f"the connection was lost: {error.strerror}") from error


def receive_some(descriptor: int, deadline: float | None = None) -> bytes:
    """Wait for some bytes; a ``TimeoutError`` if there are none by `deadline` (monotonic)."""
    while True:
        try:
            data = os.read(descriptor, _CHUNK)
        except BlockingIOError:
            wait = 0.2 if deadline is None else min(0.2, deadline - time.monotonic())
            if wait <= 0:
                raise TimeoutError from None
            poller = select.poll()
            poller.register(descriptor, select.POLLIN)
            poller.poll(1 + int(1000 * wait))
            continue
        except OSError as error:
            raise ConnectionLostError(f"the connection was lost: {error.strerror}") from error
        if not data:
            raise ConnectionLostError("server closed the connection unexpectedly")
        return data


def tell_what_is_wrong(descriptor: int) -> NoReturn:
    """Raise what is wrong with a socket that cannot be read from."""
    receive_some(descriptor)
    raise ConnectionLostError("the connection was lost")


def parse_error(body: bytes) -> ServerError:
    """Return what an ErrorResponse says."""
    fields = {
        field[:1]: field[1:].decode("utf-8", "replace") for field in body.split(b"\0") if field
    }
    position = fields.get(b"P", "")
    return ServerError(
        fields.get(b"M", "unknown error"),
        fields.get(b"C"),
        int(position) if position.isdecimal() and len(position) < 10 else None,
        fields.get(b"D"),
        fields.get(b"H"),
    )


def parse_row(body: bytes) -> tuple[str | None, ...]:
    """Return the values of a DataRow in text form."""
    (count,) = struct.unpack_from(">h", body)
    values: list[str | None] = []
    at = 2
    for _ in range(count):
        (length,) = struct.unpack_from(">i", body, at)
        at += 4
        values.append(None if length < 0 else body[at : at + length].decode("utf-8"))
        at += max(length, 0)
    return tuple(values)


@functools.cache
def _library() -> Any:
    """Return what finds the functions of the libpq that psycopg2 uses."""
    return ctypes.CDLL(psycopg2._psycopg.__file__)


def _is_gss_encrypted(connection: Any) -> bool:
    """Whether GSSAPI encrypts the connection; psycopg2 does not tell, libpq does."""
    try:
        function = _library().PQgssEncInUse
    except (AttributeError, OSError):
        return True  # not to be found: as if it were
    function.argtypes, function.restype = [ctypes.c_void_p], ctypes.c_int
    return bool(function(connection.pgconn_ptr))
