"""Values of Python that the server compares, or computes, exactly as Arrow does."""

from __future__ import annotations

import datetime
import math
from collections.abc import Callable
from decimal import Decimal
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from dask_shardsql.engine.drivers.narrowing import Computed
from dask_shardsql.sql import predicates
from dask_shardsql.sql.predicates import Compare, Field, Node, Not
from dask_shardsql.sql.types import Column

__all__ = ["UnknownError", "as_arrow_does", "constant_for", "held", "is_utf8", "value_for"]

_EXACT_DIGITS = 15  # of a decimal number, which a float keeps


class UnknownError(Exception):
    """It is not known to be the same in SQL."""


def held(delayed: Any) -> Any:
    """Return what a Delayed object holds, if it is a value and nothing to be computed."""
    graph = dict(delayed.dask)
    held = graph.get(delayed.key)
    return getattr(held, "value", None)


def value_for(value: Any, column: Column | Computed, kind: str) -> predicates.Value:
    """Return a value that the server compares with a column exactly as Arrow does."""
    if isinstance(value, np.generic):
        value = value.item()
    of_type = column.arrow_type
    if kind == "boolean" and isinstance(value, bool):
        return value
    if isinstance(value, bool):
        raise UnknownError
    if kind in ("text", "char") and isinstance(value, str):
        if "\0" in value or (not value.isascii() and not is_utf8(value)):
            raise UnknownError
        return value
    if kind == "integer" and isinstance(value, int):
        bits = of_type.bit_width - 1
        if -(1 << bits) <= value < 1 << bits:
            return value
    if kind == "float" and isinstance(value, int) and abs(value) <= 2**53:
        return float(value)
    if kind == "float" and isinstance(value, float) and not math.isnan(value):
        return value
    if kind == "decimal":
        return _decimal(value, of_type)
    if kind == "date" and type(value) is datetime.date:
        return value
    if kind == "timestamp" and isinstance(value, datetime.datetime):
        return _instant(value, of_type)
    raise UnknownError


def constant_for(value: Any, kind: str) -> predicates.Value:
    """Return a value that the server computes with exactly as Arrow does."""
    if isinstance(value, np.generic):
        value = value.item()
    is_integer = isinstance(value, int) and not isinstance(value, bool)
    if kind == "float" and (is_integer or isinstance(value, float)):
        if math.isfinite(value) and abs(value) <= 2**53:
            return float(value)
    elif is_integer and abs(value) < 1 << 63:
        return int(value)
    elif kind == "decimal" and isinstance(value, Decimal) and value.is_finite():
        return value
    raise UnknownError


def _decimal(value: Any, of_type: pa.DataType) -> Decimal:
    if isinstance(value, int) and abs(value) < 10**_EXACT_DIGITS:
        return Decimal(value)
    if isinstance(value, Decimal) and value.is_finite():
        digits = len(value.as_tuple().digits)
        if digits + abs(int(value.as_tuple().exponent)) + of_type.scale <= 38:
            return value
    raise UnknownError


def as_arrow_does(operator: str, field: Field, value: float, of_type: pa.DataType) -> Node:
    """Return a comparison of decimal numbers with a float.

    Arrow makes floats of them, which are not always the nearest: digits times 10 ** -scale. That
    grows with the digits, so that there is a first number for which the comparison is true.
    """
    scale, most = of_type.scale, 10 ** min(of_type.precision, _EXACT_DIGITS)
    if of_type.precision > _EXACT_DIGITS or scale < 0 or not abs(value) * 10.0**scale < most / 2:
        raise UnknownError
    factor = float(f"1e-{scale}")

    def first(is_beyond: Callable[[float], bool]) -> Decimal:
        digits = math.floor(value * 10**scale) - 4
        while not is_beyond(digits * factor):
            digits += 1
        return Decimal(digits).scaleb(-scale)

    reached, passed = first(lambda one: one >= value), first(lambda one: one > value)
    if operator in (">=", "<"):
        return Compare(operator, field, reached)
    if operator in (">", "<="):
        return Compare(">=" if operator == ">" else "<", field, passed)
    same = predicates.All((Compare(">=", field, reached), Compare("<", field, passed)))
    return same if operator == "=" else Not(same)


def _instant(value: datetime.datetime, of_type: pa.DataType) -> datetime.datetime:
    if (value.tzinfo is None) != (of_type.tz is None) or pd.isna(value):
        raise UnknownError
    if isinstance(value, pd.Timestamp):
        if value.nanosecond:
            raise UnknownError
        value = value.to_pydatetime()
    if value.tzinfo is not None:
        value = value.astimezone(datetime.UTC)
    return value


def is_utf8(value: str) -> bool:
    """Whether a text has nothing that a database of that encoding could not have."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True
