"""Rows in a buffer, from a socket or from libpq -> columns in the arena.

Rows in a file of COPY, and those in DataRow messages with all values in binary form, are the same
bytes: PostgreSQL manual, COPY, "Binary Format"; ibid., "Message Formats", DataRow.

Every length in the stream is checked against the end of its row before a byte of it is read, and
every target against the capacity in the plan before one is written. A row counts only once it is
complete: the next call starts it again, and writes the same bytes to the same places.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from numba import njit

from dask_shardsql.engine.copy_kernel.layout import COPY, INFO, PLAN, Kind, Status
from dask_shardsql.engine.copy_kernel.memory import (
    consume_input,
    copy_exactly,
    free_memory,
    get8,
    get64,
    get_copy_data,
    item,
    load32,
    poll,
    put64,
    receive,
    set_item,
    signed16,
    signed32,
)
from dask_shardsql.engine.copy_kernel.values import (
    ROOM_OF_A_VALUE,
    write_list,
    write_null,
    write_scalar,
)

__all__ = ["decode", "pump", "pump_copy"]

_MAGIC = tuple(b"PGCOPY\n\xff\r\n\0")
_DATA_ROW = ord("D")
_LEAST_DATA_ROW = 6  # its length, and the number of its values
_MOST = 2**63 - 1
_FIELDS = len(PLAN)


def _compiled(signature: str) -> Callable[[Any], Any]:
    """Compile a function for one signature, and keep the machine code where that is possible.

    Numba looks only at the file of the function itself to see whether its code has changed: so the
    function's name in the cache also tells what is in the other files.
    """
    sources = sorted(Path(__file__).parent.glob("*.py"))
    digest = hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()

    def compile_it(function: Any) -> Any:
        function.__qualname__ = f"{function.__name__}_{digest[:16]}"
        try:
            return njit(signature, nogil=True, cache=True)(function)
        except RuntimeError:  # there is no directory that may be written to
            return njit(signature, nogil=True)(function)

    return compile_it


@njit(nogil=True)
def _row(source, start, stop, exact, plan, columns, row, arena, info):
    """Write one row; return where it ends, or a negative status.

    `exact` says whether a row that goes beyond `stop` is an error, or may be complete later.
    """
    if stop - start < 2:
        return Status.MALFORMED if exact else Status.NEED
    count = signed16(source, start)
    at = start + 2
    if count == -1:
        return Status.DONE
    if count != columns:
        return Status.MALFORMED
    column = 0
    for _ in range(count):
        if stop - at < 4:
            return Status.MALFORMED if exact else Status.NEED
        length = signed32(source, at)
        at += 4
        kind = item(plan, _FIELDS * column + PLAN.KIND)
        if length == -1:
            write_null(kind, plan, column, row, arena)
            column += 1
            continue
        if length < 0:
            return Status.MALFORMED
        if length > stop - at:
            return Status.MALFORMED if exact else Status.NEED
        if kind == Kind.LIST:
            status = write_list(source, at, length, plan, column, row, arena, info)
        else:
            status = write_scalar(source, at, length, kind, plan, column, row, arena)
            if status != 0:
                set_item(info, INFO.COLUMN, column)
                set_item(info, INFO.AMOUNT, length + ROOM_OF_A_VALUE)
                set_item(info, INFO.VALUE, at)
                set_item(info, INFO.LENGTH, length)
        if status != 0:
            if status != Status.UNREPRESENTABLE or item(info, INFO.MAKE_NULL) == 0:
                return status
            write_null(kind, plan, column, row, arena)
        at += length
        column += 1
    return at


@_compiled("int64(int64, int64, int64, int64, int64, boolean)")
def decode(source, info, plan, columns, arena, framed):
    """Decode rows until something keeps it from going on; return a :class:`Status`.

    Parameters
    ----------
    source : int
        Address of the received bytes; behind them there are 8 to spare.
    info : int
        Address of the state, an int64 for each of :class:`INFO`.
    plan : int
        Address of the plan, a row of int64 for each column and behind them one for the elements
        of each column of lists: see :class:`PLAN`.
    columns : int
        How many columns the query has.
    arena : int
        Address of where Arrow's buffers are written; behind each of them there are 8 to spare.
    framed : bool
        Whether the rows come in DataRow messages, one in each, or as a file of COPY, with what
        that has before and behind them.
    """
    position, end = item(info, INFO.POSITION), item(info, INFO.END)
    message_end = item(info, INFO.MESSAGE_END)
    row, capacity = (
        item(info, INFO.ROWS),
        item(plan, _FIELDS * 0 + PLAN.CAPACITY) if columns > 0 else _MOST,
    )
    status = 0
    while True:
        if framed:
            if position >= message_end:
                if end - position < 5:
                    set_item(info, INFO.AMOUNT, 5)
                    status = Status.NEED
                    break
                if get8(source, position) != _DATA_ROW:
                    status = Status.MESSAGE
                    break
                length = signed32(source, position + 1)
                if length < _LEAST_DATA_ROW:
                    status = Status.MALFORMED
                    break
                if length + 1 > end - position:
                    set_item(info, INFO.AMOUNT, length + 1)
                    status = Status.NEED
                    break
                message_end = position + 1 + length
                position += 5
            stop = message_end
        else:
            stop = end
        if not framed and item(info, INFO.STARTED) == 0:
            if stop - position < 19:
                set_item(info, INFO.AMOUNT, 19)
                status = Status.NEED
                break
            good = True
            for index in range(11):
                good = good and get8(source, position + index) == _MAGIC[index]
            extension = signed32(source, position + 15)
            # flag bit 16: rows with OIDs, gone since PostgreSQL 12; other high bits: unknown
            if not good or (load32(source, position + 11) >> 16) != 0 or extension < 0:
                status = Status.MALFORMED
                break
            if extension > stop - position - 19:
                set_item(info, INFO.AMOUNT, 19 + extension)
                status = Status.NEED
                break
            position += 19 + extension
            set_item(info, INFO.STARTED, 1)
            continue
        if item(info, INFO.STARTED) == 2:
            status = Status.MALFORMED
            break
        if row >= capacity:
            set_item(info, INFO.COLUMN, -1)
            status = Status.FULL
            break
        after = _row(source, position, stop, framed, plan, columns, row, arena, info)
        if after < 0:
            status = after
            if status == Status.DONE:
                position += 2
                set_item(info, INFO.STARTED, 2)
                if framed:
                    status = Status.MALFORMED
            elif status == Status.NEED:
                set_item(info, INFO.AMOUNT, end - position + 1)
            break
        if framed and after != message_end:
            status = Status.MALFORMED
            break
        position = after
        row += 1
    set_item(info, INFO.POSITION, position)
    set_item(info, INFO.MESSAGE_END, message_end)
    set_item(info, INFO.ROWS, row)
    return status


@njit(nogil=True)
def _to_front(source, info):
    """Move the bytes that wait to the front, in words, and return where they end."""
    position, end = item(info, INFO.POSITION), item(info, INFO.END)
    for word in range(0, end - position, 8):
        put64(source, word, get64(source, position + word))
    set_item(info, INFO.POSITION, 0)
    set_item(info, INFO.END, end - position)
    set_item(info, INFO.MESSAGE_END, 0)
    return end - position


@_compiled("int64(int64, int64, int64, int64, int64, int64, int64, int64)")
def pump(descriptor, wait, source, size, info, plan, columns, arena):
    """Receive from a socket that does not block, and decode, until something stops it.

    Parameters are those of :func:`decode`; before them the socket's file descriptor and for how
    long to wait, in milliseconds; behind the source's address, its size without those to spare.
    """
    failures = 0
    while True:
        status = decode(source, info, plan, columns, arena, True)
        if status != Status.NEED or item(info, INFO.AMOUNT) > size:
            return status
        position, end = item(info, INFO.POSITION), item(info, INFO.END)
        if position == end or size - position < max(item(info, INFO.AMOUNT), size >> 1):
            end = _to_front(source, info)
        while True:
            got = receive(descriptor, source + end, size - end)
            if got > 0:
                set_item(info, INFO.END, end + got)
                failures = 0
                break
            if got == 0:
                return Status.CLOSED
            ready = poll(descriptor, wait)
            if ready <= 0:  # nothing came, or a signal did
                return Status.WAITING
            failures += 1
            if failures > 2:
                return Status.FAILED


@_compiled("int64(int64, int64, int64, int64, int64, int64, int64, int64)")
def pump_copy(copy, wait, source, size, info, plan, columns, arena):
    """Take a COPY from libpq, and decode it, until something stops it.

    Parameters are those of :func:`pump`, but the first: the address of an int64 for each of
    :class:`COPY`. It is through when it returns ``CLOSED``. What libpq has given out and is not
    taken yet (``INFO.HELD``) is to be freed by whoever does not call again.
    """
    connection = item(copy, COPY.CONNECTION)
    while True:
        if item(info, INFO.STARTED) != 2:
            status = decode(source, info, plan, columns, arena, False)
            if status != Status.NEED and status != Status.DONE:
                return status
        end = _to_front(source, info)
        if item(info, INFO.STARTED) == 2 and end > 0:
            return Status.MALFORMED
        filled = 0
        while True:
            length = item(info, INFO.HELD_LENGTH)
            if length == 0:
                slot = info + 8 * INFO.HELD
                length = get_copy_data(item(copy, COPY.GET), connection, slot)
                set_item(info, INFO.HELD_LENGTH, length)
            if length < 0:  # stays so
                if filled == 0:
                    return Status.CLOSED
                break
            if length > 0:
                if length > size - end:
                    if filled == 0:
                        set_item(info, INFO.AMOUNT, end + length)
                        return Status.NEED
                    break
                held = item(info, INFO.HELD)
                copy_exactly(source + end, held, length)
                end += length
                set_item(info, INFO.END, end)
                set_item(info, INFO.HELD, 0)
                set_item(info, INFO.HELD_LENGTH, 0)
                free_memory(item(copy, COPY.FREE), held)
                filled += length
                continue
            if filled > 0:
                break
            ready = poll(item(copy, COPY.DESCRIPTOR), wait)
            # also where nothing came, as libpq may hold bytes back that are decrypted
            if consume_input(item(copy, COPY.CONSUME), connection) == 0:
                return Status.FAILED
            if ready <= 0:
                return Status.WAITING
