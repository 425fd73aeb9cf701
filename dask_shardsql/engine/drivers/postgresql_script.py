"""What is sent over a session's socket for one query: see `postgresql_stage.py` for the order.

The user's text goes to the server as it is, through the extended query protocol: the server itself
refuses a second statement in it, describes it without running it, and sends each column in binary
form or as text, whichever is asked for (PostgreSQL manual, "Message Flow", "Extended Query"). What
begins the transaction goes before it up to the same Sync: should any of that fail, the server skips
the rest, and never runs a text outside of its transaction. Each statement is a message of its own,
so nothing that a text has opened reaches beyond it.
"""

from __future__ import annotations

import functools
import struct
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from dask_shardsql.engine.drivers.base import Query
from dask_shardsql.engine.drivers.postgresql_slices import BEGIN_HOLDING, SLICE_SETTINGS

__all__ = ["RESET", "KnownTexts", "Request", "Script", "begin", "pins", "simple_query"]

_PINS = (
    "SET LOCAL TimeZone = 'UTC'",
    "SET LOCAL DateStyle = 'ISO, MDY'",
    "SET LOCAL IntervalStyle = 'postgres'",
    "SET LOCAL extra_float_digits = 3",
    "SET LOCAL bytea_output = 'hex'",
    "SET LOCAL array_nulls = on",
)
RESET = (
    "; RESET SESSION AUTHORIZATION; RESET ROLE; RESET ALL; "
    "SELECT pg_catalog.pg_advisory_unlock_all()"
)
"""A query can set parameters or take locks for its session: the next one must not find them."""

_MOST_KNOWN = 1000


def begin(query: Query) -> tuple[str, ...]:
    """Return the statements that begin the transaction that a query is read in."""
    start: tuple[str, ...] = ("BEGIN READ ONLY",)
    if query.snapshot is not None:
        snapshot = query.snapshot.replace("'", "''")
        start = (BEGIN_HOLDING, f"SET TRANSACTION SNAPSHOT '{snapshot}'", *SLICE_SETTINGS)
    return *start, *pins(query)


def pins(query: Query) -> tuple[str, ...]:
    """Return the statements that pin what decides how values are written and compared."""
    name = f"dask_shardsql:{query.query_id}".replace("'", "")[:63]
    return *_PINS, f"SET LOCAL application_name = '{name}'", *query.settings


class Request(NamedTuple):
    """Messages, and for each ReadyForQuery that answers them the text that it is about."""

    messages: bytes
    texts: tuple[str, ...]


@dataclass(frozen=True)
class Script:
    """What there is to be sent for one query, on whichever connection.

    Parameters
    ----------
    begin : tuple of str
        The statements that begin the transaction.
    sql : str
        The query, with its parameters merged into it.
    """

    begin: tuple[str, ...]
    sql: str

    @functools.cached_property
    def description(self) -> Request:
        """Begin, describe, and see whether it may be run."""
        return Request(b"".join((*self._described, _bind(()), _SYNC)), (self.sql,))

    @functools.cached_property
    def all_at_once(self) -> Request:
        """Begin, describe, read all columns in binary form, and end.

        The description is sent when it is made, not when the first rows are.
        """
        parts = (*self._described, _bind((True,)), _FLUSH, _EXECUTE, _SYNC, simple_query(_COMMIT))
        return Request(b"".join(parts), (self.sql, _COMMIT))

    @property
    def _described(self) -> tuple[bytes, ...]:
        begun = (_parse(text) + _bind(()) + _EXECUTE for text in self.begin)
        return *begun, _parse(self.sql), _DESCRIBE

    def rows(self, in_binary: Sequence[bool], *, parse: bool) -> Request:
        """Read the rows, and end.

        Parameters
        ----------
        in_binary : sequence of bool
            Whether each column is sent in binary form, or as text; one for all where all are.
        parse : bool
            Whether the text is to be sent, and described, again, as simple queries make the server
            forget it.
        """
        parsed = _parse(self.sql) + _DESCRIBE if parse else b""
        messages = (parsed, _bind(in_binary), _EXECUTE, _SYNC, simple_query(_COMMIT))
        return Request(b"".join(messages), (self.sql, _COMMIT))

    @property
    def roll_back(self) -> Request:
        """End without having read all."""
        return Request(simple_query(_ROLL_BACK), (_ROLL_BACK,))


class KnownTexts:
    """The latest texts whose columns had all a binary form; for all threads."""

    def __init__(self) -> None:
        self._texts: OrderedDict[str, None] = OrderedDict()
        self._lock = threading.Lock()

    def __contains__(self, text: str) -> bool:
        return text in self._texts

    def note(self, text: str, *, known: bool) -> None:
        """Take note of whether it is one of them."""
        if known == (text in self._texts):
            return
        with self._lock:
            if not known:
                self._texts.pop(text, None)
                return
            self._texts[text] = None
            if len(self._texts) > _MOST_KNOWN:
                self._texts.popitem(last=False)


def simple_query(text: str) -> bytes:
    """Return the message that runs a text; it is answered up to a ReadyForQuery."""
    return _message(b"Q", text.encode("utf-8") + b"\0")


def _parse(sql: str) -> bytes:
    return _message(b"P", b"\0%b\0\0\0" % sql.encode("utf-8"))


def _bind(in_binary: Sequence[bool]) -> bytes:
    """Without parameters, for the statement that was parsed last; as text where nothing is said."""
    forms = in_binary[:1] if in_binary and all(in_binary) else in_binary
    return _message(b"B", struct.pack(f">2xhhh{len(forms)}h", 0, 0, len(forms), *forms))


def _message(kind: bytes, body: bytes) -> bytes:
    return b"%b%b%b" % (kind, struct.pack(">i", len(body) + 4), body)


_DESCRIBE = _message(b"D", b"S\0")
_EXECUTE = _message(b"E", b"\0" + bytes(4))
_FLUSH, _SYNC = _message(b"H", b""), _message(b"S", b"")
_COMMIT, _ROLL_BACK = "COMMIT" + RESET, "ROLLBACK" + RESET
