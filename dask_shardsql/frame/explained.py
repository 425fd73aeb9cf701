"""What is asked of shards for a DataFrame, and what of it is left to pandas; nothing is asked."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Iterator
from typing import Any

from dask_shardsql.config import Settings
from dask_shardsql.engine.drivers.base import driver_named
from dask_shardsql.engine.drivers.narrowing import Narrowing, NarrowingDriver
from dask_shardsql.engine.fetch import Answer, counted
from dask_shardsql.engine.registry import TopologyRef
from dask_shardsql.errors import TopologyNotFoundError
from dask_shardsql.frame._dask import (
    Between,
    Blockwise,
    BlockwiseHead,
    Chunk,
    DelayedExpr,
    Expr,
    Filter,
    FunctionMap,
    GroupByChunk,
    Isin,
    IsNa,
    NotNull,
    Projection,
    PropertyMap,
    Query,
)
from dask_shardsql.frame.constants import held
from dask_shardsql.frame.expr import ReadCounts, ReadGroups, ReadPartials, ReadShards, Snapshots
from dask_shardsql.frame.groups import asked_groups
from dask_shardsql.frame.partials import asked_for, chunk_part
from dask_shardsql.frame.pushdown import conjuncts, known_value, split_conditions
from dask_shardsql.sql.predicates import postgresql

__all__ = ["explained", "is_frame"]

_ASKED = {ReadCounts: "count", ReadPartials: "reductions", ReadGroups: "groups"}
_METHODS = {Between: "between", Isin: "isin", IsNa: "isna", NotNull: "notnull"}
_NOT_ALIKE = "PostgreSQL is not known to agree with Arrow on every row"
_NOWHERE = "nowhere: "
_BESIDES = "other parts need all of these rows"
_NOT_A_READ = "it is not of columns as they were read"
_RUNS_FIRST = (
    "dask itself computes something of the rows before it can go on, as the bounds of partitions "
    "that are sorted: what is said here is known without that"
)


def is_frame(thing: Any) -> bool:
    """Whether it is a DataFrame of dask, or a part or a value of one."""
    return isinstance(getattr(thing, "expr", None), Expr)


def explained(frame: Any) -> tuple[list[dict[str, Any]], list[dict[str, str]], str]:
    """Return what is read for a DataFrame, what is left to pandas, and what is to be said of both.

    Parameters
    ----------
    frame : DataFrame, Series, Index or Scalar
        Of dask.
    """
    expr, message = _unreadable(frame.expr), ""
    try:
        optimized = expr.optimize(fuse=False)
    except TopologyNotFoundError:  # dask has begun to compute something
        optimized, message = expr.simplify(), _RUNS_FIRST
    nodes = list(optimized.walk())
    reads = [_read(one) for one in nodes if isinstance(one, ReadShards)]
    left = {(what, why): None for node in nodes for what, why in _left(node)}
    return reads, [{"operation": what, "because": why} for what, why in left], message


def _unreadable(expr: Any) -> Any:
    """Return the same expression of shards that no task can find."""
    for kind in (Snapshots, ReadShards):
        for one in list(expr.find_operations(kind)):
            nowhere = TopologyRef(_NOWHERE + one.operand("ref").fingerprint)
            expr = expr.substitute(one, one.substitute_parameters({"ref": nowhere}))
    return expr


def _read(read: ReadShards) -> dict[str, Any]:
    answer, snapshots = _asked(read), read.operand("snapshots")
    topology = TopologyRef(read.operand("ref").fingerprint.removeprefix(_NOWHERE)).resolve()
    driver, query = driver_named(topology.shards[0].primary.driver), answer.query
    narrowing = answer.narrowing or Narrowing(())
    if answer.narrowing is not None and isinstance(driver, NarrowingDriver):
        query = driver.narrow(query, narrowing)
    numbers = read._partitions if read._filtered else range(len(read._parts))
    parts = [read._parts[number] for number in numbers]
    by = None if snapshots is None else snapshots.operand("split").slicing
    return {
        "asks_for": _ASKED.get(type(read), "rows"),
        "sql": query.sql,
        "shards": list(dict.fromkeys(read.operand("shards")[number] for number, _ in parts)),
        "partitions": len(parts),
        "sliced_by": None if by is None else by.column or by.method,
        "columns": answer.schema.names,
        "conditions": [postgresql(one, driver.quote_identifier) for one in narrowing.where],
        "limit": narrowing.limit,
        "because": _why_not_any(read),
    }


def _asked(read: ReadShards) -> Answer:
    """Return what the tasks of a read ask for."""
    if isinstance(read, ReadCounts):
        return counted(read.answer)
    if isinstance(read, ReadPartials):
        return asked_for(read.answer, read.operand("parts"))
    if isinstance(read, ReadGroups):
        return asked_groups(read.answer, read.operand("grouping"))
    return read.answer


def _why_not_any(read: ReadShards) -> str:
    """Return why no condition can become a part of a query; nothing if some can."""
    answer, backend = read.operand("answer"), read.operand("dtype_backend")
    if answer.gather is not None:
        return "rows of several shards meet for merge='global'"
    if not read.operand("can_narrow"):
        return "only PostgreSQL is asked for less than a query's answer"
    if read.is_named:
        return "all rows are read under the name of a snapshot"
    if not Settings.current().pushdown:
        return "shardsql.pushdown is off"
    return "" if backend == "pyarrow" else f"dtype_backend={backend!r} has other NULLs and types"


def _left(node: Any) -> Iterator[tuple[str, str]]:
    """Give what dask does of what shards could do, and why it does."""
    if type(node) not in (Filter, Query, Chunk, GroupByChunk, BlockwiseHead):
        return
    below = list(node.frame.walk())
    reads = [one for one in below if isinstance(one, ReadShards)]
    if not reads or isinstance(reads[0], ReadGroups):
        return
    read, frame = reads[0], node.frame
    while isinstance(frame, Projection):
        frame = frame.frame
    why = _why_not_any(read)
    if type(node) is Query:
        yield _shown(node), why or "what query() says is looked into by pandas alone"
    elif type(node) is Filter:
        for one in conjuncts(node.predicate):
            why_this = _why_not(one, read) if frame is read else _NOT_A_READ
            yield _shown(one), why or why_this
    elif all(
        isinstance(one, (Blockwise, Snapshots)) for one in below
    ):  # what is made of other rows is not
        if type(node) is not BlockwiseHead and read.operand("snapshots") is not None:
            why = why or "the shards are read in slices"
        elif any(isinstance(one, (Filter, Query)) for one in below):
            why = why or "a condition before it is in dask"
        if why or type(node) is not BlockwiseHead or read.operand("limit") is None:
            yield _shown(node), why or _why_not_made(node, read)


def _why_not_made(node: Any, read: ReadShards) -> str:
    """Return why shards do not make that of the rows of a read."""
    if type(node) is GroupByChunk:
        return f"shards are not known to make the same groups, or {_BESIDES}"
    if type(node) is Chunk and chunk_part(node, known_value(node.frame, read)) is None:
        return "shards are not known to compute the same"
    return _BESIDES


def _why_not(condition: Any, read: ReadShards) -> str:
    """Return why a condition on the rows of a read has not become a part of its query."""
    if read.operand("limit") is not None:
        return "head() comes before it"
    if split_conditions(condition, read)[0]:
        return _BESIDES
    return _NOT_ALIKE


def _shown(expr: Any) -> str:
    """Return an expression about as it was written."""
    if isinstance(expr, DelayedExpr):
        values = held(expr.operand("obj"))
        return reprlib.repr(values.tolist() if hasattr(values, "tolist") else values)
    if not isinstance(expr, Expr):
        return reprlib.repr(expr)
    if isinstance(expr, ReadShards):
        return "ddf"
    if isinstance(expr, Chunk):
        return _shown_chunk(expr)
    of = _shown(expr.operands[0])
    symbol = getattr(expr, "_operator_repr", None)
    if symbol is not None and len(expr.operands) == 1:
        return f"{symbol}{of}"
    if symbol is not None:
        return f"({of} {symbol} {_shown(expr.operands[1])})"
    if isinstance(expr, Query):
        return f"{of}.query({expr.operand('_expr')!r})"
    if isinstance(expr, Filter):
        return f"{of}[...]"
    if isinstance(expr, BlockwiseHead):
        return f"{of}.head({expr.n})"
    if isinstance(expr, Projection):
        return f"{of}[{expr.operand('columns')!r}]"
    if isinstance(expr, PropertyMap):
        return f"{of}.{expr.accessor}.{expr.attr}"
    if isinstance(expr, FunctionMap):
        named = [f"{name}={_shown(value)}" for name, value in expr.operand("kwargs").items()]
        given = ", ".join([*map(_shown, expr.operand("args")), *named])
        return f"{of}.{expr.accessor}.{expr.attr}({given})"
    if (method := _METHODS.get(type(expr))) is not None:
        return f"{of}.{method}({', '.join(map(_shown, expr.operands[1:]))})"
    return f"{type(expr).__name__}({of}, ...)"


def _shown_chunk(chunk: Any) -> str:
    name = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", chunk.kind.__name__).lower()
    if not isinstance(chunk, GroupByChunk):
        return f"{_shown(chunk.frame)}.{name}()"
    name = "agg" if name.endswith("groupby_aggregation") else name
    by = ", ".join(map(_shown, chunk.by))
    return f"{_shown(chunk.frame)}.groupby({by}).{name}()"
