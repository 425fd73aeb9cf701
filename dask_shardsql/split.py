"""Into how many slices each shard is split, and by what."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Set
from dataclasses import dataclass
from typing import Any

from dask._task_spec import Task, TaskRef

from dask_shardsql.config import size_in_bytes
from dask_shardsql.engine.drivers.base import Query
from dask_shardsql.engine.drivers.slicing import Part, Slicing
from dask_shardsql.engine.registry import TopologyRef
from dask_shardsql.engine.slices import hold_snapshot, measure_shard
from dask_shardsql.engine.stoppable import end_after_errors
from dask_shardsql.errors import ColumnError, ConfigurationError, ShardSQLError
from dask_shardsql.query import PreparedQuery
from dask_shardsql.run import run_tasks

__all__ = ["Split", "SplitOptions", "slice_tasks", "snapshot_task", "split"]

METHODS = ("hash", "range")
_MOST_SLICES = 10_000


@dataclass(frozen=True)
class SplitOptions:
    """What the user asks for; checked before any server is.

    Parameters
    ----------
    partitions_per_shard : int, optional
        Into how many partitions to split each shard.
    partition_size : str or int, optional
        About how large a partition is to be: ``"256 MiB"``, or a number of bytes.
    partition_by : str, optional
        The column to cut by.
    partition_method : {"range", "hash"}, optional
        How to cut by it.
    """

    partitions_per_shard: int | None = None
    partition_size: str | int | None = None
    partition_by: str | None = None
    partition_method: str | None = None

    def __post_init__(self) -> None:
        number, size = self.partitions_per_shard, self.partition_size
        if number is not None and size is not None:
            raise ConfigurationError(
                "partitions_per_shard and partition_size both say how many partitions a shard "
                "gets: give one of them"
            )
        if number is not None and (
            not isinstance(number, int) or isinstance(number, bool) or number < 1
        ):
            raise ConfigurationError(
                f"partitions_per_shard must be a whole number from 1, not {number!r}"
            )
        if size is not None:
            size_in_bytes("partition_size", size)
        if self.partition_by is not None and (
            not isinstance(self.partition_by, str) or not self.partition_by
        ):
            raise ConfigurationError("partition_by must be the name of a column")
        if self.partition_method is not None and self.partition_method not in METHODS:
            raise ConfigurationError(
                f"partition_method is {self.partition_method!r}, where "
                f"{' or '.join(map(repr, METHODS))} is needed"
            )
        if self.partition_method is not None and self.partition_by is None:
            raise ConfigurationError("partition_method needs partition_by, the column to cut by")
        if self.partition_by is not None and number is None and size is None:
            raise ConfigurationError(
                "partition_by needs partitions_per_shard or partition_size, which say how many "
                "partitions a shard gets"
            )

    @property
    def is_asked_for(self) -> bool:
        """Whether any shard may have to be split."""
        return self.partitions_per_shard not in (None, 1) or self.partition_size is not None


@dataclass(frozen=True)
class Split:
    """How the shards of a query are split.

    Parameters
    ----------
    slicing : Slicing
        By what.
    slices : tuple of int
        For each shard, into how many.
    """

    slicing: Slicing
    slices: tuple[int, ...]

    @property
    def parts(self) -> tuple[tuple[int, Part], ...]:
        """For each partition the number of its shard, and the slice that it is."""
        return tuple(
            (shard, Part(self.slicing, number, slices))
            for shard, slices in enumerate(self.slices)
            for number in range(slices)
        )

    def only(self, shards: Set[int]) -> Split:
        """Return the same for no more than the shards of these numbers."""
        slices = (n if shard in shards else 0 for shard, n in enumerate(self.slices))
        return Split(self.slicing, tuple(slices))


def split(
    prepared: PreparedQuery, options: SplitOptions, table: str | None = None, scheduler: Any = None
) -> Split | None:
    """Return how to split the shards, or None where each is one partition.

    Parameters
    ----------
    prepared : PreparedQuery
        What to read.
    options : SplitOptions
        What the user asks for.
    table : str, optional
        The quoted name of the one table that the query reads whole.
    scheduler : str, callable or Client, optional
        Where the shards are asked, as in ``dask.compute``.

    Raises
    ------
    ConfigurationError
        The query cannot be split so, or is split into too many.
    ColumnError
        There is no such column.
    ShardSQLError
        A shard cannot say how large its answer is.
    """
    if not options.is_asked_for:
        return None
    column, names = options.partition_by, [column.name for column in prepared.answer.columns]
    if table is None and column is None:
        raise ConfigurationError(
            "to split a query, name the column of its answer to cut by: partition_by='...'"
        )
    if table is None and column not in names:
        raise ColumnError(
            f"partition_by is {column!r}, which is no column of the query; it has "
            f"{', '.join(map(repr, names))}",
            (str(column),),
        )
    method = "ctid" if column is None else options.partition_method or "range"
    slicing = Slicing(method, column, table)
    query = prepared.answer.query
    found = run_tasks(
        measure_shard,
        prepared.topology,
        prepared.shards,
        query,
        "measure-sharded-sql",
        scheduler,
        slicing,
    )
    for outcome in found:
        if isinstance(outcome, ShardSQLError):
            raise outcome
    if options.partition_size is None:
        slices = [options.partitions_per_shard or 1] * len(found)
    else:
        size = size_in_bytes("partition_size", options.partition_size)
        slices = [max(1, -(-nbytes // size)) for nbytes in found]
    if max(slices) > _MOST_SLICES:
        shard = prepared.shards[slices.index(max(slices))]
        raise ConfigurationError(
            f"shard {shard!r} would be split into {max(slices):,} partitions, where "
            f"{_MOST_SLICES:,} are the most: raise partition_size, or lower partitions_per_shard"
        )
    return Split(slicing, tuple(slices)) if max(slices) > 1 else None


def snapshot_task(
    key: Any,
    ref: TopologyRef,
    shard: str,
    query: Query,
    part: Part,
    hold: Callable[..., Any] = hold_snapshot,
) -> Task:
    """Return the task that holds the snapshot of one shard for its slices."""
    return Task(key, hold, ref, shard, query, part.slicing, part.slices, key)


def slice_tasks(
    ref: TopologyRef,
    prepared: PreparedQuery,
    how: Split,
    read: Callable[..., Any],
    read_whole: Callable[..., Any],
    name: str,
    *more: Any,
) -> tuple[dict[Any, Task], list[Any]]:
    """Return a graph that reads every slice, and the keys of the slices in their order.

    Parameters
    ----------
    ref : TopologyRef
        What the tasks carry in place of the topology.
    prepared : PreparedQuery
        What to read.
    how : Split
        Into what.
    read : callable
        Reads a slice: ``read_slice`` or ``read_slice_shared``.
    read_whole : callable
        Reads a shard that is not split: ``read_shard`` or ``read_shard_shared``.
    name : str
        How the tasks' keys begin.
    *more
        Further arguments of both.
    """
    end_after_errors()
    token = uuid.uuid4().hex
    graph: dict[Any, Task] = {}
    keys: list[Any] = []
    answer = prepared.answer
    for number, (index, part) in enumerate(how.parts):
        shard, held = prepared.shards[index], (f"snapshot-{name}-{token}", index)
        key = (f"{name}-{token}", number)
        keys.append(key)
        if part.slices == 1:
            graph[key] = Task(key, read_whole, ref, shard, answer, *more)
            continue
        if held not in graph:
            graph[held] = snapshot_task(held, ref, shard, answer.query, part)
        graph[key] = Task(key, read, ref, shard, answer, part, TaskRef(held), *more)
    return graph, keys
