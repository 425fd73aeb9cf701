"""Database types -> Arrow types -> pandas dtypes.

==============================  ==============================================================
PostgreSQL                      Arrow
==============================  ==============================================================
bool                            bool
int2, int4, int8, oid           int16, int32, int64, uint32
float4, float8                  float, double
numeric(p, s), p <= 38          decimal128(p, s)
numeric(p, s), p <= 76          decimal256(p, s)
numeric                         decimal256(76, 38): 38 digits before the point and 38 after it
date                            date32
time                            time64[us]
timestamp, timestamptz          timestamp[us], timestamp[us, UTC]
interval                        month_day_nano_interval
bytea                           binary
one-dimensional array of these  list of these
everything else                 string: the value's text (text, char(n), enums, json, uuid, inet,
                                ranges, composites, timetz, money, bit, geometry, ...)
==============================  ==============================================================

A domain counts as the type under it. The elements of an array have no precision of their own:
those of ``numeric(10,2)[]`` are decimal256(76, 38). An array's lower bound is not kept. Dates and
timestamps before year 1 and after year 9999 are held, though Python has none.

A value that its Arrow type cannot hold (numeric ``NaN`` and infinities or more digits than
38 + 38, dates and timestamps at infinity, timestamps after 294247-01-10 04:00:54.775807,
``24:00:00``, intervals at infinity or whose time exceeds 292 years, an array of two dimensions)
is an :class:`~dask_shardsql.UnrepresentableValueError`, or NULL where that was asked for; no
digit is lost silently.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa

from dask_shardsql.config import DTYPE_BACKENDS
from dask_shardsql.errors import ColumnError, ConfigurationError

__all__ = [
    "Column",
    "arrow_schema",
    "arrow_type_of",
    "override_types",
    "pandas_dtype_mapper",
    "unconstrained_numeric",
]

_ARROW_TYPES = {
    "bool": pa.bool_(),
    "int2": pa.int16(),
    "int4": pa.int32(),
    "int8": pa.int64(),
    "oid": pa.uint32(),
    "float4": pa.float32(),
    "float8": pa.float64(),
    "date": pa.date32(),
    "time": pa.time64("us"),
    "timestamp": pa.timestamp("us"),
    "timestamptz": pa.timestamp("us", "UTC"),
    "interval": pa.month_day_nano_interval(),
    "bytea": pa.binary(),
}


@dataclass(frozen=True)
class Column:
    """One column of an answer, as a server describes it.

    Parameters
    ----------
    name : str
        Its name.
    type_name : str
        Its type as the database writes it: ``int8``, ``numeric(15,2)``, ``shop.mood[]``.
    arrow_type : pyarrow.DataType
        What it becomes.
    nullable : bool, default True
        False when the database guarantees that it holds no NULL.
    """

    name: str
    type_name: str
    arrow_type: pa.DataType
    nullable: bool = True

    def __hash__(self) -> int:
        return hash((self.name, self.type_name))  # an Arrow type writes itself out to be hashed


def unconstrained_numeric() -> pa.DataType:
    """Return the Arrow type of a numeric without precision: 38 digits on each side."""
    return pa.decimal256(76, 38)


def arrow_type_of(
    type_name: str, precision: int | None = None, scale: int | None = None
) -> pa.DataType:
    """Return the Arrow type of a PostgreSQL type.

    Parameters
    ----------
    type_name : str
        Name in ``pg_type``; ``[]`` behind it for an array.
    precision, scale : int, optional
        Of a numeric, in decimal digits. The scale may be negative or exceed the precision
        (PostgreSQL manual, section 8.1.2).
    """
    if type_name.endswith("[]"):
        return pa.list_(arrow_type_of(type_name[:-2]))
    if type_name != "numeric":
        return _ARROW_TYPES.get(type_name, pa.string())
    if precision is None:
        return unconstrained_numeric()
    digits, places = precision, scale or 0
    if places < 0:
        digits, places = digits - places, 0
    digits = max(digits, places)
    if digits <= 38:
        return pa.decimal128(digits, places)
    return pa.decimal256(digits, places) if digits <= 76 else pa.string()


def arrow_schema(columns: Sequence[Column]) -> pa.Schema:
    """Return the Arrow schema of `columns`."""
    return _schema_of(tuple(columns))


@functools.lru_cache(maxsize=256)
def _schema_of(columns: tuple[Column, ...]) -> pa.Schema:
    return pa.schema([pa.field(c.name, c.arrow_type, c.nullable) for c in columns])


def override_types(
    columns: Sequence[Column], types: Mapping[str, Any] | None
) -> tuple[Column, ...]:
    """Give the named columns other Arrow types.

    Parameters
    ----------
    columns : sequence of Column
        As the servers describe them.
    types : mapping of str to pyarrow.DataType or str
        By column name; a text such as ``"float64"`` or ``"decimal128(38, 4)"`` names the type.

    Raises
    ------
    ColumnError
        A column is not in the answer, or has no type that anyone has named (Arrow's null type).
    ConfigurationError
        A type has no such name.
    """
    if not types and not any(pa.types.is_null(column.arrow_type) for column in columns):
        return tuple(columns)
    wanted = {name: _data_type(name, value) for name, value in (types or {}).items()}
    unknown = tuple(sorted(set(wanted) - {column.name for column in columns}))
    if unknown:
        raise ColumnError(
            f"types names columns that the query does not return: {', '.join(unknown)}; it returns "
            f"{', '.join(column.name for column in columns)}",
            unknown,
        )
    chosen = tuple(
        replace(column, arrow_type=wanted.get(column.name, column.arrow_type)) for column in columns
    )
    untyped = tuple(column.name for column in chosen if pa.types.is_null(column.arrow_type))
    if untyped:
        one = untyped[0]
        raise ColumnError(
            f"the database gives no type to {', '.join(map(repr, untyped))} before a row is read. "
            f"Name one with types={{{one!r}: 'int64'}}, or cast it in the query: "
            f"CAST(... AS INTEGER) AS {one}",
            untyped,
        )
    return chosen


def _data_type(column: str, value: Any) -> pa.DataType:
    if isinstance(value, pa.DataType):
        return value
    decimal = re.fullmatch(r"(decimal(?:128|256))\((\d+), ?(-?\d+)\)", str(value).strip())
    zoned = re.fullmatch(r"timestamp\[(s|ms|us|ns), ?(?:tz=)?(\S+)\]", str(value).strip())
    try:
        if zoned:
            return pa.timestamp(zoned[1], zoned[2])
        if decimal:
            factory: Callable[[int, int], pa.DataType] = getattr(pa, decimal[1])
            return factory(int(decimal[2]), int(decimal[3]))
        return pa.type_for_alias(str(value).strip())
    except (ValueError, pa.ArrowInvalid) as error:
        raise ConfigurationError(
            f"types gives column {column!r} the type {value!r}, which is no Arrow type: use a "
            "pyarrow.DataType, or a name such as 'int64', 'float64' or 'decimal128(38, 4)'"
        ) from error


def pandas_dtype_mapper(dtype_backend: str) -> Callable[[pa.DataType], Any] | None:
    """Return what maps an Arrow type to a pandas extension dtype, or to None for NumPy's own.

    Parameters
    ----------
    dtype_backend : {"pyarrow", "numpy_nullable", "numpy"}
        As pandas' readers name it; ``numpy`` is pandas without an extension dtype.

    Raises
    ------
    ConfigurationError
        There is no such backend.
    """
    import pandas as pd

    if dtype_backend not in DTYPE_BACKENDS:
        raise ConfigurationError(
            f"dtype_backend is {dtype_backend!r}; it must be one of {', '.join(DTYPE_BACKENDS)}"
        )
    if dtype_backend == "pyarrow":
        # pandas cannot print an Arrow interval: those become pandas.DateOffset objects
        return lambda kind: None if pa.types.is_interval(kind) else pd.ArrowDtype(kind)
    if dtype_backend == "numpy":
        return None
    nullable: dict[pa.DataType, Any] = {
        pa.bool_(): pd.BooleanDtype(),
        pa.int8(): pd.Int8Dtype(),
        pa.int16(): pd.Int16Dtype(),
        pa.int32(): pd.Int32Dtype(),
        pa.int64(): pd.Int64Dtype(),
        pa.uint8(): pd.UInt8Dtype(),
        pa.uint16(): pd.UInt16Dtype(),
        pa.uint32(): pd.UInt32Dtype(),
        pa.uint64(): pd.UInt64Dtype(),
        pa.float32(): pd.Float32Dtype(),
        pa.float64(): pd.Float64Dtype(),
        pa.string(): pd.StringDtype(),
        pa.large_string(): pd.StringDtype(),
    }
    return nullable.get
