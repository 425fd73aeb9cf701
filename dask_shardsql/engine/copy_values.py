"""Single values of COPY BINARY as PostgreSQL writes them, for errors that name a value."""

from __future__ import annotations

import struct
from decimal import Decimal

import numpy as np

from dask_shardsql.engine.copy_kernel.layout import Kind

__all__ = ["show_date", "show_value"]

_MICROSECONDS_TO_2000 = 946_684_800_000_000
_DAYS_TO_2000 = 10_957
_MICROSECONDS_PER_DAY = 86_400_000_000
_SHOWN = 80  # characters
_LEAST, _MOST = -(2**63), 2**63 - 1
_SPECIAL = {0xC000: "NaN", 0xD000: "Infinity", 0xF000: "-Infinity"}


def show_value(kind: Kind, value: bytes, *, zoned: bool = False) -> str:
    """Return the text of a value that has no Arrow form.

    Parameters
    ----------
    kind : Kind
        What it is.
    value : bytes
        As the server sends it; well-formed.
    zoned : bool
        Whether a timestamp has a time zone, which is UTC.
    """
    if kind in (Kind.NUMERIC128, Kind.NUMERIC256):
        return _show_numeric(value)
    if kind == Kind.DATE:
        (days,) = struct.unpack(">i", value)
        if days in (2**31 - 1, -(2**31)):
            return "infinity" if days > 0 else "-infinity"
        return show_date(days + _DAYS_TO_2000)
    if kind == Kind.TIMESTAMP:
        (micros,) = struct.unpack(">q", value)
        if micros in (_LEAST, _MOST):
            return "infinity" if micros > 0 else "-infinity"
        days, rest = divmod(micros + _MICROSECONDS_TO_2000, _MICROSECONDS_PER_DAY)
        date, _, era = show_date(days).partition(" ")
        zone = "+00" if zoned else ""
        return f"{date} {_show_time(rest)}{zone} {era}".rstrip()
    if kind == Kind.TIME:
        return _show_time(*struct.unpack(">q", value))
    if kind == Kind.INTERVAL:
        return _show_interval(value)
    if kind == Kind.LIST:
        (dimensions,) = struct.unpack_from(">i", value)
        return f"an array of {dimensions} dimensions"
    return value[:_SHOWN].decode("utf-8", "replace")


def _show_numeric(value: bytes) -> str:
    count, weight, sign, scale = struct.unpack_from(">hhHH", value)
    if sign in _SPECIAL:
        return _SPECIAL[sign]
    whole = "".join(f"{group:04}" for group in struct.unpack_from(f">{count}H", value, 8))
    exponent = 4 * (weight - count + 1)
    number = Decimal((int(sign == 0x4000), tuple(map(int, whole or "0")), exponent))
    digits, _, fraction = f"{number:f}".partition(".")
    return (f"{digits}.{fraction[:scale]:0<{scale}}" if scale else digits)[:_SHOWN]


def show_date(days: int) -> str:
    """Write a date, in days since 1970, as PostgreSQL does: Python has none for some of them."""
    year, month, day = str(np.datetime64(days, "D")).rsplit("-", 2)
    if int(year) > 0:
        return f"{int(year):04}-{month}-{day}"
    return f"{1 - int(year):04}-{month}-{day} BC"


def _show_time(micros: int) -> str:
    seconds, fraction = divmod(micros, 1_000_000)
    text = f"{seconds // 3600:02}:{seconds // 60 % 60:02}:{seconds % 60:02}"
    return f"{text}.{fraction:06}".rstrip("0") if fraction else text


def _show_interval(value: bytes) -> str:
    micros, days, months = struct.unpack(">qii", value)
    if micros in (_LEAST, _MOST):
        return "infinity" if micros > 0 else "-infinity"
    parts = [f"{months} mons"] * bool(months) + [f"{days} days"] * bool(days)
    return " ".join([*parts, ("-" if micros < 0 else "") + _show_time(abs(micros))])
