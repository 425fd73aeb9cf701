"""What the drivers of Python modules share: rows of Python values -> Arrow, parameters, names.

Values become Arrow exactly, or an error names the value. ``pyarrow.array`` alone is not enough: it
makes 1 of 1.5 where an integer is asked for, a date of a timestamp, bytes of a text. So a column
goes to it as a whole only when every value is of a class that it takes without a change;
otherwise its values are looked at one by one.
"""

from __future__ import annotations

import datetime as dt
import math
import re
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal, InvalidOperation
from typing import Any
from uuid import UUID

import pyarrow as pa

from dask_shardsql.engine.drivers.base import Columns, OnBatch
from dask_shardsql.errors import ColumnError, ParameterError, UnrepresentableValueError
from dask_shardsql.sql.types import Column, arrow_schema

__all__ = [
    "double_quoted",
    "each_param",
    "folded",
    "plain_params",
    "plain_value",
    "read_rows",
    "to_array",
]

_BATCH_BYTES = 8 << 20
_FIRST_ROWS = 256
_MOST_ROWS = 65_536
_DATE = re.compile(r"\d{4}-\d\d-\d\d")
_TIME = re.compile(r"\d\d:\d\d(:\d\d(\.\d{1,6})?)?")
_TIMESTAMP = re.compile(r"\d{4}-\d\d-\d\d([ T]\d\d:\d\d(:\d\d(\.\d{1,6})?)?(Z|[+-]\d\d:\d\d)?)?")
_REFUSED = (pa.ArrowException, ArithmeticError, InvalidOperation, TypeError, ValueError)
_MICROSECONDS = {"s": 1_000_000, "ms": 1000, "us": 1, "ns": 1}


def read_rows(
    fetch: Callable[[int], Sequence[Sequence[Any]]],
    columns: Columns,
    unrepresentable: str,
    on_batch: OnBatch,
) -> None:
    """Read all the rows in batches of about 8 MiB.

    Parameters
    ----------
    fetch : callable
        A cursor's ``fetchmany``.
    columns : tuple of Column
        The columns, with the Arrow types to deliver.
    unrepresentable : {"raise", "null"}
        What becomes of a value that its Arrow type cannot hold.
    on_batch : callable
        Called with every batch.

    Raises
    ------
    UnrepresentableValueError
        At the first value that its Arrow type cannot hold.
    """
    schema = arrow_schema(columns)
    rows = nbytes = 0
    size = _FIRST_ROWS
    while chunk := fetch(size):
        by_column = zip(zip(*chunk, strict=True), columns, strict=True)
        arrays = [to_array(values, column, unrepresentable) for values, column in by_column]
        batch = pa.RecordBatch.from_arrays(arrays, schema=schema)
        rows += batch.num_rows
        nbytes += batch.nbytes
        on_batch(batch)
        fitting = _BATCH_BYTES * rows // max(nbytes, 1)
        size = max(1, min(_MOST_ROWS, fitting, 8 * size))


def to_array(values: Sequence[Any], column: Column, unrepresentable: str = "raise") -> Any:
    """Return the values as an Arrow array of the column's type.

    Parameters
    ----------
    values : sequence
        What the database module returned.
    column : Column
        Its Arrow type is the type of what comes back.
    unrepresentable : {"raise", "null"}
        What becomes of a value that the Arrow type cannot hold.

    Raises
    ------
    UnrepresentableValueError
        At the first such value.
    """
    kind = column.arrow_type
    as_they_are, convert = _rule(kind)
    classes = set(map(type, values)) - {type(None)}
    if as_they_are is None or classes <= as_they_are:
        try:
            return pa.array(values, kind)
        except _REFUSED:
            pass  # find out below which value it is
    converted = [_one(value, convert, column, unrepresentable) for value in values]
    return pa.array(converted, kind)


def double_quoted(name: str) -> str:
    """Return `name` as an identifier of standard SQL.

    Raises
    ------
    ColumnError
        It holds a NUL character.
    """
    if "\0" in name:
        raise ColumnError(f"the name {name!r} holds a NUL character, which no identifier may")
    return '"' + name.replace('"', '""') + '"'


def folded(name: str) -> str:
    """Return a name with its ASCII letters in lower case: SQLite and DuckDB tell no other apart."""
    return name.encode("utf-8", "surrogatepass").lower().decode("utf-8", "surrogatepass")


def plain_params(params: Any, adapt: Callable[[Any], Any] | None = None) -> Any:
    """Return the parameters as a tuple or dict of Python values, or None for none.

    Parameters
    ----------
    params : sequence or mapping, optional
        What the caller gave.
    adapt : callable, optional
        Makes a value the module takes of a Python value.

    Raises
    ------
    ParameterError
        It is neither a sequence nor a mapping.
    """

    def one(value: Any) -> Any:
        value = plain_value(value)
        return adapt(value) if adapt else value

    return None if params is None else each_param(params, one)


def each_param(params: Any, make: Callable[[Any], Any]) -> Any:
    """Return what is made of each parameter's value, as a tuple or dict.

    Raises
    ------
    ParameterError
        It is neither a sequence nor a mapping.
    """
    if isinstance(params, Mapping):
        return {key: make(value) for key, value in params.items()}
    if isinstance(params, str | bytes) or not hasattr(params, "__iter__"):
        raise ParameterError(
            f"params must be a sequence or a mapping of values, not {type(params).__name__}"
        )
    return tuple(make(value) for value in params)


