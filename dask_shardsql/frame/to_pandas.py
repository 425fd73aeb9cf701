"""Arrow tables -> pandas DataFrames whose dtypes depend on the columns, never on the rows."""

from __future__ import annotations

import pandas as pd
import pyarrow as pa

from dask_shardsql.engine.fetch import Answer
from dask_shardsql.errors import ColumnError, UnrepresentableValueError
from dask_shardsql.sql.types import pandas_dtype_mapper

__all__ = ["to_pandas"]


def to_pandas(table: pa.Table, answer: Answer, dtype_backend: str) -> pd.DataFrame:
    """Return `table` as a DataFrame.

    Parameters
    ----------
    table : pyarrow.Table
        Of the answer's schema.
    answer : Answer
        What the columns are.
    dtype_backend : {"pyarrow", "numpy_nullable", "numpy"}
        ``pyarrow`` keeps every Arrow type. ``numpy_nullable`` has pandas' nullable dtypes for
        integers, floats, booleans and text, and NumPy's for the others. ``numpy`` has ``int64``
        and ``bool`` only for columns that the database guarantees to hold no NULL; other
        integers become ``float64``, other booleans ``object``.

    Raises
    ------
    UnrepresentableValueError
        ``numpy`` cannot hold an integer beyond 2**53 in ``float64``, nor a date before year 1.
    ColumnError
        A NULL, under ``numpy``, where the database had guaranteed none (an outer join does that).
    """
    mapper = pandas_dtype_mapper(dtype_backend)
    if dtype_backend != "pyarrow":
        table = _prepared(table, answer, numpy=dtype_backend == "numpy")
    try:
        frame = table.to_pandas(types_mapper=mapper, date_as_object=True, ignore_metadata=True)
        for column in answer.columns if dtype_backend == "numpy" else ():
            if column.nullable and pa.types.is_boolean(column.arrow_type):
                frame[column.name] = frame[column.name].astype(object)
        return frame
    except (ValueError, OverflowError) as error:
        failure = error
    raise UnrepresentableValueError(
        ", ".join(f.name for f in table.schema if pa.types.is_date(f.type)),
        str(failure),
        f"datetime.date under dtype_backend={dtype_backend!r}",
    )


def _prepared(table: pa.Table, answer: Answer, *, numpy: bool) -> pa.Table:
    """Cast the columns whose NumPy dtype would depend on whether there are NULLs in them."""
    for number, column in enumerate(answer.columns):
        values = table.column(number)
        integer = pa.types.is_integer(column.arrow_type)
        if not numpy or not (integer or pa.types.is_boolean(column.arrow_type)):
            continue
        if column.nullable and integer:
            table = _set(table, number, _as_float(values, column.name))
        elif not column.nullable and values.null_count:
            raise ColumnError(
                f"column {column.name!r} is NOT NULL in its table, but the query makes NULLs of it "
                f"and dtype_backend='numpy' has no NULL in {column.arrow_type}. Use 'pyarrow' or "
                f"'numpy_nullable', or types={{{column.name!r}: 'float64'}}",
                (column.name,),
            )
    return table


def _as_float(values: pa.ChunkedArray, name: str) -> pa.ChunkedArray:
    problem = ""
    try:
        return values.cast(pa.float64())
    except pa.ArrowInvalid as error:
        problem = str(error)
    raise UnrepresentableValueError(name, problem, "float64 under dtype_backend='numpy'")


def _set(table: pa.Table, number: int, values: pa.ChunkedArray) -> pa.Table:
    field = table.schema.field(number).with_type(values.type)
    return table.set_column(number, field, values)
