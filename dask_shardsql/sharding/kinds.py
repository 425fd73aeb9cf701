"""The sharding functions that need no code of yours: modulo, hash, range, list."""

from __future__ import annotations

import bisect
import functools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dask_shardsql.sharding.function import ShardingFunction
from dask_shardsql.sharding.key_types import KEY_TYPES, type_of_value
from dask_shardsql.sharding.partition_hash import partition_hash

__all__ = ["ShardByHash", "ShardByList", "ShardByModulo", "ShardByRange"]


@dataclass(frozen=True)
class ShardByModulo(ShardingFunction):
    """The remainder of an integer key, divided by the number of shards, counts through them.

    Parameters
    ----------
    shards : sequence of str
        Key ``k`` is on shard ``k % n`` of these n, counted from 0. A shard may be named more than
        once: 64 of them may be four shards.
    null : str, optional
        The shard of rows whose key is NULL; unknown by default.

    Notes
    -----
    The remainder is Python's, from 0 to n - 1 for negative keys too: -1 is on the last shard. In
    SQL that is ``mod(mod(k, n) + n, n)``; ``k % n`` there is negative.

    Examples
    --------
    >>> ShardByModulo(["s1", "s2", "s3"]).shard_of(-1)
    's3'
    """

    shards: tuple[str, ...]
    null: str | None = None
    kind = "modulo"
    _takes = ("integer",)

    def __post_init__(self) -> None:
        self._set(shards=self._names(self.shards))
        self._name(self.null, "null")

    def _find(self, value: Any) -> str | None:
        return self.null if value is None else self.shards[value % len(self.shards)]

    def _of_range(
        self, low: Any, high: Any, low_inclusive: bool, high_inclusive: bool
    ) -> frozenset[str] | None:
        if low is None or high is None or high - low > len(self.shards):
            return frozenset(self.shards)
        first, last = low + (not low_inclusive), high - (not high_inclusive)
        return frozenset(self.shards[key % len(self.shards)] for key in range(first, last + 1))


@dataclass(frozen=True)
class ShardByHash(ShardingFunction):
    """PostgreSQL's own hash, by which ``PARTITION BY HASH`` chooses a partition.

    Parameters
    ----------
    shards : sequence of str
        The shard at place r, counted from 0, has what ``FOR VALUES WITH (MODULUS n, REMAINDER r)``
        would have of n partitions. A shard may be named more than once.

    Notes
    -----
    It takes integers (smallint, integer and bigint of one value are on one shard), texts (text and
    varchar of a deterministic collation, in a database in UTF8) and UUIDs, and NULL, whose hash
    is 0. Not numeric, whose hash is another one. See the PostgreSQL manual, section 5.12, and
    ``satisfies_hash_partition``; servers on big-endian machines hash texts otherwise.

    Examples
    --------
    >>> ShardByHash(["s1", "s2", "s3"]).shard_of(7)
    's3'
    """

    shards: tuple[str, ...]
    kind = "hash"
    _takes = ("integer", "text", "uuid")

    def __post_init__(self) -> None:
        self._set(shards=self._names(self.shards))

    def _find(self, value: Any) -> str | None:
        try:
            hashed = 0 if value is None else partition_hash(value)
        except ValueError:  # PostgreSQL has no such value
            return None
        return self.shards[hashed % len(self.shards)]


