"""Arrow tables -> pandas DataFrames whose dtypes depend on the columns, never on the rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from dask_shardsql.engine.copy_values import show_date
from dask_shardsql.engine.fetch import Answer
from dask_shardsql.errors import ColumnError, UnrepresentableValueError
from dask_shardsql.sql.types import Column, pandas_dtype_mapper

__all__ = ["to_pandas"]

_LAST_EXACT_INTEGER = 2**53  # of float64
_FIRST_DAY, _LAST_DAY = -719_162, 2_932_896  # of datetime.date: 0001-01-01 and 9999-12-31


def to_pandas(
    table: pa.Table, answer: Answer, dtype_backend: str, shard: str | None = None
) -> pd.DataFrame:
    """Return `table` as a DataFrame.

    Parameters
    ----------
    table : pyarrow.Table
        Of the answer's schema.
    answer : Answer
        What the columns are.
    dtype_backend : {"pyarrow", "numpy_nullable", "numpy"}
        ``pyarrow`` keeps every Arrow type but intervals, which pandas cannot print: they are
        ``pandas.DateOffset`` objects. ``numpy_nullable`` has pandas' nullable dtypes for
        integers, floats, booleans and text, and NumPy's for the others. ``numpy`` has ``int64``
        and ``bool`` only for columns that the database guarantees to hold no NULL; other
        integers become ``float64``, other booleans ``object``. Under the last two, decimals,
        dates, times, bytes and intervals are objects, and an array is a list of Python values.
    shard : str, optional
        Where the table came from, for the error.

    Raises
    ------
    UnrepresentableValueError
        ``numpy`` cannot hold an integer beyond 2**53 in ``float64``; neither it nor
        ``numpy_nullable`` can hold a date before year 1 or after year 9999. Where
        ``unrepresentable`` is ``"null"``, such a value is NULL instead.
    ColumnError
        A NULL, under ``numpy``, where the database had guaranteed none (an outer join does that).

    Notes
    -----
    Under ``pyarrow`` a date or a timestamp may lie outside the years 1 to 9999, where Python has
    none: comparing, sorting, grouping and writing Parquet work, but whatever makes a Python value
    of it (printing a date, ``tolist``) is an ``OverflowError`` of pandas. Nor does pandas print,
    under the other two, a timestamp with time zone outside those years.
    """
    mapper = pandas_dtype_mapper(dtype_backend)
    frame: pd.DataFrame
    if dtype_backend == "pyarrow":
        frame = table.to_pandas(types_mapper=mapper, ignore_metadata=True)
        return frame
    objects: dict[str, pd.Series[Any]] = {}
    for number, column in enumerate(answer.columns):
        if pa.types.is_list(column.arrow_type):
            items = _python_lists(table.column(number), column, answer, dtype_backend, shard)
            objects[column.name] = pd.Series(items, dtype=object)
            table = _set(table, number, pa.nulls(len(table)))
        else:
            table = _set(table, number, _fitted(table, number, answer, dtype_backend, shard))
    frame = table.to_pandas(types_mapper=mapper, date_as_object=True, ignore_metadata=True)
    for column in answer.columns if dtype_backend == "numpy" else ():
        if column.nullable and pa.types.is_boolean(column.arrow_type):
            objects[column.name] = frame[column.name].astype(object)
    for name, values in objects.items():
        frame[name] = values
    return frame


def _fitted(
    table: pa.Table, number: int, answer: Answer, dtype_backend: str, shard: str | None
) -> pa.ChunkedArray:
    """Return a column that becomes the same NumPy dtype whether there are NULLs in it or not."""
    column, values = answer.columns[number], table.column(number)
    kind = column.arrow_type
    if pa.types.is_date(kind):
        days = values.cast(pa.date32()).cast(pa.int32())
        bad = pc.or_(pc.less(days, _FIRST_DAY), pc.greater(days, _LAST_DAY))
        target = f"datetime.date under dtype_backend={dtype_backend!r}"
        return _without(values, bad, _show_date, column, target, answer, shard)
    integer = pa.types.is_integer(kind)
    if dtype_backend != "numpy" or not (integer or pa.types.is_boolean(kind)):
        return values
    if not column.nullable:
        if values.null_count:
            raise ColumnError(
                f"column {column.name!r} is NOT NULL in its table, but the query makes NULLs of it "
                f"and dtype_backend='numpy' has no NULL in {kind}. Use 'pyarrow' or "
                f"'numpy_nullable', or types={{{column.name!r}: 'float64'}}",
                (column.name,),
            )
        return values
    if not integer:
        return values
    if kind.bit_width == 64:
        bad = pc.greater(values, pa.scalar(_LAST_EXACT_INTEGER, kind))
        if pa.types.is_signed_integer(kind):
            bad = pc.or_(bad, pc.less(values, pa.scalar(-_LAST_EXACT_INTEGER, kind)))
        target = "float64 under dtype_backend='numpy'"
        values = _without(values, bad, lambda v: str(v.as_py()), column, target, answer, shard)
    return values.cast(pa.float64())


def _without(
    values: pa.ChunkedArray,
    bad: pa.ChunkedArray,
    show: Callable[[pa.Scalar], str],
    column: Column,
    target: str,
    answer: Answer,
    shard: str | None,
) -> pa.ChunkedArray:
    """Return `values` with NULL where they are `bad`, or raise for the first that is."""
    first = pc.index(bad, True).as_py()
    if first < 0:
        return values
    if answer.query.unrepresentable == "null":
        return pc.if_else(bad, pa.scalar(None, values.type), values)
    raise UnrepresentableValueError(column.name, show(values[first]), target, shard)


def _python_lists(
    values: pa.ChunkedArray, column: Column, answer: Answer, dtype_backend: str, shard: str | None
) -> list[list[Any] | None]:
    """Return lists of Python values: an array of NumPy would be of float64 where there is a NULL.

    That would lose digits of large integers, and time zones.
    """
    try:
        lists: list[list[Any] | None] = values.to_pylist()
        if values.type.value_type != pa.month_day_nano_interval():
            return lists
        return [items if items is None else [_offset(i) for i in items] for items in lists]
    except (ValueError, OverflowError):
        pass  # find out below which value it is
    otherwise, lists = answer.query.unrepresentable, []
    for value in values:
        try:
            lists.append(value.as_py())
            continue
        except (ValueError, OverflowError):
            if otherwise == "null":
                lists.append([_python_value(item) for item in value.values])
                continue
        bad = next(i for i in value.values if i.is_valid and _python_value(i) is None)
        target = f"a list of Python values under dtype_backend={dtype_backend!r}"
        shown = _show_date(bad) if pa.types.is_date(bad.type) else str(bad.cast(pa.string()))
        raise UnrepresentableValueError(column.name, shown, target, shard)
    return lists


def _python_value(value: pa.Scalar) -> Any:
    try:
        return value.as_py()
    except (ValueError, OverflowError):
        return None


def _offset(interval: Any) -> pd.DateOffset | None:
    """Return what pyarrow makes of an interval outside of lists: MonthDayNano does not unpickle."""
    if interval is None:
        return None
    months, days, nanoseconds = interval
    return pd.DateOffset(months=months, days=days, nanoseconds=nanoseconds)


def _show_date(value: pa.Scalar) -> str:
    return show_date(value.cast(pa.date32()).cast(pa.int32()).as_py())


def _set(table: pa.Table, number: int, values: pa.ChunkedArray | pa.Array) -> pa.Table:
    field = table.schema.field(number).with_type(values.type)
    return table.set_column(number, field, values)
