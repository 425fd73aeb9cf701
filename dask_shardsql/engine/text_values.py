"""PostgreSQL's text form of values -> Arrow arrays, exact or an error that names the value.

Whole arrays go through Arrow's own casts. Where one of them fails, the values are looked at one
by one: years before 1 and after 9999 are read here, and what no Arrow value can express is
reported (or becomes NULL). Text forms: PostgreSQL manual, sections 8.4 to 8.6 and 8.15.
"""

from __future__ import annotations

import decimal
import re
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from dask_shardsql.errors import ColumnError, UnrepresentableValueError
from dask_shardsql.sql.types import Column

__all__ = ["decode_text"]

_MICROSECONDS_PER_DAY = 86_400_000_000
_BOOLEANS = {"t": True, "true": True, "f": False, "false": False}
_NUMBER = re.compile(r"[+-]?\d+(?:\.\d*)?(?:e[+-]?\d+)?", re.ASCII)
_DECIMAL_DIGITS = {32: 9, 64: 18, 128: 38, 256: 76}
# Wide enough for any decimal of Arrow's; a digit that would be lost is an error.
_EXACT = decimal.Context(prec=100, traps=[decimal.InvalidOperation, decimal.Inexact])
_DATE = re.compile(r"(\d{4,7})-(\d\d)-(\d\d)")
_TIME = re.compile(r"(\d\d):(\d\d):(\d\d)(?:\.(\d{1,6}))?")
_INTERVAL = re.compile(
    r"(?:([+-]?\d+) years? ?)?(?:([+-]?\d+) mons? ?)?(?:([+-]?\d+) days? ?)?"
    r"(?:([+-]?)(\d+):(\d\d):(\d\d)(?:\.(\d{1,6}))?)?"
)


def decode_text(texts: pa.Array, column: Column, unrepresentable: str = "raise") -> pa.Array:
    """Return the values whose text forms are `texts`.

    Parameters
    ----------
    texts : pyarrow.StringArray
        As the server writes them; NULL for NULL.
    column : Column
        Its Arrow type is the type of what comes back.
    unrepresentable : {"raise", "null"}
        What becomes of a value that the Arrow type cannot hold.

    Raises
    ------
    UnrepresentableValueError
        At the first such value.
    ColumnError
        The Arrow type has no form in PostgreSQL.
    """
    kind = column.arrow_type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return texts.cast(kind)
    if pa.types.is_list(kind):
        return _decode_arrays(texts, column, unrepresentable)
    try:
        if pa.types.is_time(kind):
            return _whole_times(texts).cast(kind)
        if _casts(kind) and (not pa.types.is_decimal(kind) or _casts_exactly(texts, kind)):
            return texts.cast(kind)
    except pa.ArrowInvalid:
        pass  # find out below which value it is
    parse = _parser(column)
    values = [_one(text, parse, column, unrepresentable) for text in texts.to_pylist()]
    return pa.array(values, kind)


def _casts(kind: pa.DataType) -> bool:
    return bool(
        pa.types.is_integer(kind)
        or pa.types.is_floating(kind)
        or pa.types.is_decimal(kind)
        or pa.types.is_date(kind)
        or pa.types.is_timestamp(kind)
    )


def _casts_exactly(texts: pa.Array, kind: pa.DataType) -> bool:
    """Whether Arrow can be trusted with these numbers: digits beyond its limit wrap round."""
    limit = _DECIMAL_DIGITS[kind.bit_width] - max(kind.scale, 0)
    if (pc.max(pc.binary_length(texts)).as_py() or 0) > limit:
        digits = pc.replace_substring_regex(texts, "^[+-]?0*", "")
        point = pc.find_substring(digits, ".")
        length = pc.binary_length(digits)
        whole = pc.if_else(pc.less(point, 0), length, point)
        if (pc.max(whole).as_py() or 0) > limit or (
            pc.max(length).as_py() or 0
        ) > limit + kind.scale:
            return False
    return not pc.any(pc.match_substring(texts, "e", ignore_case=True)).as_py()


def _whole_times(texts: pa.Array) -> pa.Array:
    """Cast ``hh:mm:ss.ffffff``, which Arrow reads only behind a date."""
    day = pa.scalar("1970-01-01")
    return pc.binary_join_element_wise(day, texts, " ").cast(pa.timestamp("us"))


def _one(text: str | None, parse: Callable[[str], Any], column: Column, otherwise: str) -> Any:
    if text is None:
        return None
    try:
        return parse(text)
    except (pa.ArrowInvalid, ValueError, KeyError, ArithmeticError):
        if otherwise == "null":
            return None
    raise UnrepresentableValueError(column.name, text[:80], str(column.arrow_type))