@dataclass(frozen=True)
class ShardByRange(ShardingFunction):
    """Ranges of the key, one behind the other, each on a shard.

    Parameters
    ----------
    bounds : sequence of int, Decimal, date, datetime or str
        Where the second and each further range begins: a bound is in the range above it. They
        rise, are of one type, and have no time zone; floats are refused, as they are not exact.
    shards : sequence of str
        The shard of each range: one more than there are bounds. A shard may have several.
    null : str, optional
        The shard of rows whose key is NULL; unknown by default.

    Notes
    -----
    The order is PostgreSQL's: ``infinity`` and NaN are in the last range, ``-infinity`` is in the
    first. Texts are in the order of their code points (``COLLATE "C"``), and only single texts are
    looked for: the order in which a query compares texts is that of its collation.

    Examples
    --------
    >>> ShardByRange([1000, 2000], ["s1", "s2", "s3"]).shard_of(1000)
    's2'
    """

    bounds: tuple[Any, ...]
    shards: tuple[str, ...]
    null: str | None = None
    kind = "range"
    _takes = ("date", "integer", "numeric", "text", "timestamp")

    def __post_init__(self) -> None:
        if isinstance(self.bounds, str) or not isinstance(self.bounds, Sequence):
            self._refuse(f"needs a list of bounds, not {self.bounds!r}")
        self._set(bounds=tuple(self.bounds), shards=self._names(self.shards))
        self._name(self.null, "null")
        self._one_type(self.bounds, "bounds")
        if any(low >= high for low, high in zip(self.bounds, self.bounds[1:], strict=False)):
            self._refuse("needs bounds that rise")
        if len(self.shards) != len(self.bounds) + 1:
            self._refuse(
                f"needs {len(self.bounds) + 1} shards for {len(self.bounds)} bounds, as a range "
                f"lies before, between and behind them; {len(self.shards)} are named"
            )

    @property
    def _types(self) -> tuple[str, ...]:
        return (type_of_value(self.bounds[0]) or "",)

    def _find(self, value: Any) -> str | None:
        return self.null if value is None else self.shards[bisect.bisect(self.bounds, value)]

    def _of_range(
        self, low: Any, high: Any, low_inclusive: bool, high_inclusive: bool
    ) -> frozenset[str] | None:
        first = 0 if low is None else bisect.bisect_right(self.bounds, low)
        last = len(self.bounds)
        if high is not None:
            find = bisect.bisect_right if high_inclusive else bisect.bisect_left
            last = find(self.bounds, high)
        return frozenset(self.shards[first : last + 1])


@dataclass(frozen=True, init=False, repr=False)
class ShardByList(ShardingFunction):
    """A table of values, and the shard of each: a list for each shard, or a lookup table.

    Parameters
    ----------
    values : mapping of value to str
        The shard of each value. The values are of one type: int, str, Decimal, date, datetime
        without a time zone, or UUID.
    default : str, optional
        The shard of every other value but NULL; unknown by default.
    null : str, optional
        The shard of rows whose key is NULL; unknown by default.

    Examples
    --------
    >>> ShardByList({"DE": "s1", "AT": "s1", "FR": "s2"}, default="s3").shard_of("AT")
    's1'
    """

    values: tuple[tuple[Any, str], ...]
    default: str | None = None
    null: str | None = None
    kind = "list"
    _takes = tuple(KEY_TYPES)

    def __init__(
        self,
        values: Mapping[Any, str] | Sequence[tuple[Any, str]],
        default: str | None = None,
        null: str | None = None,
    ) -> None:
        if not isinstance(values, Mapping | Sequence) or isinstance(values, str):
            self._refuse(f"needs a table of values and their shards, not {values!r}")
        try:
            pairs = list(dict(values).items())
        except (TypeError, ValueError):
            self._refuse("needs a table of values and their shards, each a pair")
        self._one_type([value for value, _ in pairs], "values")
        if len(pairs) != len(values):
            twice = [v for v, n in Counter(value for value, _ in values).items() if n > 1]
            self._refuse(f"has {twice[0]!r} more than once")
        self._names([shard for _, shard in pairs])
        self._name(default, "default")
        self._name(null, "null")
        # in one order, so that equal tables are equal functions
        self._set(values=tuple(sorted(pairs)), default=default, null=null)

    @property
    def shard_names(self) -> frozenset[str]:
        """The shards that it names."""
        named = (*(shard for _, shard in self.values), self.default, self.null)
        return frozenset(name for name in named if name is not None)

    @property
    def _types(self) -> tuple[str, ...]:
        return (type_of_value(self.values[0][0]) or "",)

    @functools.cached_property
    def _by_value(self) -> dict[Any, str]:
        return dict(self.values)

    def _find(self, value: Any) -> str | None:
        return self.null if value is None else self._by_value.get(value, self.default)

    def _of_range(
        self, low: Any, high: Any, low_inclusive: bool, high_inclusive: bool
    ) -> frozenset[str] | None:
        one_by_one = super()._of_range(low, high, low_inclusive, high_inclusive)
        if one_by_one is not None or self.default is None:
            return one_by_one
        inside = [
            shard
            for value, shard in self.values
            if (low is None or low < value or (low_inclusive and low == value))
            and (high is None or value < high or (high_inclusive and high == value))
        ]
        return frozenset({self.default, *inside})

    def __repr__(self) -> str:
        shown = [f"{len(self.values)} values over {sorted({shard for _, shard in self.values})}"]
        rest = (("default", self.default), ("null", self.null))
        shown += [f"{name}={shard!r}" for name, shard in rest if shard is not None]
        return f"ShardByList({', '.join(shown)})"
