"""Reading a COPY straight from the socket of a psycopg2 connection.

psycopg2 hands over a COPY one row at a time, each through a call into Python that holds the
interpreter's lock: that, not the decoding, is most of its cost. Here the query is written to the
connection's socket and the answer read from it, by the compiled kernel, in large pieces.

Why that is sound. libpq keeps no thread of its own and touches the socket only within a call. It
is idle before (its last call has returned, with the server's ReadyForQuery) and finds the server
ready again afterwards: the answer is read up to its own ReadyForQuery, and the state of the
transaction is the one that libpq knows from before, or "failed", from which the ROLLBACK that
follows leads out all the same. Bytes that libpq would have to decrypt (TLS, GSSAPI) are not for us:
then `copy_expert` is used. A change of a parameter that libpq goes by, and of which it would not
know, spoils the connection for the next query. Whatever else goes wrong in the middle closes it.

Messages: PostgreSQL manual, "Message Formats" and "COPY Operations".
"""

from __future__ import annotations

import ctypes
import functools
import os
import select
import struct
import sys
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

import psycopg2
import psycopg2.extensions as pgx

from dask_shardsql.engine.copy_binary import CopyDecoder
from dask_shardsql.engine.copy_kernel.layout import Status
from dask_shardsql.errors import ConnectionLostError

__all__ = ["ServerError", "Session", "copy_from_socket"]

_CHUNK = 64 << 10


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


class ServerError(NamedTuple):
    """What an ErrorResponse says."""

    message: str
    sqlstate: str | None
    position: int | None = None
    detail: str | None = None
    hint: str | None = None


def copy_from_socket(
    connection: Session,
    sql: str,
    decoder: CopyDecoder,
    refuse: Callable[[ServerError], Exception],
) -> None:
    """Run a ``COPY ... TO STDOUT (FORMAT binary)`` and decode its rows.

    Parameters
    ----------
    connection : Session
        Idle, or idle in a transaction, and plain.
    sql : str
        The COPY.
    decoder : CopyDecoder
        Gets the rows.
    refuse : callable
        Makes the exception to raise of what the server says; the connection is then usable.

    Raises
    ------
    ConnectionLostError
        The server went away, or says what it should not. The connection must be closed, as after
        anything that the decoder raises.
    """
    descriptor = connection.fileno()
    _send(descriptor, b"Q", sql.encode("utf-8") + b"\0")
    failure: ServerError | None = None
    received, copying = b"", False
    while True:
        if copying and received[:1] in (b"", b"d"):
            decoder.put_back(received)
            while (status := decoder.receive(descriptor)) == Status.WAITING:
                pass  # but for Python's own signals, which come through here
            if status != Status.MESSAGE:
                _lost(descriptor)
            received = decoder.take_rest()
        kind, body, received = _message(descriptor, received)
        if kind == b"H":
            copying = True
        elif kind == b"E":
            failure, copying = _error(body), False
        elif kind == b"c":
            copying = False
        elif kind == b"S":
            name, value, _ = body.decode("utf-8", "replace").split("\0")
            if name in ("client_encoding", "standard_conforming_strings"):
                connection.spoiled = True  # libpq quotes parameters by what it knows of these
            if name == "client_encoding" and value != "UTF8":
                failure = ServerError(
                    f"the query sets client_encoding to {value}, in which its own texts may then "
                    "come: take that out of it",
                    "0A000",
                )
        elif kind == b"Z":
            break
        elif kind not in (b"C", b"N", b"A"):
            raise ConnectionLostError(f"the server answered COPY with a message {kind!r}")
    if received:
        raise ConnectionLostError("the server sent more than the answer to COPY")
    if failure is not None:
        raise refuse(failure)
    decoder.finish()


def _send(descriptor: int, kind: bytes, body: bytes) -> None:
    data = memoryview(kind + struct.pack(">i", len(body) + 4) + body)
    while data:
        try:
            data = data[os.write(descriptor, data) :]
        except BlockingIOError:
            poller = select.poll()
            poller.register(descriptor, select.POLLOUT)
            poller.poll()
        except OSError as error:
            raise ConnectionLostError(f"the connection was lost: {error.strerror}") from error


def _message(descriptor: int, received: bytes) -> tuple[bytes, bytes, bytes]:
    """Return the kind and the body of the next message, and what is received behind it."""
    while len(received) < 5:
        received += _receive(descriptor)
    (length,) = struct.unpack_from(">i", received, 1)
    if length < 4:
        raise ConnectionLostError("the server sent a message of an impossible length")
    needed = length + 1
    while len(received) < needed:
        received += _receive(descriptor)
    return received[:1], received[5:needed], received[needed:]


def _receive(descriptor: int) -> bytes:
    """Wait for some bytes."""
    while True:
        try:
            data = os.read(descriptor, _CHUNK)
        except BlockingIOError:
            poller = select.poll()
            poller.register(descriptor, select.POLLIN)
            poller.poll(200)
            continue
        except OSError as error:
            raise ConnectionLostError(f"the connection was lost: {error.strerror}") from error
        if not data:
            raise ConnectionLostError("server closed the connection unexpectedly")
        return data


def _lost(descriptor: int) -> NoReturn:
    """Raise what is wrong with the socket."""
    _receive(descriptor)
    raise ConnectionLostError("the connection was lost")


def _error(body: bytes) -> ServerError:
    fields = {
        field[:1]: field[1:].decode("utf-8", "replace") for field in body.split(b"\0") if field
    }
    position = fields.get(b"P", "")
    return ServerError(
        fields.get(b"M", "unknown error"),
        fields.get(b"C"),
        int(position) if position.isdigit() else None,
        fields.get(b"D"),
        fields.get(b"H"),
    )


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
