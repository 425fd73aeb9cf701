"""Rows in PostgreSQL's binary form -> Arrow record batches of bounded size.

They come as DataRow messages from a socket, or as a ``COPY ... TO STDOUT (FORMAT binary)``: the
bytes of a row are the same. The kernel writes straight into an arena, whose parts are Arrow's
buffers: nothing is copied after that. A value that does not fit in its Arrow type, a text that is
not UTF-8 and bytes that are no rows are found here, and named.
"""

from __future__ import annotations

import io
from array import array
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import numpy as np
import pyarrow as pa

from dask_shardsql.engine.copy_arena import BATCH_BYTES, SPARE, Arena, Kinds
from dask_shardsql.engine.copy_kernel.layout import INFO, Status
from dask_shardsql.engine.copy_kernel.rows import decode, pump, pump_copy
from dask_shardsql.engine.copy_values import show_value
from dask_shardsql.engine.drivers.base import Columns, OnBatch
from dask_shardsql.engine.text_values import decode_text
from dask_shardsql.errors import ConnectionLostError, UnrepresentableValueError
from dask_shardsql.sql.types import arrow_schema

__all__ = ["CopyDecoder", "CopyFile"]

_SOURCE_BYTES = 256 << 10
_FIRST_SOURCE_BYTES = 32 << 10  # what malloc has at hand
_NO_INFO = bytes(8 * len(INFO))
_STATUSES = {int(status): status for status in Status}


