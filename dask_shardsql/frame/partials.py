"""Reductions of columns: each shard computes its part, and dask's own tree combines the parts.

What dask calls a chunk, the part of one partition, is replaced by what the server says of the whole
shard, made into the very value that pandas would have had. All chunks of one read are one query, so
that a mean is of one sum and its own count. If one of them is not known to be the same in SQL, the
rows are read, and all are computed of these.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pandas as pd
import pyarrow as pa

from dask_shardsql.engine.drivers.narrowing import Aggregate, Narrowing
from dask_shardsql.engine.fetch import Answer, read_shard
from dask_shardsql.engine.registry import TopologyRef
from dask_shardsql.errors import QueryError
from dask_shardsql.frame._dask import (
    Blockwise,
    Chunk,
    Count,
    Max,
    Min,
    Projection,
    Sum,
)
from dask_shardsql.frame.dependents import is_known, parents_of
from dask_shardsql.frame.pushdown import field_of
from dask_shardsql.frame.to_pandas import to_pandas
from dask_shardsql.sql.types import Column, arrow_type_of

__all__ = ["ReadColumn", "chunks_of", "partials_of"]

_FUNCTIONS = {Sum: "sum", Count: "count", Min: "min", Max: "max"}
_OUT_OF_RANGE = "22003"
_HALF = 1 << 63
_ORDERED = ("integer", "decimal", "date", "timestamp")


@dataclass(frozen=True)
class Part:
    """A chunk that the server computes.

    Parameters
    ----------
    function : {"sum", "count", "min", "max"}
        What is computed.
    column : str
        Of which column.
    described : Column
        The column that the server answers.
    keywords : tuple
        Those of pandas' function.
    """

    function: str
    column: str
    described: Column
    keywords: tuple[tuple[str, Any], ...]

    @property
    def aggregate(self) -> Aggregate:
        """What the server is asked for."""
        return Aggregate(self.function, self.column, self.described.name, self.described.type_name)

    def value(self, found: Any, of_type: pa.DataType) -> Any:
        """Return what pandas would have computed of the rows."""
        if self.function == "count":
            return type(pd.Series([1]).count())(found or 0)
        if self.function == "sum" and pa.types.is_integer(of_type):
            of_type = pa.int64()
            if found is not None:  # Arrow's sum wraps around
                found = (int(found) + _HALF) % (2 * _HALF) - _HALF
        elif self.function == "sum":
            of_type = self.described.arrow_type
        dtype: Any = pd.ArrowDtype(of_type)
        one = pd.Series([found], dtype=dtype)
        return getattr(one, self.function)(**dict(self.keywords))


def chunks_of(read: Any, dependents: Any) -> tuple[Part, ...] | None:
    """Return all chunks that are made of a read, if they are all there is, and SQL knows them."""
    parts: set[Part] = set()
    for projection in parents_of(read, dependents):
        if not is_known(projection, dependents):  # made of another one, just now
            continue
        if type(projection) not in (Projection, ReadColumn):
            return None
        found = [_part(chunk, projection, read) for chunk in parents_of(projection, dependents)]
        if not found or None in found:
            return None
        parts |= {part for part in found if part is not None}
    in_order = sorted(parts, key=lambda part: (part.column, part.function, part.keywords))
    return tuple(in_order) or None


def _part(chunk: Any, projection: Any, read: Any) -> Part | None:
    function = _FUNCTIONS.get(chunk.kind) if type(chunk) is Chunk else None
    field = field_of(projection, read)
    keywords = dict(chunk.chunk_kwargs or {}) if function is not None else {}
    if function is None or field is None or keywords.get("skipna", True) is not True:
        return None
    column = next(one for one in read.answer.columns if one.name == field.name)
    type_name = {
        ("sum", "integer"): "numeric(38,0)",
        ("sum", "float"): "float8",
        ("sum", "decimal"): f"numeric(38,{getattr(column.arrow_type, 'scale', 0)})",
        ("min", "text"): "text",
        ("max", "text"): "text",
        **{(name, kind): column.type_name for name in ("min", "max") for kind in _ORDERED},
    }.get((function, field.kind))
    if function == "count":
        type_name = "int8"
    if type_name is None:
        return None
    found = Column(f"{function}_{column.name}", type_name, _arrow_type(type_name))
    return Part(function, column.name, found, tuple(sorted(keywords.items())))


def _arrow_type(type_name: str) -> pa.DataType:
    name, _, numbers = type_name.rstrip(")").partition("(")
    return arrow_type_of(name, *map(int, numbers.split(",") if numbers else ()))


class ReadColumn(Projection):  # type: ignore[misc]
    """One column of a read of which there are only chunks."""

    _parameters: ClassVar = ["frame", "columns", "parts"]

    def _simplify_up(self, parent: Any, dependents: Any) -> Any:
        parts = self.operand("parts")
        part = _part(parent, self, self.frame)
        if part is None or part not in parts:
            return None
        return TakePartial(self.frame.partials(parts), parts.index(part))


class TakePartial(Blockwise):  # type: ignore[misc]
    """One of several parts."""

    _parameters: ClassVar = ["frame", "index"]
    operation = staticmethod(operator.getitem)


def partials_of(
    ref: TopologyRef, shard: str, answer: Answer, parts: Sequence[Part]
) -> tuple[Any, ...]:
    """Return one shard's parts."""
    types = {column.name: column.arrow_type for column in answer.columns}
    where = answer.narrowing or Narrowing(tuple(types))
    columns = tuple(part.described for part in parts)
    narrowing = replace(where, aggregates=tuple(part.aggregate for part in parts))
    asked = replace(
        answer, described=columns, columns=columns, shard_column=None, narrowing=narrowing
    )
    try:
        (found,) = read_shard(ref, shard, asked).to_pylist()
    except QueryError as error:
        if error.sqlstate != _OUT_OF_RANGE:
            raise
        found = None
    if found is None:  # a sum that the server has no number for, where Arrow has
        frame = to_pandas(read_shard(ref, shard, answer), answer, "pyarrow", shard)
        return tuple(
            getattr(frame[part.column], part.function)(**dict(part.keywords)) for part in parts
        )
    return tuple(part.value(found[part.described.name], types[part.column]) for part in parts)
