"""Groups: each shard makes those of its own rows, and dask's own chunk finds them made.

What dask calls a chunk groups the rows of a partition by pandas. Here it is given a stand-in for
that DataFrame, of which it can ask nothing but the values that the server has computed; so names,
the order of columns, and what is made of the groups of all shards stay dask's. Whether a chunk asks
for nothing else is seen by letting it ask, before there is any row. If it asks for more, rows are
read, and pandas groups them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from dask_shardsql.engine.drivers.narrowing import Narrowing
from dask_shardsql.engine.fetch import Answer, read_shard
from dask_shardsql.engine.registry import TopologyRef
from dask_shardsql.errors import QueryError
from dask_shardsql.frame._dask import GroupbyAggregation, meta_nonempty
from dask_shardsql.frame.partials import OUT_OF_RANGE, Part, asked_for, part_of, wrapped
from dask_shardsql.frame.pushdown import field_named
from dask_shardsql.frame.to_pandas import to_pandas
from dask_shardsql.sql.predicates import Field, IsNull, Not
from dask_shardsql.sql.types import pandas_dtype_mapper

__all__ = ["Grouping", "grouping_of", "groups_of"]

_KEYS = {"integer", "boolean", "text", "decimal", "date", "timestamp"}
_KEYWORDS = {"numeric_only": (True, False), "min_count": (0, -1)}
_SIZE = Part("size", "", "int8")


@dataclass(frozen=True)
class Grouping:
    """How a shard groups its rows.

    Parameters
    ----------
    by : tuple of Field
        By which columns.
    keeps_null : bool
        Whether there are groups in which one of them is NULL.
    parts : tuple of Part
        What is computed of each group.
    """

    by: tuple[Field, ...]
    keeps_null: bool
    parts: tuple[Part, ...]


class Groups:
    """Stands in for what ``DataFrame.groupby`` gives.

    Parameters
    ----------
    values : mapping
        By function and column, the values of all groups; their sizes by ``("size", "")``.
    chosen : str or list of str, optional
        Of which columns; all by default.
    """

    def __init__(self, values: Mapping[tuple[str, str], pd.Series], chosen: Any = None) -> None:
        self._values, self._chosen = values, chosen

    def __getitem__(self, chosen: Any) -> Groups:
        return Groups(self._values, chosen if isinstance(chosen, str) else list(chosen))

    def sum(self, **keywords: Any) -> Any:
        """Return the sums."""
        return self._made("sum", keywords)

    def min(self, **keywords: Any) -> Any:
        """Return the least values."""
        return self._made("min", keywords)

    def max(self, **keywords: Any) -> Any:
        """Return the greatest values."""
        return self._made("max", keywords)

    def count(self, **keywords: Any) -> Any:
        """Return how many values are not NULL."""
        return self._made("count", keywords)

    def size(self) -> Any:
        """Return how many rows there are."""
        found = self._values["size", ""]
        if isinstance(self._chosen, str):
            found = found.astype(pd.ArrowDtype(pa.int64())).rename(self._chosen)
        return found

    def _made(self, function: str, keywords: Mapping[str, Any]) -> Any:
        if isinstance(self._chosen, str):
            return self._values[function, self._chosen]
        known = [column for name, column in self._values if name == function]
        chosen = known if self._chosen is None else filter(known.__contains__, self._chosen)
        return pd.DataFrame({column: self._values[function, column] for column in chosen})


class Grouped:
    """Stands in for a DataFrame that can be grouped in one way only."""

    def __init__(self, groups: Any) -> None:
        self._groups = groups

    def __getitem__(self, columns: Any) -> Grouped:
        return Grouped(self._groups[columns])

    def groupby(self, by: Any, **options: Any) -> Any:
        """Return the groups."""
        return self._groups

    def head(self, n: int) -> Any:
        """Return what dask makes an empty DataFrame of."""
        return pd.Series(dtype=object)


class _UnknownError(Exception):
    """The servers are not known to compute that as pandas does."""


class _Asking(Groups):
    """Notes what is asked for, and answers as pandas does for rows that there could be."""

    def __init__(self, read: Any, rows: Any, parts: dict[Part, None], chosen: Any = None) -> None:
        self._read, self._rows, self._parts, self._chosen = read, rows, parts, chosen

    def __getitem__(self, chosen: Any) -> Groups:
        return _Asking(self._read, self._rows[chosen], self._parts, chosen)

    def size(self) -> Any:
        self._parts[_SIZE] = None
        return self._rows.size()

    def _made(self, function: str, keywords: Mapping[str, Any]) -> Any:
        if any(value not in _KEYWORDS.get(name, ()) for name, value in keywords.items()):
            raise _UnknownError
        made = getattr(self._rows, function)(**keywords)
        for name in [self._chosen] if isinstance(self._chosen, str) else made.columns:
            part = part_of(function, field_named(name, self._read), {}, self._read.answer)
            if part is None or _is_less_exact(part, self._read.answer):
                raise _UnknownError
            self._parts[part] = None
        return made


class _AskingFrame(Grouped):
    """Notes how it is grouped, and what is then asked for."""

    def __init__(self, read: Any) -> None:
        self._read = read
        self.parts: dict[Part, None] = {}
        self.keeps_null = False

    def groupby(self, by: Any, dropna: Any = True, **options: Any) -> Any:
        """Return what notes the rest."""
        self.keeps_null = not dropna
        rows = meta_nonempty(self._read._meta).groupby(by, dropna=dropna, observed=True)
        return _Asking(self._read, rows, self.parts)


def _is_less_exact(part: Part, answer: Answer) -> bool:
    """Whether pandas adds up in a type of its own: of fewer digits."""
    (kind,) = (one.arrow_type for one in answer.columns if one.name == part.column)
    return part.function == "sum" and bool(pa.types.is_float32(kind))


def grouping_of(parent: Any, read: Any) -> Grouping | None:
    """Return how shards can make the groups that dask's chunk asks for, if they can.

    Parameters
    ----------
    parent : Expr
        What dask makes of the groups.
    read : ReadShards
        The read whose rows it groups.
    """
    by = tuple(field for one in parent.by if (field := field_named(one, read)) is not None)
    if len(by) < len(parent.by) or not _KEYS.issuperset(field.kind for field in by):
        return None
    chunked = parent._lower() if isinstance(parent, GroupbyAggregation) else parent
    frame = _AskingFrame(read)
    try:
        chunked.chunk(frame, *parent.by, **chunked.chunk_kwargs)
    except (_UnknownError, AttributeError, TypeError):
        return None
    return Grouping(by, frame.keeps_null, tuple(frame.parts)) if frame.parts else None


def groups_of(
    ref: TopologyRef, shard: str, answer: Answer, grouping: Grouping
) -> Grouped | pd.DataFrame:
    """Return one shard's groups; its rows where pandas is to group them after all."""
    by, narrowing = grouping.by, answer.narrowing or Narrowing(tuple(answer.schema.names))
    if not grouping.keeps_null:
        filled = tuple(Not(IsNull(field)) for field in by)
        narrowing = replace(narrowing, where=(*narrowing.where, *filled))
    asked = asked_for(replace(answer, narrowing=narrowing), grouping.parts, by)
    try:
        table = read_shard(ref, shard, asked)
    except QueryError as error:
        if error.sqlstate != OUT_OF_RANGE:
            raise
        table = read_shard(ref, shard, answer)
        return to_pandas(table, answer, "pyarrow", shard)
    if not len(table):
        return to_pandas(answer.schema.empty_table(), answer, "pyarrow", shard)
    names = [field.name for field in by]
    keys = table.select(range(len(by))).rename_columns(names)
    grouped = keys.to_pandas(types_mapper=pandas_dtype_mapper("pyarrow")).groupby(
        names, dropna=not grouping.keeps_null
    )
    index, order = grouped.size().index, np.argsort(grouped.ngroup().to_numpy(), kind="stable")
    types = {column.name: column.arrow_type for column in answer.columns}
    values = {}
    for part, column in zip(grouping.parts, table.columns[len(by) :], strict=True):
        made = _values(part, column, types.get(part.column)).take(pa.array(order))
        found = pd.Series(pd.arrays.ArrowExtensionArray(made), index, name=part.column)
        if part == _SIZE:
            found = pd.Series(made.to_numpy(), index)
        values[part.function, part.column] = found
    return Grouped(Groups(values))


def _values(part: Part, found: pa.ChunkedArray, of_type: pa.DataType) -> pa.ChunkedArray:
    """Return a value for each group, of the type that pandas would have chosen for all of them."""
    if part.function in ("min", "max"):
        return found.cast(of_type)
    if part.function == "sum" and pa.types.is_integer(of_type):
        found = pa.chunked_array([[wrapped(one or 0) for one in found.to_pylist()]], pa.int64())
        try:  # the column's own where all fit
            return found.cast(of_type)
        except pa.ArrowInvalid:
            return found
    found = found.fill_null(pa.scalar(0).cast(found.type))
    # pandas makes NULL of a NaN among sums
    is_nan = pc.is_nan(found) if pa.types.is_floating(found.type) else pa.scalar(value=False)
    return pc.if_else(is_nan, pa.scalar(None, found.type), found)
