"""Reductions of columns: each shard computes its part, and dask's own tree combines the parts.

What dask calls a chunk, the part of one partition, is replaced by what the server says of the whole
shard, made into the very value that pandas would have had. All chunks of one read are one query, so
that a mean is of one sum and its own count. If one of them is not known to be the same in SQL, the
rows are read, and all are computed of these.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
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
from dask_shardsql.sql.predicates import Field
from dask_shardsql.sql.types import Column, arrow_type_of

__all__ = [
    "OUT_OF_RANGE",
    "Part",
    "ReadColumn",
    "asked_for",
    "chunks_of",
    "part_of",
    "partials_of",
    "wrapped",
]

_FUNCTIONS = {Sum: "sum", Count: "count", Min: "min", Max: "max"}
OUT_OF_RANGE = "22003"
"""SQLSTATE of a sum that the server has no number for, where Arrow has."""
_HALF = 1 << 63
_ORDERED = ("integer", "decimal", "date", "timestamp")


@dataclass(frozen=True)
class Part:
    """A chunk that the server computes.

    Parameters
    ----------
    function : {"sum", "count", "min", "max", "size"}
        What is computed.
    column : str
        Of which column.
    type_name : str
        The type of what the server answers.
    keywords : tuple
        Those of pandas' function.
    """

    function: str
    column: str
    type_name: str
    keywords: tuple[tuple[str, Any], ...] = ()

    def described(self, name: str) -> Column:
        """Return the column that the server answers, if it is called that."""
        kind, _, numbers = self.type_name.rstrip(")").partition("(")
        arrow_type = arrow_type_of(kind, *map(int, numbers.split(",") if numbers else ()))
        return Column(name, self.type_name, arrow_type)

    def aggregate(self, name: str) -> Aggregate:
        """Return what the server is asked for."""
        function = "count" if self.function == "size" else self.function
        return Aggregate(function, self.column, name, self.type_name)

    def value(self, found: Any, of_type: pa.DataType) -> Any:
        """Return what pandas would have computed of the rows."""
        if self.function == "count":
            return type(pd.Series([1]).count())(found or 0)
        if self.function == "sum" and pa.types.is_integer(of_type):
            of_type = pa.int64()
            found = None if found is None else wrapped(found)
        elif self.function == "sum":
            of_type = self.described("").arrow_type
        dtype: Any = pd.ArrowDtype(of_type)
        one = pd.Series([found], dtype=dtype)
        return getattr(one, self.function)(**dict(self.keywords))


def wrapped(number: Any) -> int:
    """Return what is left of a sum in 64 bits, as Arrow's sum wraps around."""
    return (int(number) + _HALF) % (2 * _HALF) - _HALF


def part_of(
    function: str | None, field: Field | None, keywords: Mapping[str, Any], answer: Answer
) -> Part | None:
    """Return how the server computes a function of a column, if it can as pandas does."""
    if function is None or field is None:
        return None
    column = next(one for one in answer.columns if one.name == field.name)
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
    return Part(function, column.name, type_name, tuple(sorted(keywords.items())))


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
    keywords = dict(chunk.chunk_kwargs or {}) if function is not None else {}
    if keywords.get("skipna", True) is not True:
        return None
    return part_of(function, field_of(projection, read), keywords, read.answer)


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


def asked_for(answer: Answer, parts: Sequence[Part], by: Sequence[Field] = ()) -> Answer:
    """Return an answer that has parts instead of rows: those of all, or of each group."""
    described = {column.name: column for column in answer.described}
    keys = [replace(described[f.name], name=f"key_{n}") for n, f in enumerate(by)]
    names = [f"part_{number}" for number in range(len(parts))]
    values = [part.described(name) for part, name in zip(parts, names, strict=True)]
    narrowing = replace(
        answer.narrowing or Narrowing(tuple(described)),
        aggregates=tuple(part.aggregate(name) for part, name in zip(parts, names, strict=True)),
        groups=tuple(by),
    )
    columns = (*keys, *values)
    return replace(
        answer, described=columns, columns=columns, shard_column=None, narrowing=narrowing
    )


def partials_of(
    ref: TopologyRef, shard: str, answer: Answer, parts: Sequence[Part]
) -> tuple[Any, ...]:
    """Return one shard's parts."""
    types = {column.name: column.arrow_type for column in answer.columns}
    try:
        (found,) = read_shard(ref, shard, asked_for(answer, parts)).to_pylist()
    except QueryError as error:
        if error.sqlstate != OUT_OF_RANGE:
            raise
        found = None
    if found is None:
        frame = to_pandas(read_shard(ref, shard, answer), answer, "pyarrow", shard)
        return tuple(
            getattr(frame[part.column], part.function)(**dict(part.keywords)) for part in parts
        )
    both = zip(parts, found.values(), strict=True)
    return tuple(part.value(value, types[part.column]) for part, value in both)
