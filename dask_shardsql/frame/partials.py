"""Reductions of columns: each shard computes its part, and dask's own tree combines the parts.

What dask calls a chunk, the part of one partition, is replaced by what the server says of the whole
shard, made into the very value that pandas would have had. All chunks of one read are one query, so
that a mean is of one sum and its own count. If one of them is not known to be the same in SQL, the
rows are read, and all are computed of these.
"""

from __future__ import annotations

import functools
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
from dask_shardsql.frame.pushdown import Known, is_computed, known_value
from dask_shardsql.frame.to_pandas import to_pandas
from dask_shardsql.sql.predicates import Arithmetic, Field, Term
from dask_shardsql.sql.types import Column, arrow_type_of

__all__ = [
    "OUT_OF_RANGE",
    "Part",
    "ReadValue",
    "asked_for",
    "chunk_part",
    "chunks_of",
    "computed",
    "part_of",
    "partials_of",
    "wrapped",
]

_FUNCTIONS = {Sum: "sum", Count: "count", Min: "min", Max: "max"}
OUT_OF_RANGE = "22003"
"""SQLSTATE of a sum that the server has no number for, where Arrow has."""
_HALF = 1 << 63
_PYTHON = {"+": operator.add, "-": operator.sub, "*": operator.mul}
_ORDERED = ("integer", "decimal", "date", "timestamp")


@dataclass(frozen=True)
class Part:
    """A chunk that the server computes.

    Parameters
    ----------
    function : {"sum", "count", "min", "max", "size"}
        What is computed.
    of : Field, Arithmetic or value
        Of what.
    arrow_type : pyarrow.DataType
        Its type.
    type_name : str
        The type of what the server answers.
    keywords : tuple
        Those of pandas' function.
    """

    function: str
    of: Term
    arrow_type: pa.DataType
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
        return Aggregate(function, self.of, name, self.type_name)

    def value(self, found: Any) -> Any:
        """Return what pandas would have computed of the rows."""
        of_type = self.arrow_type
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


def part_of(function: str | None, known: Known | None, keywords: Any = None) -> Part | None:
    """Return how the server computes a function of a value, if it can as pandas does."""
    if function is None or known is None:
        return None
    type_name = {
        ("sum", "integer"): "numeric(38,0)",
        ("sum", "float"): "float8",
        ("sum", "decimal"): f"numeric(38,{getattr(known.arrow_type, 'scale', 0)})",
        ("min", "text"): "text",
        ("max", "text"): "text",
        **{(name, kind): known.type_name for name in ("min", "max") for kind in _ORDERED},
    }.get((function, known.kind))
    if function == "count":
        type_name = "int8"
    if type_name is None:
        return None
    in_order = tuple(sorted((keywords or {}).items()))
    return Part(function, known.term, known.arrow_type, type_name, in_order)


def chunks_of(read: Any, dependents: Any) -> tuple[Part, ...] | None:
    """Return all chunks that are made of a read, if they are all there is, and SQL knows them."""
    parts: dict[Part, None] = {}
    for one in _known_parents(read, dependents):
        if type(one) not in (Projection, ReadValue) or not _gather(one, read, dependents, parts):
            return None
    in_order = sorted(parts, key=lambda part: (str(part.of), part.function, part.keywords))
    return tuple(in_order) or None


def _gather(value: Any, read: Any, dependents: Any, parts: dict[Part, None]) -> bool:
    """Note all chunks that are made of a value; return whether they are all there is."""
    above = _known_parents(value, dependents)
    for one in above:
        if is_computed(one):
            if not _gather(one, read, dependents, parts):
                return False
        elif (part := chunk_part(one, known_value(value, read))) is not None:
            parts[part] = None
        else:
            return False
    return bool(above)


def _known_parents(expr: Any, dependents: Any) -> list[Any]:
    """Return what is made of an expression, without what has come of that just now."""
    return [one for one in parents_of(expr, dependents) if is_known(one, dependents)]


def chunk_part(chunk: Any, known: Known | None) -> Part | None:
    """Return how the server computes a chunk of a value, if it can as pandas does."""
    function = _FUNCTIONS.get(chunk.kind) if type(chunk) is Chunk else None
    keywords = dict(chunk.chunk_kwargs or {}) if function is not None else {}
    if keywords.get("skipna", True) is not True:
        return None
    return part_of(function, known, keywords)


class ReadValue(Blockwise):  # type: ignore[misc]
    """A column of a read, or what is computed of its columns, of which there are only chunks."""

    _parameters: ClassVar = ["frame", "known", "name", "parts"]

    @functools.cached_property
    def _meta(self) -> Any:
        dtype: Any = pd.ArrowDtype(self.known.arrow_type)
        return pd.Series([], dtype=dtype, name=self.operand("name"), index=self.frame._meta.index)

    @staticmethod
    def operation(frame: Any, known: Known, name: Any, parts: Any) -> Any:
        """Return the values of rows."""
        return computed(known.term, frame).rename(name)

    def _simplify_up(self, parent: Any, dependents: Any) -> Any:
        parts = self.operand("parts")
        if is_computed(parent):
            known = known_value(parent, self.frame)
            if known is None:
                return None
            return ReadValue(self.frame, known, parent._meta.name, parts)
        part = chunk_part(parent, self.known)
        if part is None or part not in parts:
            return None
        return TakePartial(self.frame.partials(parts), parts.index(part))


class TakePartial(Blockwise):  # type: ignore[misc]
    """One of several parts."""

    _parameters: ClassVar = ["frame", "index"]
    operation = staticmethod(operator.getitem)


def computed(term: Term, frame: Any) -> Any:
    """Return what is computed of the columns of a DataFrame."""
    if isinstance(term, Field):
        return frame[term.name]
    if not isinstance(term, Arithmetic):
        return term
    return _PYTHON[term.operator](computed(term.left, frame), computed(term.right, frame))


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
    try:
        (found,) = read_shard(ref, shard, asked_for(answer, parts)).to_pylist()
    except QueryError as error:
        if error.sqlstate != OUT_OF_RANGE:
            raise
        found = None
    if found is None:
        frame = to_pandas(read_shard(ref, shard, answer), answer, "pyarrow", shard)
        return tuple(
            getattr(computed(part.of, frame), part.function)(**dict(part.keywords))
            for part in parts
        )
    return tuple(part.value(one) for part, one in zip(parts, found.values(), strict=True))
