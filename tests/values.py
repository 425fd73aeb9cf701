"""Values of every PostgreSQL type, and their canonical texts on both sides.

What the server holds is compared with what arrived through texts that share no code with the
decoder: the server writes most types by their binary ``send`` function, in hexadecimal, and the
tests write the Arrow or pandas value in the same form with ``struct``.
"""

from __future__ import annotations

import datetime as dt
import decimal
import json
import os
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import psycopg2
import psycopg2.extensions
import pyarrow as pa
from hypothesis import strategies as st

# Raise it to look for more than the usual run does: DASK_SHARDSQL_EXAMPLES=2000 pytest ...
EXAMPLES = int(os.environ.get("DASK_SHARDSQL_EXAMPLES", "100"))
PINNED = (
    "SET TimeZone = 'UTC'; SET DateStyle = 'ISO, MDY'; SET IntervalStyle = 'postgres'; "
    "SET extra_float_digits = 1; SET bytea_output = 'hex'"
)
_EPOCH_DAYS = (dt.date(2000, 1, 1) - dt.date(1970, 1, 1)).days
_EPOCH_MICROSECONDS = _EPOCH_DAYS * 86_400_000_000


@dataclass(frozen=True)
class Kind:
    """A type: its name in SQL, what it becomes, and texts that its input function takes.

    `canonical` is SQL that writes ``{x}`` in canonical form. `plain` are the values that any
    dtype_backend can hold; `extreme` those that only Arrow can.
    """

    sql: str
    arrow: pa.DataType
    canonical: str
    write: Callable[[Any], str]
    plain: st.SearchStrategy[str]
    extreme: tuple[str, ...] = ()

    @property
    def is_list(self) -> bool:
        return pa.types.is_list(self.arrow)

    def reference(self, column: str) -> str:
        """Return SQL for the canonical text of `column`."""
        if not self.is_list:
            return self.canonical.format(x=column)
        item = self.canonical.format(x="e")
        return (
            f"CASE WHEN {column} IS NOT NULL THEN to_json(ARRAY(SELECT {item} FROM "
            f"unnest({column}) WITH ORDINALITY AS u (e, i) ORDER BY i))::text END"
        )

    def canon(self, value: Any) -> str | None:
        """Return the canonical text of a value that arrived, in Arrow or in pandas."""
        if not self.is_list:
            return None if _is_missing(value) else self.write(value)
        if value is None or value is pd.NA:
            return None
        return json.dumps([None if _is_missing(item) else self.write(item) for item in value])

    def settle(self, text: str | None) -> str | None:
        """Return what the server wrote for `reference` as `canon` writes it."""
        return json.dumps(json.loads(text)) if self.is_list and text is not None else text


def arrow_values(column: pa.ChunkedArray | pa.Array) -> list[Any]:
    """Return Python values; dates and timestamps as integers, as Python has not all of them."""
    kind = column.type
    if pa.types.is_date32(kind):
        return column.cast(pa.int32()).to_pylist()
    if pa.types.is_timestamp(kind):
        return column.cast(pa.int64()).to_pylist()
    if pa.types.is_list(kind) and isinstance(column, pa.ChunkedArray):
        return [item for chunk in column.chunks for item in arrow_values(chunk)]
    if pa.types.is_list(kind):
        return [None if not v.is_valid else arrow_values(v.values) for v in column]
    return column.to_pylist()


def arrow_dtype(kind: pa.DataType) -> Any:
    """Return the dtype under the pyarrow backend: pandas cannot print Arrow's intervals."""
    interval = kind == pa.month_day_nano_interval()
    return np.dtype(object) if interval else pd.ArrowDtype(kind)


def pandas_values(column: pd.Series[Any]) -> list[Any]:
    """Return the values of a column under any dtype_backend, as `arrow_values` does."""
    if isinstance(column.dtype, pd.ArrowDtype):
        return arrow_values(pa.chunked_array(column.array.__arrow_array__()))
    return [None if isinstance(v, float | np.floating) and v != v else v for v in column.array]


def _is_missing(value: Any) -> bool:
    return value is None or value is pd.NA or value is pd.NaT


