"""Arrow values as PostgreSQL writes them: what ``CAST(value AS text)`` gives on the server.

Values never become Python objects where Arrow can write them itself: a date before year 1 is
legal in both databases and Arrow, and not in Python. Floats are Arrow's shortest form, which
reads back as the same number.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

__all__ = ["as_text", "is_number", "join"]

_YEAR_2000 = datetime.date(2000, 1, 1)
_DAYS_TO_2000 = 10_957
_DAYS_IN_400_YEARS = 146_097
_DAY = 86_400_000_000  # microseconds
_ARRAY_QUOTED = re.compile(r'[{},"\\\s]')
_ARRAY_ESCAPED = re.compile(r'(["\\])')


def is_number(kind: pa.DataType) -> bool:
    """Return whether values of that type are numbers."""
    return bool(
        pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind)
    )


def as_text(array: pa.Array) -> pa.Array:
    """Return the text of every value.

    Parameters
    ----------
    array : pyarrow.Array
        Of a type that an answer can have.

    Returns
    -------
    pyarrow.LargeStringArray
        NULL for NULL.
    """
    kind = array.type
    if pa.types.is_decimal(kind):
        return _decimals(array)
    if pa.types.is_floating(kind):
        return _floats(array)
    if pa.types.is_timestamp(kind):
        local = array.cast(pa.timestamp("us"))
        return _dates(local, _short_fractions(local), "+00" if kind.tz else "")
    if pa.types.is_date(kind):
        return _dates(array, array.cast(pa.large_string()), "")
    if pa.types.is_time(kind):
        return _short_fractions(array)
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        return _strings("\\x" + v.hex() if v is not None else None for v in array.to_pylist())
    if kind == pa.month_day_nano_interval():
        return _strings(_interval(*v) if v is not None else None for v in array.to_pylist())
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return _lists(array)
    return array.cast(pa.large_string())


def join(texts: Sequence[pa.Array | pa.Scalar], separator: str) -> pa.Array:
    """Join large strings value by value; NULL where one of them is NULL."""
    return pc.binary_join_element_wise(*texts, pa.scalar(separator, pa.large_string()))


def _strings(values: Any) -> pa.Array:
    return pa.array(values, pa.large_string())


def _floats(array: pa.Array) -> pa.Array:
    texts = array.cast(pa.large_string())
    for arrow, postgresql in (("nan", "NaN"), ("inf", "Infinity"), ("-inf", "-Infinity")):
        texts = pc.if_else(pc.equal(texts, arrow), postgresql, texts)
    return texts


def _decimals(array: pa.Array) -> pa.Array:
    texts = array.cast(pa.large_string())
    if pc.any(pc.match_substring(texts, "E")).as_py():  # how Arrow writes what is nearly zero
        texts = _strings(
            format(v.as_py(), "f") if t is not None and "E" in t else t
            for t, v in zip(texts.to_pylist(), array, strict=True)
        )
    if array.type == pa.decimal256(76, 38):  # a numeric without scale: Arrow filled it up
        texts = pc.replace_substring_regex(texts, r"(\.\d*?)0+$", r"\1")
        texts = pc.replace_substring_regex(texts, r"\.$", "")
    return texts


def _short_fractions(array: pa.Array) -> pa.Array:
    """Write times without the zeros that end a fraction of a second."""
    return pc.replace_substring_regex(
        pc.replace_substring_regex(array.cast(pa.large_string()), r"(\.\d*?)0+$", r"\1"),
        r"\.$",
        "",
    )


def _dates(array: pa.Array, texts: pa.Array, zone: str) -> pa.Array:
    """Return `texts` of the dates or timestamps in `array`, corrected where Arrow's are not right.

    Arrow writes the year 0 where PostgreSQL writes 1 BC, and nothing beyond the year 32767.
    """
    strange = pc.match_substring_regex(texts, "^(-|0000-|<)")
    texts = join([texts, pa.scalar(zone, pa.large_string())], "")
    if not pc.any(strange).as_py():
        return texts
    dates = pa.types.is_date(array.type)
    numbers = array.cast(pa.int32() if dates else pa.int64()).to_pylist()
    written = texts.to_pylist()
    for number in pc.indices_nonzero(pc.fill_null(strange, False)).to_pylist():
        days, time = (numbers[number], 0) if dates else divmod(numbers[number], _DAY)
        clock = "" if dates else f" {_clock(time)}{zone}"
        year, day = _civil(days)
        written[number] = f"{year if year > 0 else 1 - year:04}{day}{clock}{' BC' * (year < 1)}"
    return _strings(written)


def _civil(days: int) -> tuple[int, str]:
    """Return the year (0 is 1 BC), and ``-mm-dd``, of the day that many days after 1970-01-01.

    The Gregorian calendar repeats every 400 years, so that Python's years 2000 to 2399 do.
    """
    cycle, day = divmod(days - _DAYS_TO_2000, _DAYS_IN_400_YEARS)
    date = _YEAR_2000 + datetime.timedelta(days=day)
    return date.year + 400 * cycle, f"-{date.month:02}-{date.day:02}"


def _interval(months: int, days: int, nanoseconds: int) -> str:
    """Write an interval in the style ``postgres`` (PostgreSQL manual, section 8.5.5)."""
    years = abs(months) // 12 * (1 if months >= 0 else -1)
    parts = []
    negative = False
    for value, unit in ((years, "year"), (months - 12 * years, "mon"), (days, "day")):
        if value:
            plus = "+" if negative and value > 0 else ""
            parts.append(f"{plus}{value} {unit}{'' if value == 1 else 's'}")
            negative = value < 0
    if nanoseconds or not parts:
        sign = "-" if nanoseconds < 0 else "+" if negative else ""
        parts.append(sign + _clock(abs(nanoseconds) // 1000))
    return " ".join(parts)


def _clock(microseconds: int) -> str:
    seconds, fraction = divmod(microseconds, 1_000_000)
    clock = f"{seconds // 3600:02}:{seconds // 60 % 60:02}:{seconds % 60:02}"
    return clock + f".{fraction:06}".rstrip("0").rstrip(".")


def _lists(array: pa.Array) -> pa.Array:
    """Write arrays as literals (PostgreSQL manual, section 8.15.6)."""
    flat = array.flatten()
    texts = as_text(flat).to_pylist()
    if pa.types.is_boolean(flat.type):
        texts = [t and t[0] for t in texts]
    elements = iter(texts)
    written: list[str | None] = []
    for length in pc.list_value_length(array).to_pylist():
        if length is None:
            written.append(None)
        else:
            written.append("{" + ",".join(_element(next(elements)) for _ in range(length)) + "}")
    return _strings(written)


def _element(text: str | None) -> str:
    if text is None:
        return "NULL"
    if text == "" or text.upper() == "NULL" or _ARRAY_QUOTED.search(text):
        return '"' + _ARRAY_ESCAPED.sub(r"\\\1", text) + '"'
    return text
