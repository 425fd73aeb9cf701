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
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from dask_shardsql.engine.drivers.narrowing import Computed, Narrowing
from dask_shardsql.engine.fetch import Answer, read_shard
from dask_shardsql.engine.registry import TopologyRef
from dask_shardsql.errors import QueryError
from dask_shardsql.frame._dask import (
    Assign,
    Blockwise,
    Expr,
    Filter,
    GroupbyAggregation,
    GroupByApplyConcatApply,
    GroupByReduction,
    Projection,
    meta_nonempty,
)
from dask_shardsql.frame.dependents import parents_of
from dask_shardsql.frame.partials import OUT_OF_RANGE, Part, asked_for, computed, part_of, wrapped
from dask_shardsql.frame.pushdown import known_column, known_value, split_conditions
from dask_shardsql.frame.to_pandas import to_pandas
from dask_shardsql.sql.predicates import Field, IsNull, Not
from dask_shardsql.sql.types import pandas_dtype_mapper

__all__ = ["Grouping", "asked_groups", "grouped_later", "grouping_of", "groups_of", "is_grouping"]

_KEYS = {"integer", "boolean", "text", "char", "decimal", "date", "timestamp"}
_KEYWORDS = {"numeric_only": (True, False), "min_count": (0, -1)}
_SIZE = Part("size", 1, pa.int64(), "int8")


@dataclass(frozen=True)
class Grouping:
    """How a shard groups its rows.

    Parameters
    ----------
    by : tuple of Field
        By which columns.
    keeps_null : bool
        Whether there are groups in which one of them is NULL.
    parts : tuple of (str, Part)
        What is computed of each group: of the column of that name.
    """

    by: tuple[Field, ...]
    keeps_null: bool
    parts: tuple[tuple[str, Part], ...]


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

    def __init__(
        self, read: Any, rows: Any, parts: dict[tuple[str, Part], None], chosen: Any = None
    ) -> None:
        self._read, self._rows, self._parts, self._chosen = read, rows, parts, chosen

    def __getitem__(self, chosen: Any) -> Groups:
        return _Asking(self._read, self._rows[chosen], self._parts, chosen)

    def size(self) -> Any:
        self._parts["", _SIZE] = None
        return self._rows.size()

    def _made(self, function: str, keywords: Mapping[str, Any]) -> Any:
        if any(value not in _KEYWORDS.get(name, ()) for name, value in keywords.items()):
            raise _UnknownError
        made = getattr(self._rows, function)(**keywords)
        for name in [self._chosen] if isinstance(self._chosen, str) else made.columns:
            part = part_of(function, known_column(name, self._read))
            if part is None or _is_less_exact(part):
                raise _UnknownError
            self._parts[name, part] = None
        return made


class _AskingFrame(Grouped):
    """Notes how it is grouped, and what is then asked for."""

    def __init__(self, read: Any) -> None:
        self._read = read
        self.parts: dict[tuple[str, Part], None] = {}
        self.keeps_null = False

    def groupby(self, by: Any, dropna: Any = True, **options: Any) -> Any:
        """Return what notes the rest."""
        self.keeps_null = not dropna
        rows = meta_nonempty(self._read._meta).groupby(by, dropna=dropna, observed=True)
        return _Asking(self._read, rows, self.parts)


def _is_less_exact(part: Part) -> bool:
    """Whether pandas adds up in a type of fewer digits."""
    return part.function == "sum" and bool(pa.types.is_float32(part.arrow_type))


def is_grouping(expr: Any) -> bool:
    """Whether it is what dask makes of groups, chunk by chunk."""
    return isinstance(expr, (GroupByApplyConcatApply, GroupByReduction))


def grouped_later(expr: Any, read: Any, dependents: Any) -> SameRead | None:
    """Return the same as an expression, if all that is made of it in the end are groups.

    Of a read, columns are chosen, others assigned, and rows filtered: a read can give those, too,
    and the shards then make the groups. Nothing else may be made of this read, as rows of another
    one may have another order.
    """
    first, made = expr, _next_read(expr, read, read)
    found = made
    while made is not None:
        above = parents_of(expr, dependents)
        of = getattr(above[0], "frame", None) if len(above) == 1 else None
        if of is None or of._name != expr._name:  # a merge has no frame
            return None
        expr = above[0]
        if is_grouping(expr):
            is_all = _is_all_inside(expr, read, dependents)
            return SameRead(first, found, read) if is_all and grouping_of(expr, made) else None
        made = _next_read(expr, made, read)
    return None


class SameRead(Blockwise):  # type: ignore[misc]
    """An expression, a read that gives the same rows, and the one that it is made of."""

    _parameters: ClassVar = ["frame", "read", "base"]

    @staticmethod
    def operation(frame: Any, read: Any, base: Any) -> Any:
        """Return the rows of the expression."""
        return frame

    def dependencies(self) -> list[Any]:
        """Return the expression: a read is there to take its place."""
        return [self.frame]

    def _simplify_up(self, parent: Any, dependents: Any) -> Any:
        if is_grouping(parent):
            return type(parent)(self.read, *parent.operands[1:])
        made = _next_read(parent, self.read, self.base)
        if made is None:
            return None
        return SameRead(parent.substitute(self, self.frame), made, self.base)


