"""What dask and pandas lack for exact decimals: scalars of their own, and means of groups.

The sum of a decimal column already has Arrow's full precision, so that Arrow refuses to divide
it by a count, and with it every mean that dask computes from both. Here such a mean is divided
in Python's ``decimal`` instead: exact to 16 places after the point or to the column's own, if
those are more, rounded half away from zero as PostgreSQL rounds. Columns of any other type take
dask's own way.
"""

from __future__ import annotations

import decimal
from typing import Any

import pandas as pd
import pyarrow as pa

from dask_shardsql.frame._dask import GroupByMean, groupby_module, make_scalar, normalize_token

__all__ = ["divide", "install"]

_PLACES = 16
_dask_finalize_mean = groupby_module._finalize_mean


def install() -> None:
    """Teach dask about decimals; safe to call twice."""
    make_scalar.register(decimal.Decimal, lambda value: decimal.Decimal(1))
    normalize_token.register(decimal.Decimal, lambda value: ("decimal.Decimal", str(value)))
    GroupByMean.reduction_aggregate = staticmethod(mean_of_groups)
    groupby_module._finalize_mean = finalize_mean


def divide(total: pd.Series[Any], count: pd.Series[Any]) -> pd.Series[Any]:
    """Return `total` / `count`, NULL where the count is 0; decimals stay decimals."""
    kind = getattr(total.dtype, "pyarrow_dtype", None)
    if kind is None or not pa.types.is_decimal(kind):
        return total / count
    places = max(kind.scale, _PLACES)
    factory = pa.decimal256 if pa.types.is_decimal256(kind) else pa.decimal128
    unit = decimal.Decimal(1).scaleb(-places)
    with decimal.localcontext(prec=100, rounding=decimal.ROUND_HALF_UP):
        quotients = [
            (value / int(n)).quantize(unit) if not pd.isna(value) and n else None
            for value, n in zip(total.array, count.array, strict=True)
        ]
    array = pa.array(quotients, factory(76 if pa.types.is_decimal256(kind) else 38, places))
    dtype = pd.ArrowDtype(array.type)
    return pd.Series(array, dtype=dtype, index=total.index, name=total.name)


def mean_of_groups(
    g: pd.DataFrame, levels: Any, sort: bool = False, observed: bool = False, dropna: bool = True
) -> pd.DataFrame:
    """Combine the sums and counts of dask's partial means (first half sums, second half counts)."""
    grouped = g.groupby(level=levels, sort=sort, observed=observed, dropna=dropna)
    result = grouped.sum()
    half = len(result.columns) // 2
    means = [divide(result.iloc[:, i], result.iloc[:, half + i]) for i in range(half)]
    frame = pd.concat(means, axis=1) if means else result.iloc[:, :0]
    frame.columns = result.columns[:half]
    return frame


def finalize_mean(df: pd.DataFrame, sum_column: Any, count_column: Any) -> pd.Series[Any]:
    """Finish the means of ``groupby(...).agg``."""
    if isinstance(df[sum_column], pd.Series):
        return divide(df[sum_column], df[count_column])
    result: pd.Series[Any] = _dask_finalize_mean(df, sum_column, count_column)
    return result