def _date(value: int | dt.date) -> str:
    days = value if isinstance(value, int) else (value - dt.date(1970, 1, 1)).days
    return struct.pack(">i", days - _EPOCH_DAYS).hex()


def _timestamp(value: Any) -> str:
    if isinstance(value, pd.Timestamp):
        value = value.as_unit("us")._value
    elif isinstance(value, dt.datetime):
        zone = dt.UTC if value.tzinfo else None
        value = (value - dt.datetime(1970, 1, 1, tzinfo=zone)) // dt.timedelta(microseconds=1)
    return struct.pack(">q", value - _EPOCH_MICROSECONDS).hex()


def _time(value: dt.time) -> str:
    seconds = (value.hour * 60 + value.minute) * 60 + value.second
    return struct.pack(">q", seconds * 1_000_000 + value.microsecond).hex()


def _interval(value: Any) -> str:
    if isinstance(value, pd.DateOffset):
        kwds = value.kwds
        months, days, nanoseconds = kwds["months"], kwds["days"], kwds["nanoseconds"]
    else:
        months, days, nanoseconds = value
    assert nanoseconds % 1000 == 0
    return struct.pack(">qii", nanoseconds // 1000, days, months).hex()


def _numeric(value: decimal.Decimal) -> str:
    with decimal.localcontext(prec=200):
        text = format(value, "f")
    text = text.rstrip("0").rstrip(".") if "." in text else text
    return "0" if text in ("-0", "") else text


def _text(alphabet: str | None = None, size: int = 12) -> st.SearchStrategy[str]:
    characters = (
        st.sampled_from(alphabet)
        if alphabet
        else st.one_of(
            st.sampled_from("'\"\\,;{}()%$ \t\r\n\v\fNa.é𝄞\u2028\ufeff\x01\x7f\x85"),
            st.characters(exclude_characters="\0", exclude_categories=("Cs",)),
        )
    )
    return st.text(characters, max_size=size)


def _integers(bits: int, plain_bits: int | None = None) -> tuple[Any, tuple[str, ...]]:
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    edge = 2 ** (plain_bits or bits - 1)
    plain = st.integers(max(low, -edge), min(high, edge)).map(str)
    return plain, (str(low), str(high))


def _decimals(digits: int, places: int) -> st.SearchStrategy[str]:
    most = 10**digits - 1
    return st.integers(-most, most).map(lambda n: f"{n}e{-places}")


_DATES = st.dates(dt.date(1, 1, 1), dt.date(9999, 12, 31)).map(str)
_STAMPS = st.datetimes(dt.datetime(1, 1, 2), dt.datetime(9999, 12, 30)).map(str)
_TIMES = st.times().map(str)
_INTERVALS = st.tuples(
    st.integers(-(2**31) + 12, 2**31 - 12),
    st.integers(-(2**31) + 1, 2**31 - 1),
    st.integers(-(2**53), 2**53),
).map(lambda v: "{} mons {} days {} microseconds".format(*v))
_HEX = st.binary(max_size=12).map(lambda b: "\\x" + b.hex())
_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | _text(size=5).filter(lambda t: "\\" not in t),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("ab"), inner),
    max_leaves=5,
)
_INT8, _INT8_ENDS = _integers(64, 53)
_FLOATS = (
    *("NaN", "Infinity", "-Infinity", "-0", "1e-45", "3.4028235e38", "0.1"),
    *("5e-324", "2.2250738585072014e-308", "1.7976931348623157e308"),
)
_IPS = ("0.0.0.0/0", "10.1.2.3", "10.1.0.0/16", "::1", "2001:db8::/32", "255.255.255.255/32")


def _send(function: str) -> str:
    return f"encode({function}({{x}}), 'hex')"


def _hex(form: str) -> Callable[[Any], str]:
    return lambda value: struct.pack(form, value).hex()


_AS_TEXT = "({x})::text"
# the type's output function: a cast to text would strip char(n)
_PLAIN_TEXT = "CASE WHEN {x} IS NOT NULL THEN format('%s', {x}) END"
MOODS = ("sad", "it's", 'a "b"', "comma,", "back\\slash", "{brace}", " ", "NULL", "ünï")


