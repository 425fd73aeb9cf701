"""What a sharding function is: on which shard a row is, and which shards a range of keys may need.

Sharding functions are frozen values: equal ones are one function, and tables that have it are split
alike. None ever guesses: a value of another Python type than the function takes (a float or a bool
for an int, an int for a Decimal) is unknown, which is an error where one shard is asked for, and
every shard where a query is to visit no more than it must.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from datetime import date
from decimal import Decimal
from typing import Any, ClassVar, NoReturn

from dask_shardsql.errors import TopologyError
from dask_shardsql.sharding.key_types import type_of_value

__all__ = ["ShardingFunction"]

# so many values of a range are asked for one by one
_MOST_VALUES = 1000


@dataclass(frozen=True)
class ShardingFunction(ABC):
    """What says on which shard a row is, by its shard key; see the classes ``ShardBy...``."""

    # what errors call it, and the types it takes
    kind: ClassVar[str] = ""
    _takes: ClassVar[tuple[str, ...]] = ()

    def shard_of(self, value: Any) -> str:
        """Return the name of the shard that has the rows with this shard key.

        Parameters
        ----------
        value : int, str, Decimal, date, datetime, UUID or None
            The key, as exactly the Python type that the function takes; None is NULL.

        Raises
        ------
        TopologyError
            The function does not know such a value: it may be on any shard, or on none.
        """
        known = value is None or type_of_value(value) in self._types
        shard = self._find(value) if known else None
        if shard is None:
            shown = "NULL" if value is None else f"{value!r} (of type {type(value).__name__})"
            taken = " or ".join(self._types)
            raise TopologyError(f"{self!r} knows no shard for {shown}; it takes values of {taken}")
        return shard

    def shards_of_range(
        self,
        low: Any,
        high: Any,
        *,
        low_inclusive: bool = True,
        high_inclusive: bool = True,
    ) -> frozenset[str] | None:
        """Return the shards that may have rows whose key is in a range, and is not NULL.

        Parameters
        ----------
        low, high : int, Decimal, date, datetime or None
            Its bounds, in PostgreSQL's order; None is no bound on that side.
        low_inclusive, high_inclusive : bool, default True
            Whether the bound itself is in the range.

        Returns
        -------
        frozenset of str or None
            Empty where no value is in the range; None where that cannot be said: it may be any.
        """
        kinds = {type_of_value(bound) for bound in (low, high) if bound is not None}
        if len(kinds) != 1 or not kinds <= set(self._types) or "text" in kinds:
            return None  # text, as its order is the collation's
        both_inclusive = low_inclusive and high_inclusive
        if None not in (low, high) and (low > high or (low == high and not both_inclusive)):
            return frozenset()
        return self._of_range(low, high, low_inclusive, high_inclusive)

    @property
    def shard_names(self) -> frozenset[str]:
        """The shards that it is known to name; empty where only its answers tell."""
        named = (*getattr(self, "shards", ()), getattr(self, "null", None))
        return frozenset(name for name in named if name is not None)

    def token(self) -> list[Any]:
        """Return plain values that differ wherever the functions do."""
        return [
            type(self).__qualname__,
            *(_plain(getattr(self, field.name)) for field in fields(self)),
        ]

    def __dask_tokenize__(self) -> Any:
        return ("dask_shardsql.sharding", self.token())

    def __getstate__(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @property
    def _types(self) -> tuple[str, ...]:
        return self._takes

    @abstractmethod
    def _find(self, value: Any) -> str | None:
        """Return the shard of a value of a type it takes, or of NULL; None if that is unknown."""

    def _of_range(
        self, low: Any, high: Any, low_inclusive: bool, high_inclusive: bool
    ) -> frozenset[str] | None:
        """Return the shards of a range that is not empty."""
        values = _values_between(low, high, low_inclusive, high_inclusive)
        found = [self._find(value) for value in values] if values is not None else [None]
        known = [name for name in found if name is not None]
        return frozenset(known) if len(known) == len(found) else None

    def _set(self, **values: Any) -> None:
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def _refuse(self, why: str) -> NoReturn:
        raise TopologyError(f"the sharding function {self.kind!r} {why}")

    def _names(self, shards: Any) -> tuple[str, ...]:
        is_list = isinstance(shards, Sequence) and not isinstance(shards, str)
        if not is_list or not shards or not all(isinstance(name, str) for name in shards):
            self._refuse(f"needs a list of shards' names, not {shards!r}")
        return tuple(shards)

    def _name(self, shard: Any, what: str) -> None:
        if shard is not None and not isinstance(shard, str):
            self._refuse(f"needs the name of a shard as its {what}, not {shard!r}")

    def _one_type(self, values: Iterable[Any], what: str) -> None:
        """Refuse values that are of no type that is taken, or of several."""
        found = {type_of_value(value): value for value in values}
        for kind, value in found.items():
            if kind not in self._takes:
                self._refuse(
                    f"takes {what} of the types {', '.join(self._takes)}, not {value!r} "
                    f"({type(value).__name__}); decimal numbers are written as texts in a "
                    'topology\'s file, with type = "numeric", and times have no time zone'
                )
        if len(found) != 1:
            shown = " and ".join(map(repr, found.values())) or "none"
            self._refuse(f"needs {what}, all of one type; there are {shown}")


def _values_between(low: Any, high: Any, low_inclusive: bool, high_inclusive: bool) -> Any:
    """Return all values of a range, where they are few."""
    if type(low) is date and type(high) is date:
        days = range(low.toordinal() + (not low_inclusive), high.toordinal() + high_inclusive)
        return [date.fromordinal(day) for day in days] if len(days) <= _MOST_VALUES else None
    if type(low) is int and type(high) is int and high - low <= _MOST_VALUES:
        return range(low + (not low_inclusive), high + high_inclusive)
    return None


def _plain(value: Any) -> Any:
    """Return what JSON can hold, and is another for another value."""
    if isinstance(value, tuple):
        return [_plain(one) for one in value]
    if isinstance(value, Decimal):
        return ["Decimal", str(value.as_integer_ratio())]
    if value is None or isinstance(value, str | int):
        return value
    return [type(value).__name__, value.hex() if isinstance(value, bytes) else str(value)]
