"""One value of a row -> its place in the arena.

Formats: ``numeric_send``, ``interval_send``, ``array_send`` and their like in the server's sources.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from dask_shardsql.engine.copy_kernel.layout import INFO, PLAN, Kind, Status
from dask_shardsql.engine.copy_kernel.memory import (
    copy,
    get8,
    get32,
    item,
    load16,
    load32,
    load64,
    put8,
    put16,
    put32,
    put64,
    set_item,
    signed16,
    signed32,
)

__all__ = ["ROOM_OF_A_VALUE", "write_list", "write_null", "write_scalar"]

ROOM_OF_A_VALUE = 64
"""What a value may need more of in a text's buffer than its own bytes."""

_FIELDS = len(PLAN)
_MICROSECONDS_TO_2000 = 946_684_800_000_000
_DAYS_TO_2000 = 10_957
_MICROSECONDS_PER_DAY = 86_400_000_000
_MOST = 2**63 - 1
_LEAST = -(2**63)


@njit(nogil=True)
def _check_numeric(source, start, length, scale, digits):
    """Check a numeric: 2 if it is malformed, 1 if it does not fit.

    It is a header and groups of four digits, the first of them at the position `weight`, where 0 is
    the one before the point, which has at most `digits` before it. The groups behind those that
    the scale asks for must be zero.
    """
    if length < 8:
        return 2
    count = signed16(source, start)
    weight = signed16(source, start + 2)
    sign = load16(source, start + 4)
    if count < 0 or length != 8 + 2 * count:
        return 2
    if sign != 0 and sign != 0x4000:
        return 1 if sign == 0xC000 or sign == 0xD000 or sign == 0xF000 else 2
    for index in range(count):
        if load16(source, start + 8 + 2 * index) > 9999:
            return 2
    if count > 0 and weight >= 0:
        first = load16(source, start + 8)
        room = digits - 4 * weight
        if room <= 0:
            return 1
        if room < 4 and first >= (10 if room == 1 else (100 if room == 2 else 1000)):
            return 1
    for index in range(max(np.int64(0), weight + ((scale + 3) // 4) + 1), count):
        if load16(source, start + 8 + 2 * index) != 0:
            return 1
    return 0


@njit(nogil=True)
def _numeric128(source, start, length, scale, digits, target, to):
    """Write a numeric as a decimal128; return whether it is malformed (2), does not fit (1)."""
    problem = _check_numeric(source, start, length, scale, digits)
    if problem != 0:
        return problem
    count = signed16(source, start)
    weight = signed16(source, start + 2)
    low, high = np.uint64(0), np.uint64(0)
    if count > 0:
        last = -((scale + 3) // 4)  # position of the last group of four digits that counts
        rest = scale + 4 * last  # minus the digits of that group that do not count
        for position in range(weight, last - 1, -1):
            index = weight - position
            group = load16(source, start + 8 + 2 * index) if index < count else np.int64(0)
            factor = np.uint64(10000)
            if position == last and rest < 0:
                divisor = 10 if rest == -1 else (100 if rest == -2 else 1000)
                if group % divisor != 0:
                    return 1
                group //= divisor
                factor = np.uint64(10000 // divisor)
            # 128 bits times a small factor, by halves of words
            mask = np.uint64(0xFFFFFFFF)
            half = np.uint64(32)
            one = (low & mask) * factor + np.uint64(group)
            two = (low >> half) * factor + (one >> half)
            high = high * factor + (two >> half)
            low = (two << half) | (one & mask)
    if load16(source, start + 4) != 0:
        low = ~low + np.uint64(1)
        high = ~high + np.uint64(1 if low == 0 else 0)
    put64(target, to, np.int64(low))
    put64(target, to + 8, np.int64(high))
    return 0


@njit(nogil=True)
def _numeric256(source, start, length, scale, digits, target, to):
    """Write a numeric as a decimal256; as :func:`_numeric128`."""
    problem = _check_numeric(source, start, length, scale, digits)
    if problem != 0:
        return problem
    count = signed16(source, start)
    weight = signed16(source, start + 2)
    for word in range(0, 32, 8):
        put64(target, to + word, 0)
    if count > 0:
        last = -((scale + 3) // 4)
        rest = scale + 4 * last
        used = 4  # bytes of the number that are not zero yet, at most
        for position in range(weight, last - 1, -1):
            index = weight - position
            group = load16(source, start + 8 + 2 * index) if index < count else np.int64(0)
            factor = np.int64(10000)
            if position == last and rest < 0:
                divisor = 10 if rest == -1 else (100 if rest == -2 else 1000)
                if group % divisor != 0:
                    return 1
                group //= divisor
                factor = 10000 // divisor
            carry = group
            for limb in range(0, used, 4):
                carry += get32(target, to + limb) * factor
                put32(target, to + limb, carry)
                carry >>= 32
            if carry != 0 and used < 32:
                put32(target, to + used, carry)
                used += 4
    if load16(source, start + 4) != 0:
        carry = np.int64(1)
        for limb in range(0, 32, 4):
            carry += (~get32(target, to + limb)) & np.int64(0xFFFFFFFF)
            put32(target, to + limb, carry)
            carry >>= 32
    return 0


@njit(nogil=True)
def _hex_digit(value):
    return value + (48 if value < 10 else 87)


@njit(nogil=True)
def write_scalar(source, start, length, kind, plan, column, row, arena):
    """Write one value that is not NULL; 0, or a negative status, or the room that is missing."""
    at = item(plan, _FIELDS * column + PLAN.VALUES)
    if kind == Kind.INT64:
        if length != 8:
            return Status.MALFORMED
        put64(arena, at + 8 * row, load64(source, start))
    elif kind == Kind.INT32:
        if length != 4:
            return Status.MALFORMED
        put32(arena, at + 4 * row, load32(source, start))
    elif kind == Kind.TEXT or kind == Kind.JSONB:
        if kind == Kind.JSONB:
            if length < 1 or get8(source, start) != 1:
                return Status.MALFORMED
            start += 1
            length -= 1
        used = get32(arena, at + 4 * row)
        if used + length > item(plan, _FIELDS * column + PLAN.DATA_SIZE):
            return Status.FULL
        if copy(source, start, length, arena, item(plan, _FIELDS * column + PLAN.DATA) + used):
            set_item(plan, _FIELDS * column + PLAN.NOT_ASCII, 1)
        put32(arena, at + 4 * row + 4, used + length)
    elif kind == Kind.NUMERIC128 or kind == Kind.NUMERIC256:
        scale = item(plan, _FIELDS * column + PLAN.SCALE)
        digits = item(plan, _FIELDS * column + PLAN.DIGITS)
        if kind == Kind.NUMERIC128:
            problem = _numeric128(source, start, length, scale, digits, arena, at + 16 * row)
        else:
            problem = _numeric256(source, start, length, scale, digits, arena, at + 32 * row)
        if problem != 0:
            return Status.UNREPRESENTABLE if problem == 1 else Status.MALFORMED
    elif kind == Kind.DATE:
        if length != 4:
            return Status.MALFORMED
        days = signed32(source, start)
        if days == 0x7FFFFFFF or days == -0x80000000 or days > 0x7FFFFFFF - _DAYS_TO_2000:
            return Status.UNREPRESENTABLE
        put32(arena, at + 4 * row, days + _DAYS_TO_2000)
    elif kind == Kind.TIMESTAMP:
        if length != 8:
            return Status.MALFORMED
        micros = load64(source, start)
        if micros > 0x7FFFFFFFFFFFFFFF - _MICROSECONDS_TO_2000 or micros == _LEAST:
            return Status.UNREPRESENTABLE
        put64(arena, at + 8 * row, micros + _MICROSECONDS_TO_2000)
    elif kind == Kind.INT16:
        if length != 2:
            return Status.MALFORMED
        put16(arena, at + 2 * row, load16(source, start))
    elif kind == Kind.BOOL:
        if length != 1 or get8(source, start) > 1:
            return Status.MALFORMED
        byte = at + (row >> 3)
        bit = np.int64(1) << (row & 7)
        if get8(source, start) == 1:
            put8(arena, byte, get8(arena, byte) | bit)
        else:
            put8(arena, byte, get8(arena, byte) & ~bit)
    elif kind == Kind.TIME:
        if length != 8:
            return Status.MALFORMED
        micros = load64(source, start)
        if micros < 0 or micros >= _MICROSECONDS_PER_DAY:
            return Status.UNREPRESENTABLE
        put64(arena, at + 8 * row, micros)
    elif kind == Kind.INTERVAL:
        if length != 16:
            return Status.MALFORMED
        micros = load64(source, start)
        if micros > _MOST // 1000 or micros < -(_MOST // 1000):
            return Status.UNREPRESENTABLE
        put32(arena, at + 16 * row, load32(source, start + 12))
        put32(arena, at + 16 * row + 4, load32(source, start + 8))
        put64(arena, at + 16 * row + 8, micros * 1000)
    elif kind == Kind.UUID:
        if length != 16:
            return Status.MALFORMED
        used = get32(arena, at + 4 * row)
        if used + 36 > item(plan, _FIELDS * column + PLAN.DATA_SIZE):
            return Status.FULL
        to = item(plan, _FIELDS * column + PLAN.DATA) + used
        for index in range(16):
            if index == 4 or index == 6 or index == 8 or index == 10:
                put8(arena, to, np.int64(45))
                to += 1
            put8(arena, to, _hex_digit(get8(source, start + index) >> 4))
            put8(arena, to + 1, _hex_digit(get8(source, start + index) & 15))
            to += 2
        put32(arena, at + 4 * row + 4, used + 36)
    else:
        return Status.MALFORMED
    return 0


@njit(nogil=True)
def write_null(kind, plan, column, row, arena):
    """Write a NULL."""
    byte = item(plan, _FIELDS * column + PLAN.VALIDITY) + (row >> 3)
    put8(arena, byte, get8(arena, byte) & ~(np.int64(1) << (row & 7)))
    set_item(plan, _FIELDS * column + PLAN.HAS_NULL, 1)
    at = item(plan, _FIELDS * column + PLAN.VALUES)
    if kind >= Kind.TEXT:
        put32(arena, at + 4 * row + 4, get32(arena, at + 4 * row))
    elif kind == Kind.INT64 or kind == Kind.TIMESTAMP or kind == Kind.TIME:
        put64(arena, at + 8 * row, np.int64(0))
    elif kind == Kind.INT32 or kind == Kind.DATE:
        put32(arena, at + 4 * row, np.int64(0))
    elif kind == Kind.INT16:
        put16(arena, at + 2 * row, np.int64(0))
    elif kind == Kind.NUMERIC128 or kind == Kind.INTERVAL:
        put64(arena, at + 16 * row, np.int64(0))
        put64(arena, at + 16 * row + 8, np.int64(0))
    elif kind == Kind.NUMERIC256:
        for word in range(0, 32, 8):
            put64(arena, at + 32 * row + word, np.int64(0))


@njit(nogil=True)
def write_list(source, start, length, plan, column, row, arena, info):
    """Write an array of one dimension, or of none."""
    if length < 12:
        return Status.MALFORMED
    dimensions = signed32(source, start)
    if dimensions < 0 or dimensions > 6:
        return Status.MALFORMED
    if dimensions > 1:
        set_item(info, INFO.COLUMN, column)
        set_item(info, INFO.VALUE, start)
        set_item(info, INFO.LENGTH, length)
        return Status.UNREPRESENTABLE
    at = item(plan, _FIELDS * column + PLAN.VALUES)
    used = get32(arena, at + 4 * row)
    count = np.int64(0)
    if dimensions == 0:
        if length != 12:
            return Status.MALFORMED
    else:
        if length < 20:
            return Status.MALFORMED
        count = signed32(source, start + 12)
        stop = start + length
        if count < 0 or count > (length - 20) // 4:
            return Status.MALFORMED
        child = item(plan, _FIELDS * column + PLAN.CHILD)
        if used + count > item(plan, _FIELDS * child + PLAN.CAPACITY):
            set_item(info, INFO.COLUMN, child)
            set_item(info, INFO.AMOUNT, used + count)
            return Status.FULL
        kind = item(plan, _FIELDS * child + PLAN.KIND)
        at_element = start + 20
        for number in range(used, used + count):
            if stop - at_element < 4:
                return Status.MALFORMED
            size = signed32(source, at_element)
            at_element += 4
            if size == -1:
                write_null(kind, plan, child, number, arena)
                continue
            if size < 0 or size > stop - at_element:
                return Status.MALFORMED
            status = write_scalar(source, at_element, size, kind, plan, child, number, arena)
            if status == Status.UNREPRESENTABLE and item(info, INFO.MAKE_NULL) != 0:
                write_null(kind, plan, child, number, arena)
            elif status != 0:
                set_item(info, INFO.COLUMN, child)
                set_item(info, INFO.AMOUNT, size + ROOM_OF_A_VALUE)
                set_item(info, INFO.VALUE, at_element)
                set_item(info, INFO.LENGTH, size)
                return status
            at_element += size
        if at_element != stop:
            return Status.MALFORMED
    put32(arena, at + 4 * row + 4, used + count)
    return 0