class CopyDecoder:
    """Decodes one answer.

    Parameters
    ----------
    columns : tuple of Column
        The columns, in the order of the rows' values, with the Arrow types to deliver.
    kinds : sequence of Kinds
        What each of them is in the stream.
    unrepresentable : {"raise", "null"}
        What becomes of a value that its Arrow type cannot hold.
    on_batch : callable
        Called with every record batch; what it raises leaves the decoder.
    batch_bytes : int, default 64 MiB
        How large a record batch may become.

    Raises
    ------
    UnrepresentableValueError
        From whatever decodes, at the first value that its Arrow type cannot hold.
    ColumnError
        A text is not UTF-8.
    ConnectionLostError
        What came is not what a server sends for these columns.
    """

    def __init__(
        self,
        columns: Columns,
        kinds: Sequence[Kinds],
        unrepresentable: str,
        on_batch: OnBatch,
        batch_bytes: int = BATCH_BYTES,
    ) -> None:
        self._columns = columns
        self._unrepresentable = unrepresentable
        self._on_batch = on_batch
        self._kinds = kinds
        self._schema = arrow_schema(columns)
        self._arena = Arena(columns, kinds, batch_bytes)
        self._info = array("q", _NO_INFO)  # quicker than NumPy for single numbers
        self._info[INFO.MAKE_NULL] = unrepresentable == "null"
        self._info_address = self._info.buffer_info()[0]
        self._source = np.empty(_FIRST_SOURCE_BYTES + SPARE, np.uint8)
        self._source_address = self._source.ctypes.data

    def receive(self, descriptor: int, wait: int = 200, *, small: bool = False) -> Status:
        """Receive DataRow messages from a socket that does not block, and decode them.

        Parameters
        ----------
        descriptor : int
            The socket.
        wait : int, default 200
            For how long to wait for more, in milliseconds.
        small : bool
            Whether to return when the first rows are decoded and there are more than a few.

        Returns
        -------
        Status
            ``MESSAGE``: the next one is another message (see :meth:`take_rest`). ``WAITING``:
            nothing came for so long; call again. ``FULL``: there is more than a few rows; call
            again. ``CLOSED``, ``FAILED``: nothing more will come.
        """
        return self._receive(pump, descriptor, wait, small)

    def receive_copy(self, copy: int, wait: int = 200) -> Status:
        """Take a COPY from libpq, and decode it.

        Parameters
        ----------
        copy : int
            Address of what the kernel has to know of it: see :class:`COPY`.
        wait : int, default 200
            For how long to wait for more, in milliseconds.

        Returns
        -------
        Status
            ``WAITING``: nothing came for so long; call again. ``CLOSED``: libpq has no more of it,
            and tells why. ``FAILED``: libpq tells what has failed.
        """
        return self._receive(pump_copy, copy, wait, False)

    def _receive(self, take: Callable[..., int], origin: int, wait: int, small: bool) -> Status:
        arena, info, columns = self._arena, self._info, len(self._columns)
        state, plan = self._info_address, arena.plan_address
        while True:
            size = len(self._source) - SPARE
            source = self._source_address
            if not arena.is_laid_out and (waiting := info[INFO.END] - info[INFO.POSITION]):
                arena.renew(waiting)
            status = take(origin, wait, source, size, state, plan, columns, arena.address)
            if status == Status.NEED:
                self._grow_source(int(info[INFO.AMOUNT]))
            elif small and status == Status.FULL and arena.is_laid_out:
                return Status.FULL
            elif not self._go_on(status):
                return _STATUSES[status]

    def feed(self, data: Any) -> None:
        """Decode the next bytes of a COPY, cut anywhere."""
        arena, info, columns = self._arena, self._info, len(self._columns)
        state, plan = self._info_address, arena.plan_address
        given = np.frombuffer(data, np.uint8)
        while len(given):
            self._move_to_front()
            end = int(info[INFO.END])
            if end == len(self._source) - SPARE:
                self._grow_source(2 * end)
            taken = min(len(given), len(self._source) - SPARE - end)
            self._source[end : end + taken] = given[:taken]
            info[INFO.END] = end + taken
            given = given[taken:]
            if self._is_done:
                self._malformed("more bytes follow its end")
            go_on = True
            while go_on:
                source = self._source_address
                status = decode(source, state, plan, columns, arena.address, False)
                go_on = self._go_on(status)
            if status == Status.DONE:
                self._move_to_front()

    def take_rest(self) -> bytes:
        """Return what was received and not decoded, and forget it."""
        info = self._info
        rest: bytes = self._source[info[INFO.POSITION] : info[INFO.END]].tobytes()
        info[INFO.POSITION] = info[INFO.END] = info[INFO.MESSAGE_END] = 0
        return rest

    def put_back(self, data: bytes) -> None:
        """Let `data` be what comes next; nothing may be left from before."""
        if len(data) > len(self._source) - SPARE:
            self._grow_source(len(data))
        self._source[: len(data)] = np.frombuffer(data, np.uint8)
        self._info[INFO.POSITION] = self._info[INFO.MESSAGE_END] = 0
        self._info[INFO.END] = len(data)

    def take_held(self) -> int:
        """Return the address of what libpq has given out and is not decoded, or 0: to be freed."""
        held, self._info[INFO.HELD] = self._info[INFO.HELD], 0
        return held

    @property
    def rows(self) -> int:
        """How many rows were decoded so far."""
        return self._arena.rows + self._info[INFO.ROWS]

    def finish(self) -> None:
        """Deliver what is left; an error unless the COPY has come to its end."""
        if not self._is_done or self._info[INFO.POSITION] < self._info[INFO.END]:
            self._malformed("more bytes follow its end" if self._is_done else "it ends too early")
        self.deliver()

    def deliver(self) -> None:
        """Hand over the complete rows of the arena as a record batch."""
        rows = int(self._info[INFO.ROWS])
        self._info[INFO.ROWS] = 0
        if not rows:
            return
        arrays = self._arena.arrays(rows)
        for number, (texts, column) in enumerate(zip(arrays, self._columns, strict=True)):
            if not self._kinds[number]:
                arrays[number] = decode_text(texts, column, self._unrepresentable)
        self._on_batch(pa.RecordBatch.from_arrays(arrays, schema=self._schema))

    @property
    def _is_done(self) -> bool:
        return self._info[INFO.STARTED] == 2

    def _go_on(self, status: int) -> bool:
        """Do what the kernel stopped for; return whether it can go on without more bytes."""
        info, arena = self._info, self._arena
        if status == Status.FULL:
            if info[INFO.ROWS] > 0 or not arena.is_laid_out:
                if arena.is_laid_out and len(self._source) < _SOURCE_BYTES:
                    self._grow_source(_SOURCE_BYTES)  # it is a large answer
                self.deliver()
                arena.renew(int(info[INFO.END] - info[INFO.POSITION]))
            else:  # not even one row fits
                waiting = int(info[INFO.END] - info[INFO.POSITION])
                arena.widen(int(info[INFO.COLUMN]), int(info[INFO.AMOUNT]), waiting)
            return True
        if status == Status.UNREPRESENTABLE:
            start = int(info[INFO.VALUE])
            value = self._source[start : start + int(info[INFO.LENGTH])].tobytes()
            column, kind = arena.column_of(int(info[INFO.COLUMN]))
            shown = show_value(kind, value, zoned=column.type_name.startswith("timestamptz"))
            raise UnrepresentableValueError(column.name, shown, str(column.arrow_type))
        if status == Status.MALFORMED:
            self._malformed("its bytes are not those of the columns that were described")
        return False

    def _move_to_front(self) -> None:
        info = self._info
        position, end = int(info[INFO.POSITION]), int(info[INFO.END])
        if position:
            self._source[: end - position] = self._source[position:end].copy()
            info[INFO.POSITION], info[INFO.END] = 0, end - position
            # the kernel stops in the middle of a message when the arena is full
            info[INFO.MESSAGE_END] = max(0, int(info[INFO.MESSAGE_END]) - position)

    def _grow_source(self, size: int) -> None:
        self._move_to_front()
        grown = np.empty(size + size // 4 + SPARE, np.uint8)
        end = int(self._info[INFO.END])
        grown[:end] = self._source[:end]
        self._source, self._source_address = grown, grown.ctypes.data

    def _malformed(self, what: str) -> NoReturn:
        raise ConnectionLostError(
            f"the server's answer in binary form cannot be read: {what}. Is there a proxy in "
            "between that changes it?"
        )


class CopyFile(io.RawIOBase):
    """A file that psycopg2's ``copy_expert`` can write to, best behind an `io.BufferedWriter`."""

    def __init__(self, decoder: CopyDecoder) -> None:
        self._decoder = decoder
        self._broken = False

    def writable(self) -> bool:
        """Return True."""
        return True

    def write(self, data: Any) -> int:
        """Decode these bytes; drop them after an error, when a buffer is flushed once more."""
        if not self._broken:
            self._broken = True
            self._decoder.feed(data)
            self._broken = False
        return len(data)
