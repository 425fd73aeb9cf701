"""What dask's ``str`` and ``dt`` make of columns, as conditions of SQL."""

from __future__ import annotations

import datetime
import re
from dataclasses import dataclass
from typing import Any

import pandas as pd
import pyarrow as pa

from dask_shardsql.engine.drivers.narrowing import Computed
from dask_shardsql.frame import _dask as dask_
from dask_shardsql.frame.constants import UnknownError, value_for
from dask_shardsql.sql import predicates
from dask_shardsql.sql.predicates import Compare, Derived, Field, IsIn, IsNull, Like, Node, Not
from dask_shardsql.sql.types import Column

__all__ = ["Rounded", "derived_column", "is_match", "made_of", "match"]

_PATTERNS = {
    "contains": (("pat", "case", "flags", "na", "regex"), "%{}%"),
    "endswith": (("pat", "na"), "%{}"),
    "startswith": (("pat", "na"), "{}%"),
}
_SPECIAL = re.compile(r"[\\.^$*+?{}\[\]|()]")  # to the regular expressions of Arrow
_OF_DAYS = {
    "day": "day",
    "day_of_week": "day_of_week",
    "day_of_year": "day_of_year",
    "dayofweek": "day_of_week",
    "dayofyear": "day_of_year",
    "month": "month",
    "quarter": "quarter",
    "weekday": "day_of_week",
}
_OF_TIMES = {"hour": "hour", "minute": "minute", "second": "second"}
_DAY = datetime.timedelta(days=1)


@dataclass(frozen=True)
class Rounded(Field):
    """The year, the date, or the beginning of the day of a column: what is compared are its ends.

    An index on the column knows these, and years before 1 are no question.
    """

    to: str = "day"

    def compare(self, operator: str, value: Any, column: Column | Computed) -> Node:
        """Return a comparison with a value."""
        plain = Field(self.name, self.kind.removeprefix("rounded "), self.cast)
        first, behind = self._ends(value, plain.kind, column)
        if operator in (">=", "<"):
            return Compare(operator, plain, first)
        if operator in (">", "<="):
            return Compare(">=" if operator == ">" else "<", plain, behind)
        same = predicates.All((Compare(">=", plain, first), Compare("<", plain, behind)))
        return same if operator == "=" else Not(same)

    def is_in(self, values: list[Any], column: Column | Computed) -> Node:
        """Return whether it is one of some values; never NULL."""
        if not values:
            return IsIn(self, ())
        found = predicates.Any(tuple(self.compare("=", value, column) for value in values))
        return predicates.All((Not(IsNull(self)), found))

    def _ends(self, value: Any, kind: str, column: Column | Computed) -> tuple[Any, Any]:
        """Return the first value that is rounded to this one or more, and the first to more."""
        day: Any
        try:
            if self.to == "year":
                year: Any = value_for(value, Column("", "int8", pa.int64()), "integer")
                first, behind = datetime.date(year, 1, 1), datetime.date(year + 1, 1, 1)
                return _beginning(first, column), _beginning(behind, column)
            if self.to == "date":
                day = value_for(value, Column("", "date", pa.date32()), "date")
                return _beginning(day, column), _beginning(day + _DAY, column)
            instant: Any = value_for(value, column, kind)
            start = instant.replace(hour=0, minute=0, second=0, microsecond=0)
            return start if start == instant else start + _DAY, start + _DAY
        except (OverflowError, ValueError):
            raise UnknownError from None


def _beginning(day: datetime.date, column: Column | Computed) -> datetime.date:
    """Return the first value of a column on a day."""
    if not pa.types.is_timestamp(column.arrow_type):
        return day
    zone = datetime.UTC if column.arrow_type.tz else None
    return datetime.datetime.combine(day, datetime.time(), zone)


def made_of(expr: Any, field: Field, column: Column | Computed) -> Field:
    """Return what an accessor makes of a column, or raise where it is not known to be the same."""
    attr, kind = expr.attr, field.kind
    if type(field) is not Field or expr.accessor != {"text": "str"}.get(kind, "dt"):
        raise UnknownError
    is_time = kind == "timestamp"
    if type(expr) is dask_.FunctionMap:
        given = (attr, tuple(expr.operand("args")), dict(expr.operand("kwargs")))
        if kind == "text" and given == ("len", (), {}):
            return Derived(field.name, "integer", field.cast, "length")
        if is_time and given in (("normalize", (), {}), ("floor", ("D",), {})):
            return Rounded(field.name, f"rounded {kind}", field.cast, "day")
    elif kind == "date" and attr == "date":
        return field
    elif kind in ("date", "timestamp"):
        if attr == "year" or attr == "date":
            return Rounded(field.name, f"rounded {kind}", field.cast, attr)
        function = _OF_DAYS.get(attr) or (_OF_TIMES.get(attr) if is_time else None)
        if function is not None:
            has_zone = bool(getattr(column.arrow_type, "tz", None))
            return Derived(field.name, "integer", field.cast, function, has_zone)
    raise UnknownError


def derived_column(field: Derived) -> Column:
    """Return what type it has."""
    is_length = field.function == "length"
    return Column(field.name, "int8", pa.int32() if is_length else pa.int64())


def is_match(expr: Any) -> bool:
    """Whether it is an expression that looks for a text in others."""
    of_text = type(expr) is dask_.FunctionMap and expr.accessor == "str"
    return of_text and expr.attr in _PATTERNS


def match(expr: Any, field: Field, column: Column | Computed) -> Node:
    """Return whether a column has a text, or raise where it is not known to be the same."""
    names, shape = _PATTERNS[expr.attr]
    args, given = expr.operand("args"), dict(expr.operand("kwargs"))
    if type(field) is not Field or field.kind != "text" or len(args) > len(names):
        raise UnknownError
    given |= dict(zip(names, args, strict=False))
    pattern, na = given.pop("pat", None), given.pop("na", pd.NA)
    texts = pattern if isinstance(pattern, tuple) else (pattern,)
    if expr.attr == "contains":
        is_plain = given.pop("case", True) is True and given.pop("flags", 0) == 0
        if not is_plain or not isinstance(pattern, str):
            raise UnknownError
        if given.pop("regex", True) is not False and _SPECIAL.search(pattern):
            raise UnknownError
    if given or not texts:
        raise UnknownError
    found = tuple(Like(field, shape.format(_escaped(value_for(t, column, "text")))) for t in texts)
    is_there = found[0] if len(found) == 1 else predicates.Any(found)
    if na is True:
        return predicates.Any((IsNull(field), is_there))
    if na is False:
        return predicates.All((Not(IsNull(field)), is_there))
    if na is None or na is pd.NA or (isinstance(na, float) and na != na):
        return is_there
    raise UnknownError


def _escaped(text: Any) -> str:
    return re.sub(r"([\\%_])", r"\\\1", text)