def _parser(column: Column) -> Callable[[str], Any]:
    kind = column.arrow_type
    if pa.types.is_boolean(kind):
        return _BOOLEANS.__getitem__
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        return _bytea
    if pa.types.is_time(kind):
        return lambda text: _fit(_time(text), pa.time64("us"), kind, below=_MICROSECONDS_PER_DAY)
    if pa.types.is_date(kind):
        return lambda text: _fit(_date(text), pa.date32(), kind)
    if pa.types.is_timestamp(kind):
        return lambda text: _fit(_timestamp(text), pa.timestamp("us", kind.tz), kind)
    if kind == pa.month_day_nano_interval():
        return _interval
    if pa.types.is_decimal(kind):
        return lambda text: _decimal(text, kind)
    if _casts(kind):
        return lambda text: pa.scalar(text).cast(kind)
    raise ColumnError(
        f"column {column.name!r} ({column.type_name}) cannot be read as {kind}: there is no way "
        "from its text form to that type",
        (column.name,),
    )


def _fit(value: int, unit: pa.DataType, kind: pa.DataType, below: int | None = None) -> Any:
    """Return an integer in `unit` as a scalar of `kind`, or raise when it does not fit."""
    if below is not None and value >= below:
        raise ValueError(value)
    storage = pa.int32() if pa.types.is_date32(unit) else pa.int64()
    return pa.scalar(value, storage).cast(unit).cast(kind)


def _decimal(text: str, kind: pa.DataType) -> decimal.Decimal:
    if not _NUMBER.fullmatch(text):
        raise ValueError(text)
    value = decimal.Decimal(text).quantize(decimal.Decimal(1).scaleb(-kind.scale), context=_EXACT)
    if value and value.adjusted() >= kind.precision - kind.scale:
        raise OverflowError(text)
    return value


def _bytea(text: str) -> bytes:
    if not text.startswith("\\x"):
        raise ValueError(text)
    return bytes.fromhex(text[2:])


def _date(text: str) -> int:
    """Return days since 1970-01-01 in the proleptic Gregorian calendar."""
    body = text.removesuffix(" BC")
    match = _DATE.fullmatch(body)
    if not match:
        raise ValueError(text)
    year, month, day = (int(part) for part in match.groups())
    return _days(year if body == text else 1 - year, month, day)


def _timestamp(text: str) -> int:
    """Return microseconds since 1970-01-01 00:00; the zone is UTC or none."""
    body = text.removesuffix(" BC")
    date, _, time = body.removesuffix("+00").partition(" ")
    era = "" if body == text else " BC"
    return _date(date + era) * _MICROSECONDS_PER_DAY + (_time(time) if time else 0)


def _time(text: str) -> int:
    match = _TIME.fullmatch(text)
    if not match:
        raise ValueError(text)
    hours, minutes, seconds, fraction = match.groups()
    whole = int(hours) * 3600 + int(minutes) * 60 + int(seconds)
    return whole * 1_000_000 + int((fraction or "").ljust(6, "0"))


def _interval(text: str) -> tuple[int, int, int]:
    match = _INTERVAL.fullmatch(text)
    if not match or not text:
        raise ValueError(text)
    years, months, days, sign, hours, minutes, seconds, fraction = match.groups()
    whole = int(hours or 0) * 3600 + int(minutes or 0) * 60 + int(seconds or 0)
    nanoseconds = (whole * 1_000_000 + int((fraction or "").ljust(6, "0"))) * 1000
    if nanoseconds >= 2**63:
        raise OverflowError(text)
    return (
        int(years or 0) * 12 + int(months or 0),
        int(days or 0),
        -nanoseconds if sign == "-" else nanoseconds,
    )


def _days(year: int, month: int, day: int) -> int:
    """Return days since 1970-01-01 (H. Hinnant, "chrono-Compatible Low-Level Date Algorithms")."""
    year -= month <= 2
    era, year_of_era = divmod(year, 400)
    day_of_year = (153 * (month + (-3 if month > 2 else 9)) + 2) // 5 + day - 1
    return (
        era * 146_097
        + year_of_era * 365
        + year_of_era // 4
        - year_of_era // 100
        + day_of_year
        - 719_468
    )


def _decode_arrays(texts: pa.Array, column: Column, unrepresentable: str) -> pa.Array:
    element = Column(column.name, column.type_name, column.arrow_type.value_type)
    offsets, flat = [0], []  # type: list[int], list[str | None]
    missing = []
    for text in texts.to_pylist():
        items = _one(text, _items, column, unrepresentable)
        missing.append(items is None)
        flat += items or []
        offsets.append(len(flat))
    values = decode_text(pa.array(flat, pa.string()), element, unrepresentable)
    return pa.ListArray.from_arrays(
        pa.array(offsets, pa.int32()), values, column.arrow_type, mask=pa.array(missing, pa.bool_())
    )


def _items(text: str) -> list[str | None]:
    """Return the texts of the elements of an array of one dimension."""
    from psycopg2 import DataError
    from psycopg2.extensions import UNICODEARRAY

    try:
        items: list[str | None] = UNICODEARRAY(text, None)
    except DataError as error:
        raise ValueError(text) from error
    if any(isinstance(item, list) for item in items):
        raise ValueError(text)
    return items