def _next_read(expr: Any, read: Any, base: Any) -> Any:
    """Return a read that gives what an expression makes of another one.

    Values may be computed of that one's columns or, row by row the same, of those of `base`.
    """
    if type(expr) is Filter:
        pushed, rest = split_conditions(expr.predicate, base)
        where = (*read.operand("where"), *pushed)
        return read.substitute_parameters({"where": where}) if rest is None else None
    if type(expr) is Projection and expr.ndim == 2:
        return read.substitute_parameters({"columns": list(expr.columns)})
    if type(expr) is not Assign:
        return None
    found, columns = list(read.operand("computed")), list(read.columns)
    taken = {*columns, *read.operand("answer").schema.names}
    for name, value in zip(expr.keys, expr.vals, strict=True):
        known = None
        if isinstance(value, Expr):
            known = known_value(value, read) or known_value(value, base)
        if known is None or known.kind not in ("integer", "decimal", "float") or name in taken:
            return None
        found.append(Computed(name, known.term, known.type_name, known.arrow_type))
        columns.append(name)
    return read.substitute_parameters({"computed": tuple(found), "columns": columns})


def _is_all_inside(expr: Any, read: Any, dependents: Any) -> bool:
    """Whether all that is made of a read is inside of an expression, and only there."""
    inside, left, seen = {one._name for one in expr.walk()}, [read], {expr._name}
    while left:
        above = [one for one in parents_of(left.pop(), dependents) if one._name not in seen]
        seen |= {one._name for one in above}
        left += above
    return seen <= inside


def grouping_of(parent: Any, read: Any) -> Grouping | None:
    """Return how shards can make the groups that dask's chunk asks for, if they can.

    Parameters
    ----------
    parent : Expr
        What dask makes of the groups.
    read : ReadShards
        The read whose rows it groups.
    """
    keys = [known_column(one, read) for one in parent.by]
    by = tuple(key.term for key in keys if key is not None and isinstance(key.term, Field))
    if len(by) < len(keys) or not _KEYS.issuperset(field.kind for field in by):
        return None
    chunked = parent._lower() if isinstance(parent, GroupbyAggregation) else parent
    frame = _AskingFrame(read)
    try:
        chunked.chunk(frame, *parent.by, **chunked.chunk_kwargs)
    except (_UnknownError, AttributeError, TypeError):
        return None
    return Grouping(by, frame.keeps_null, tuple(frame.parts)) if frame.parts else None


def asked_groups(answer: Answer, grouping: Grouping) -> Answer:
    """Return an answer that has groups instead of rows."""
    narrowing = answer.narrowing or Narrowing(tuple(answer.schema.names))
    if not grouping.keeps_null:
        filled = tuple(Not(IsNull(field)) for field in grouping.by)
        narrowing = replace(narrowing, where=(*narrowing.where, *filled))
    parts = [part for _, part in grouping.parts]
    return asked_for(replace(answer, narrowing=narrowing), parts, grouping.by)


def groups_of(
    ref: TopologyRef, shard: str, answer: Answer, grouping: Grouping, rows: Answer
) -> Grouped | pd.DataFrame:
    """Return one shard's groups; its rows where pandas is to group them after all.

    `rows` is the answer without what is computed.
    """
    by = grouping.by
    try:
        table = read_shard(ref, shard, asked_groups(answer, grouping))
    except QueryError as error:
        if error.sqlstate != OUT_OF_RANGE:
            raise
        rows = replace(rows, query=answer.query)
        frame = to_pandas(read_shard(ref, shard, rows), rows, "pyarrow", shard)
        for one in answer.narrowing.computed if answer.narrowing is not None else ():
            frame[one.name] = computed(one.of, frame)
        chosen: pd.DataFrame = frame[answer.schema.names]
        return chosen
    if not len(table):
        return to_pandas(answer.schema.empty_table(), answer, "pyarrow", shard)
    names = [field.name for field in by]
    keys = table.select(range(len(by))).rename_columns(names)
    grouped = keys.to_pandas(types_mapper=pandas_dtype_mapper("pyarrow")).groupby(
        names, dropna=not grouping.keeps_null
    )
    index, order = grouped.size().index, np.argsort(grouped.ngroup().to_numpy(), kind="stable")
    values = {}
    for (name, part), column in zip(grouping.parts, table.columns[len(by) :], strict=True):
        made = _values(part, column).take(pa.array(order))
        found = pd.Series(pd.arrays.ArrowExtensionArray(made), index, name=name)
        if part == _SIZE:
            found = pd.Series(made.to_numpy(), index)
        values[part.function, name] = found
    return Grouped(Groups(values))


def _values(part: Part, found: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return a value for each group, of the type that pandas would have chosen for all of them."""
    of_type = part.arrow_type
    if part.function in ("min", "max"):
        return found.cast(of_type)
    if part.function == "sum" and pa.types.is_integer(of_type):
        found = pa.chunked_array([[wrapped(one or 0) for one in found.to_pylist()]], pa.int64())
        try:  # the column's own where all fit
            return found.cast(of_type)
        except pa.ArrowInvalid:
            return found
    found = found.fill_null(pa.scalar(0, found.type))
    # pandas makes NULL of a NaN among sums
    is_nan = pc.is_nan(found) if pa.types.is_floating(found.type) else pa.scalar(value=False)
    return pc.if_else(is_nan, pa.scalar(None, found.type), found)