def scalar_kinds() -> list[Kind]:
    """Return the types that are no arrays, but for those that a test must create."""
    string = pa.string()

    def text(sql: str, plain: Any, *extreme: str) -> Kind:
        strategy = plain if isinstance(plain, st.SearchStrategy) else st.sampled_from(plain)
        return Kind(sql, string, _PLAIN_TEXT, str, strategy, extreme)

    bools = {"t": True, "f": False}
    stamps = (
        *("4714-11-24 00:00:00 BC", "0001-12-31 23:59:59.999999 BC", "0044-03-15 12:00:00 BC"),
        *("10000-01-01 00:00:00", "294247-01-10 04:00:54.775807", "0001-01-01 00:00:00"),
    )
    return [
        Kind(
            "bool",
            pa.bool_(),
            _AS_TEXT,
            lambda v: str(bool(v)).lower(),
            st.sampled_from(list(bools)),
        ),
        Kind("int2", pa.int16(), _AS_TEXT, lambda v: str(int(v)), *_integers(16)),
        Kind("int4", pa.int32(), _AS_TEXT, lambda v: str(int(v)), *_integers(32)),
        Kind("int8", pa.int64(), _AS_TEXT, lambda v: str(int(v)), _INT8, _INT8_ENDS),
        Kind(
            "oid",
            pa.uint32(),
            _AS_TEXT,
            lambda v: str(int(v)),
            st.integers(0, 2**32 - 1).map(str),
        ),
        Kind(
            "float4",
            pa.float32(),
            _send("float4send"),
            _hex(">f"),
            st.floats(width=32, allow_nan=False).map(repr),
            _FLOATS[:7],
        ),
        Kind(
            "float8",
            pa.float64(),
            _send("float8send"),
            _hex(">d"),
            st.floats(allow_nan=False).map(repr),
            _FLOATS,
        ),
        *(
            Kind(sql, arrow, "trim_scale({x})::text", _numeric, plain, extreme)
            for sql, arrow, plain, extreme in (
                ("numeric(10,2)", pa.decimal128(10, 2), _decimals(10, 2), ("-99999999.99",)),
                ("numeric(38,10)", pa.decimal128(38, 10), _decimals(38, 10), ("9" * 28,)),
                ("numeric(38,0)", pa.decimal128(38, 0), _decimals(38, 0), ("-" + "9" * 38,)),
                ("numeric(39,1)", pa.decimal256(39, 1), _decimals(39, 1), ("9" * 38 + ".9",)),
                ("numeric(76,76)", pa.decimal256(76, 76), _decimals(76, 76), ()),
                ("numeric(5,-2)", pa.decimal128(7, 0), _decimals(5, -2), ("9999949",)),
                ("numeric(2,5)", pa.decimal128(5, 5), _decimals(2, 5), ("0.00099",)),
                (
                    "numeric",
                    pa.decimal256(76, 38),
                    _decimals(40, 20),
                    ("9" * 38 + "." + "9" * 38, "-" + "9" * 38, "1e-38", "0"),
                ),
            )
        ),
        Kind(
            "date",
            pa.date32(),
            _send("date_send"),
            _date,
            _DATES,
            ("4714-11-24 BC", "0001-12-31 BC", "0004-02-29", "10000-01-01", "5874897-12-31"),
        ),
        Kind(
            "time",
            pa.time64("us"),
            _send("time_send"),
            _time,
            _TIMES,
            ("00:00", "23:59:59.999999"),
        ),
        Kind(
            "timestamp",
            pa.timestamp("us"),
            _send("timestamp_send"),
            _timestamp,
            _STAMPS,
            stamps,
        ),
        Kind(
            "timestamptz",
            pa.timestamp("us", "UTC"),
            _send("timestamptz_send"),
            _timestamp,
            _STAMPS,
            tuple(s.replace(" BC", "+00 BC") if "BC" in s else f"{s}+00" for s in stamps),
        ),
        Kind(
            "interval",
            pa.month_day_nano_interval(),
            _send("interval_send"),
            _interval,
            _INTERVALS,
            (
                *("0", "-0.000001 s", "1 mon -1 day", "-1 year 2 mons -3 days 04:05:06.789"),
                *("178956970 years 7 mons", "-178956970 years -8 mons", "2147483647 days"),
                *("2562047:47:16.854775", "-2562047:47:16.854775", "-1 days +00:00:00.5"),
            ),
        ),
        Kind(
            "bytea",
            pa.binary(),
            "encode({x}, 'hex')",
            lambda v: bytes(v).hex(),
            _HEX,
            ("\\x" + bytes(range(256)).hex(), ""),
        ),
        text("text", _text(), "", "\\.", "\\N", "NULL", '"', "'", "\r", "\n", " ", "\\", ","),
        text("varchar(5)", _text("ab'\\\"\n ,", 5)),
        text("char(5)", _text("ab'é ", 5)),
        text("name", _text("ab'\\\" ", 5)),
        text('"char"', ("a", "", " ", "\\", "\\200")),
        text("json", _JSON.map(json.dumps), '{"b" : 1, "a":[1 ,2], "b": null}', '"\\u00e9"', "1e5"),
        text("jsonb", _JSON.map(json.dumps).filter(lambda t: "\\u0000" not in t), "1e5"),
        text("uuid", st.uuids().map(str)),
        text("inet", _IPS),
        text("cidr", _IPS),
        text("macaddr", ("00:00:00:00:00:00", "ff-ff-ff-ff-ff-ff", "08002b010203")),
        text("timetz", ("24:00:00+00", "00:00:00-15:59:59", "12:34:56.789+02")),
        text("money", ("-92233720368547758.08", "0.01", "-1,000.00")),
        text("bit(5)", ("00000", "10101")),
        text("varbit", ("", "1", "0101010101")),
        text("int4range", ("empty", "(,)", "[1,3)", "[-5,-5]")),
        text("numrange", ("[1.10,2.0]", "(,NaN]", "[0,)")),
        text("tstzrange", ("[2020-01-01,infinity)", "(,0044-03-15 BC)")),
        text("daterange", ("[2020-01-01,2020-02-01)", "empty", "[0044-03-15 BC,)")),
        text("int4multirange", ("{}", "{[1,2),[5,9)}")),
        text("point", ("(1,2)", "(-0.1,1e300)")),
        text("polygon", ("((0,0),(1,1),(2,0))", "((0.5,-1))")),
        text("tsvector", ("'a b':1A,2 'c'", "")),
        text("xml", ("<a>&lt;</a>", "text")),
    ]