def plain_value(value: Any) -> Any:
    """Return a parameter of pandas, NumPy or Arrow as the Python value it stands for."""
    import numpy as np
    import pandas as pd

    if value is pd.NA or value is pd.NaT:
        return None
    if isinstance(value, pa.Scalar):
        return value.as_py()
    if isinstance(value, np.datetime64):
        value = pd.Timestamp(value)
    if isinstance(value, pd.Timestamp):
        if value.nanosecond:
            raise ParameterError(f"the parameter {value} has nanoseconds: round it to microseconds")
        return value.to_pydatetime()
    return value.item() if isinstance(value, np.generic) else value


def _one(value: Any, convert: Callable[[Any], Any], column: Column, otherwise: str) -> Any:
    if value is None:
        return None
    try:
        result = convert(value)
        pa.scalar(result, column.arrow_type)
        return result
    except _REFUSED:
        if otherwise == "null":
            return None
    text = value if isinstance(value, str) else repr(value)
    shown = text[:80].encode("utf-8", "backslashreplace").decode()
    raise UnrepresentableValueError(column.name, shown, str(column.arrow_type))


def _rule(kind: pa.DataType) -> tuple[set[type] | None, Callable[[Any], Any]]:
    """Return the classes whose values Arrow takes unchanged, and what converts any other one."""
    types = pa.types
    if types.is_integer(kind):
        return {int}, _integer
    if types.is_float64(kind):
        return {float}, _float
    if types.is_floating(kind):
        largest = 65504.0 if types.is_float16(kind) else 3.4028235677973366e38
        return set(), lambda value: _narrow_float(value, largest)
    if types.is_boolean(kind):
        return {bool}, _boolean
    if types.is_string(kind) or types.is_large_string(kind):
        return {str}, _text
    if types.is_binary(kind) or types.is_large_binary(kind):
        return {bytes}, _bytes
    if types.is_decimal(kind):
        return {Decimal}, _decimal
    if types.is_date(kind):
        return {dt.date}, _date
    if types.is_timestamp(kind):
        return set(), lambda value: _timestamp(value, kind)
    if types.is_time(kind):
        return set(), lambda value: _time(value, kind)
    return None, lambda value: value


def _integer(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int | float | Decimal):
        raise TypeError(value)
    if int(value) != value:
        raise ValueError(value)
    return int(value)


def _float(value: Any) -> float:
    if isinstance(value, int) and not isinstance(value, bool) and int(float(value)) != value:
        raise ValueError(value)
    if isinstance(value, bool) or not isinstance(value, int | float | Decimal):
        raise TypeError(value)
    return float(value)


def _narrow_float(value: Any, largest: float) -> float:
    number = _float(value)
    if math.isfinite(number) and abs(number) >= largest:
        raise OverflowError(value)
    return number


def _boolean(value: Any) -> bool:
    if isinstance(value, int) and value in (0, 1):
        return bool(value)
    raise TypeError(value)


def _text(value: Any) -> str:
    if isinstance(value, str | UUID):
        return str(value)
    raise TypeError(value)


def _bytes(value: Any) -> bytes:
    if isinstance(value, bytes | bytearray | memoryview):
        return bytes(value)
    raise TypeError(value)


def _decimal(value: Any) -> Decimal:
    """Take a float as its shortest decimal form, which is what was written into the database."""
    if isinstance(value, bool) or not isinstance(value, int | float | str | Decimal):
        raise TypeError(value)
    return Decimal(repr(value) if isinstance(value, float) else value)


def _date(value: Any) -> dt.date:
    if isinstance(value, str) and _DATE.fullmatch(value):
        return dt.date.fromisoformat(value)
    if isinstance(value, dt.datetime):
        if value.tzinfo is None and value.time() == dt.time():
            return value.date()
        raise ValueError(value)
    if isinstance(value, dt.date):
        return value
    raise TypeError(value)


def _timestamp(value: Any, kind: pa.DataType) -> dt.datetime:
    if isinstance(value, str) and _TIMESTAMP.fullmatch(value):
        value = dt.datetime.fromisoformat(value)
    elif isinstance(value, dt.date) and not isinstance(value, dt.datetime):
        value = dt.datetime(value.year, value.month, value.day)
    if not isinstance(value, dt.datetime):
        raise TypeError(value)
    if (value.tzinfo is None) != (kind.tz is None) or value.microsecond % _MICROSECONDS[kind.unit]:
        raise ValueError(value)
    return value


def _time(value: Any, kind: pa.DataType) -> dt.time:
    if isinstance(value, str) and _TIME.fullmatch(value):
        value = dt.time.fromisoformat(value)
    elif isinstance(value, dt.timedelta) and dt.timedelta() <= value < dt.timedelta(days=1):
        value = (dt.datetime.min + value).time()  # how MySQL's modules return a TIME
    if not isinstance(value, dt.time):
        raise TypeError(value)
    if value.tzinfo is not None or value.microsecond % _MICROSECONDS[kind.unit]:
        raise ValueError(value)
    return value
