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
see `postgresql_copy.py`. A change of a parameter that libpq goes by, and of which it would not
know, spoils the connection for the next query. Whatever else goes wrong in the middle closes it.

Messages: PostgreSQL manual, "Message Flow" and "Message Formats".
"""

from __future__ import annotations

import os
import select
import struct
import time
from typing import NamedTuple, NoReturn

from dask_shardsql.errors import ConnectionLostError

__all__ = [
    "NO_PARAMETERS",
    "PATIENCE",
    "SILENT",
    "ServerError",
    "check_count",
    "error_of",
    "other_encoding",
    "parse_error",
    "parse_row",
    "receive_some",
    "send",
    "tell_what_is_wrong",
]

PATIENCE = 5
"""How often to wait for a server when the query was cancelled."""

SILENT = "the server does not answer any more"
_CHUNK = 64 << 10


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

NO_COLUMNS = "the query returns no columns (nor does SELECT ... INTO, which makes a table)"


def other_encoding(name: str | None) -> ServerError | None:
    """Return what is wrong where a query has set ``client_encoding``, and texts may come in it."""
    if name in (None, "UTF8"):
        return None
    return ServerError(
        f"the query sets client_encoding to {name}, in which its own texts may then come: take "
        "that out of it",
        "0A000",
    )


def check_count(body: bytes, received: int) -> None:
    """Compare how many rows a CommandComplete says were sent with how many were received."""
    tag, _, count = body.rstrip(b"\0").rpartition(b" ")
    if tag in (b"SELECT", b"COPY") and count != b"%d" % received:
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
    return error_of(*(fields.get(code) for code in (b"M", b"C", b"P", b"D", b"H")))


def error_of(
    message: str | None,
    sqlstate: str | None,
    position: str | None,
    detail: str | None,
    hint: str | None,
) -> ServerError:
    """Return the error that these fields make."""
    is_number = position is not None and position.isdecimal() and len(position) < 10
    where = int(position) if is_number and position else None
    return ServerError(message or "unknown error", sqlstate, where, detail, hint)


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
