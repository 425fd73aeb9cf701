"""PostgreSQL's hash of a partition key: which partition of a table by HASH a value goes to.

After ``src/common/hashfn.c``, ``hash_combine64`` and ``compute_partition_hash_value``; the hash is
by Bob Jenkins (lookup3, public domain). Servers on big-endian machines have another one.
"""

from __future__ import annotations

from uuid import UUID

__all__ = ["partition_hash"]

_SEED = 0x7A5B22367996DCFD  # HASH_PARTITION_SEED
_COMBINED = 0x49A0F4DD15E5A8E3
_MASK, _MASK_64 = 0xFFFFFFFF, 0xFFFFFFFFFFFFFFFF


def partition_hash(value: int | str | UUID) -> int:
    """Return the 64 bits whose remainder is the partition of one column's value.

    Parameters
    ----------
    value : int, str or UUID
        Of a column int2, int4 or int8 (equal values of them hash alike; of numeric they do not),
        text or varchar of a deterministic collation in a database in UTF8, or uuid.

    Raises
    ------
    ValueError
        It is no value of those types: an int beyond 64 bits, or a text with NUL or half of a
        surrogate pair.
    """
    if isinstance(value, int):
        hashed = _of_integer(value)
    else:
        if isinstance(value, str) and "\0" in value:
            raise ValueError("PostgreSQL's texts have no NUL")
        data = value.encode("utf-8") if isinstance(value, str) else value.bytes
        hashed = _of_bytes(data)
    return (hashed + _COMBINED) & _MASK_64  # hash_combine64 of 0 and it


def _of_integer(value: int) -> int:
    """Return ``hashint8extended``, which is ``hashint4extended`` where that has the value."""
    if not -(1 << 63) <= value < 1 << 63:
        raise ValueError("an integer of more than 64 bits")
    low, high = value & _MASK, (value >> 32) & _MASK
    low ^= high if value >= 0 else ~high & _MASK
    a, b, c = _begin(4)
    return _final((a + low) & _MASK, b, c)


def _of_bytes(data: bytes) -> int:
    """Return ``hash_bytes_extended``."""
    a, b, c = _begin(len(data))
    whole = len(data) - len(data) % 12
    for at in range(0, whole, 12):
        a = (a + int.from_bytes(data[at : at + 4], "little")) & _MASK
        b = (b + int.from_bytes(data[at + 4 : at + 8], "little")) & _MASK
        c = (c + int.from_bytes(data[at + 8 : at + 12], "little")) & _MASK
        a, b, c = _mix(a, b, c)
    a += int.from_bytes(data[whole : whole + 4], "little")
    b += int.from_bytes(data[whole + 4 : whole + 8], "little")
    c += int.from_bytes(data[whole + 8 :], "little") << 8  # its lowest byte is for the length
    return _final(a & _MASK, b & _MASK, c & _MASK)


def _begin(length: int) -> tuple[int, int, int]:
    start = (0x9E3779B9 + length + 3923095) & _MASK
    return _mix((start + (_SEED >> 32)) & _MASK, (start + (_SEED & _MASK)) & _MASK, start)


def _rotated(x: int, bits: int) -> int:
    return (x << bits | x >> (32 - bits)) & _MASK


def _mix(a: int, b: int, c: int) -> tuple[int, int, int]:
    for first, second, third in ((4, 6, 8), (16, 19, 4)):
        a, c = (a - c) & _MASK ^ _rotated(c, first), (c + b) & _MASK
        b, a = (b - a) & _MASK ^ _rotated(a, second), (a + c) & _MASK
        c, b = (c - b) & _MASK ^ _rotated(b, third), (b + a) & _MASK
    return a, b, c


def _final(a: int, b: int, c: int) -> int:
    c = ((c ^ b) - _rotated(b, 14)) & _MASK
    a = ((a ^ c) - _rotated(c, 11)) & _MASK
    b = ((b ^ a) - _rotated(a, 25)) & _MASK
    c = ((c ^ b) - _rotated(b, 16)) & _MASK
    a = ((a ^ c) - _rotated(c, 4)) & _MASK
    b = ((b ^ a) - _rotated(a, 14)) & _MASK
    c = ((c ^ b) - _rotated(b, 24)) & _MASK
    return b << 32 | c
