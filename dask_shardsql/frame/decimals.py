"""What dask and pandas lack for exact decimals: scalars of their own, and means of groups.

The sum of a decimal column already has Arrow's full precision, so that Arrow refuses to divide
it by a count, and with it every mean that dask computes from both. Here such a mean is divided
in Python's ``decimal`` instead: exact to 16 places after the point or to the column's own, if
those are more, rounded half away from zero as PostgreSQL rounds. Sums over several partitions
are added up in Python too, where dask would round them to 28 digits. Columns of any other type
take dask's own way.

A sum inside one partition is Arrow's: it wraps round, without a word, past 1.7e38 units of the
last place of a decimal128 and past 5.7e76 of a decimal256.
"""

from __future__ import annotations

import decimal
from typing import Any

import pandas as pd
import pyarrow as pa

from dask_shardsql.errors import UnrepresentableValueError
from dask_shardsql.frame._dask import (
    GroupByMean,
    MeanAggregate,
    Prod,
    Sum,
    groupby_module,
    make_scalar,
    normalize_token,
)

__all__ = ["divide", "install"]

_PLACES = 16
# Exact for sums of numbers of 76 digits, however many; rounds means as PostgreSQL does.
_EXACT = decimal.Context(prec=200, rounding=decimal.ROUND_HALF_UP)

# What dask has, taken before it is replaced.
_dask_finalize_mean = groupby_module._finalize_mean
_dask_mean = MeanAggregate.operation
_dask_mean_of_groups = GroupByMean.aggregate
_dask_sum, _dask_partial_sum = Sum.aggregate, Sum.combine


def install() -> None:
    """Teach dask about decimals; safe to call twice.

    What runs in tasks is a function of this module, not a method of dask's classes, so that a
    process which unpickles a task imports this module and with it the rest of what is here.
    """
    make_scalar.register(decimal.Decimal, lambda value: decimal.Decimal(1))
    normalize_token.register(decimal.Decimal, lambda value: ("decimal.Decimal", str(value)))
    GroupByMean.reduction_aggregate = staticmethod(mean_of_groups)
    GroupByMean.aggregate = staticmethod(aggregate_means)
    groupby_module._finalize_mean = finalize_mean
    MeanAggregate.operation = staticmethod(mean)
    Sum.aggregate, Sum.combine = staticmethod(aggregate_sum), staticmethod(combine_sum)
    # dask's product is a kind of sum
    Prod.aggregate = classmethod(_dask_sum.__func__)
    Prod.combine = classmethod(_dask_partial_sum.__func__)


def aggregate_sum(inputs: list[Any], **options: Any) -> Any:
    """Add up the sums of the partitions with all their digits."""
    with decimal.localcontext(_EXACT):
        return _dask_sum(inputs, **options)


def combine_sum(inputs: list[Any], **options: Any) -> Any:
    """Add up the sums of some of the partitions with all their digits."""
    with decimal.localcontext(_EXACT):
        return _dask_partial_sum(inputs, **options)


def mean(total: Any, count: Any) -> Any:
    """Return the mean of a column, or of each column, from its sum and its count."""
    if isinstance(total, decimal.Decimal):
        return _quotient(total, count, _places(total))
    if isinstance(total, pd.Series) and total.dtype == object:
        means = [
            _quotient(t, n, _places(t)) if isinstance(t, decimal.Decimal) else _dask_mean(t, n)
            for t, n in zip(total, count, strict=True)
        ]
        return pd.Series(means, dtype=object, index=total.index, name=total.name)
    return _dask_mean(total, count)


def divide(total: pd.Series[Any], count: pd.Series[Any]) -> pd.Series[Any]:
    """Return `total` / `count`, NULL where the count is 0; decimals stay decimals.

    Raises
    ------
    UnrepresentableValueError
        A mean has more digits before the point than are left beside the 16 behind it: 22 of a
        decimal128. Reading the column as ``decimal256`` leaves 60.
    """
    kind = getattr(total.dtype, "pyarrow_dtype", None)
    if kind is None or not pa.types.is_decimal(kind):
        return total / count
    wide = pa.types.is_decimal256(kind)
    places = max(kind.scale, _PLACES)
    target = pa.decimal256(76, places) if wide else pa.decimal128(38, places)
    quotients = [_quotient(t, n, places) for t, n in zip(total.array, count.array, strict=True)]
    digits = target.precision - places
    for quotient in quotients:
        if quotient is not pd.NA and quotient.adjusted() >= digits:
            raise UnrepresentableValueError(str(total.name), str(quotient), str(target))
    array = pa.array([None if q is pd.NA else q for q in quotients], target)
    dtype = pd.ArrowDtype(target)
    return pd.Series(array, dtype=dtype, index=total.index, name=total.name)


def _places(value: decimal.Decimal) -> int:
    return max(-int(value.as_tuple().exponent), _PLACES)


def _quotient(total: Any, count: Any, places: int) -> Any:
    if pd.isna(total) or not count:
        return pd.NA
    with decimal.localcontext(_EXACT):
        return (total / int(count)).quantize(decimal.Decimal(1).scaleb(-places))


def aggregate_means(inputs: list[Any], **options: Any) -> Any:
    """Finish the means of ``groupby(...).mean()``."""
    return _dask_mean_of_groups(inputs, **options)


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