def array_kinds(scalars: Iterable[Kind]) -> list[Kind]:
    """Return arrays of some of the types, of one dimension."""
    wanted = {
        *("bool", "int2", "int4", "int8", "oid", "float4", "float8", "numeric", "date", "time"),
        *("timestamp", "timestamptz", "interval", "bytea", "text", "uuid", "jsonb", "int4range"),
    }
    return [array_of(kind) for kind in scalars if kind.sql in wanted]


def array_of(kind: Kind) -> Kind:
    """Return the kind of the arrays of `kind`."""
    items = st.lists(st.none() | kind.plain, max_size=4)
    return Kind(
        f"{kind.sql}[]",
        pa.list_(kind.arrow),
        kind.canonical,
        kind.write,
        items.map(array_text),
        ("{}", "{NULL,NULL}", *(array_text([value, None, value]) for value in kind.extreme)),
    )


def array_text(items: Iterable[str | None]) -> str:
    """Write an array as PostgreSQL's manual says, section 8.15.2."""

    def quoted(item: str) -> str:
        return '"' + item.replace("\\", "\\\\").replace('"', '\\"') + '"'

    return "{" + ",".join("NULL" if item is None else quoted(item) for item in items) + "}"


def open_reference(servers: Any, name: str = "reference") -> psycopg2.extensions.connection:
    """Open a connection whose session writes values as the library's sessions do."""
    connection = servers.connect(name)
    connection.autocommit = True
    with connection.cursor() as cursor:
        cursor.execute(PINNED)
    return connection
