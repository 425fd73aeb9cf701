"""What the kernel and its caller tell each other: kinds, the plan, the state, the status."""

from __future__ import annotations

from enum import IntEnum

__all__ = ["COPY", "INFO", "PLAN", "Kind", "Status"]


class Kind(IntEnum):
    """What the values of a column are in the stream, and so in Arrow."""

    BOOL = 0
    INT16 = 1
    INT32 = 2
    INT64 = 3
    DATE = 4
    TIME = 5
    TIMESTAMP = 6
    INTERVAL = 7
    NUMERIC128 = 8
    NUMERIC256 = 9
    TEXT = 10
    JSONB = 11
    UUID = 12
    LIST = 13

    __hash__ = int.__hash__  # that of an Enum is slow, and they are looked up by the column


class Status(IntEnum):
    """Why the kernel stopped."""

    NEED = -1  # more bytes: at least INFO.AMOUNT of them from the position on
    FULL = -2  # column INFO.COLUMN has no room for INFO.AMOUNT more, or -1: the rows are full
    DONE = -3  # the end of the data was read
    MESSAGE = -4  # another message than DataRow is at the position
    MALFORMED = -5  # these are no rows of these columns
    UNREPRESENTABLE = -6  # a value does not fit; INFO tells which and where it is
    CLOSED = -7  # the server closed the connection, or libpq has no more of a COPY
    WAITING = -8  # nothing came for a while
    FAILED = -9  # the socket has an error, or libpq


class PLAN(IntEnum):
    """What each column of the plan's matrix holds; offsets and sizes in bytes, in the arena."""

    KIND = 0
    VALUES = 1  # where values, or offsets, start
    VALIDITY = 2
    DATA = 3  # where texts start
    DATA_SIZE = 4
    CAPACITY = 5  # in values
    SCALE = 6  # of a decimal
    DIGITS = 7  # of a decimal, before the point
    CHILD = 8  # row of the plan for a list's elements
    HAS_NULL = 9  # set by the kernel
    NOT_ASCII = 10  # set by the kernel


class INFO(IntEnum):
    """What each element of the state vector holds; positions are in the source buffer."""

    POSITION = 0
    END = 1  # of the bytes received
    MESSAGE_END = 2  # of the DataRow message that the position is in
    ROWS = 3  # complete ones in the arena
    STARTED = 4  # 1 when the header of the stream has been read, 2 when its end has
    COLUMN = 5
    AMOUNT = 6
    VALUE = 7  # where the value is that does not fit
    LENGTH = 8  # its length
    MAKE_NULL = 9  # whether such a value becomes NULL instead
    HELD = 10  # address of what libpq has given out and could not be taken yet, or 0
    HELD_LENGTH = 11


class COPY(IntEnum):
    """What is to be known of a COPY that libpq receives: addresses, and its socket."""

    CONNECTION = 0
    DESCRIPTOR = 1
    GET = 2  # the function PQgetCopyData
    FREE = 3  # PQfreemem
    CONSUME = 4  # PQconsumeInput
