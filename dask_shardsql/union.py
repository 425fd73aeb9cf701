"""All shards' tables, read by Dask's tasks and gathered; through shared memory where possible."""

from __future__ import annotations

from collections.abc import Callable, Set
from contextlib import nullcontext
from typing import Any

import pyarrow as pa

from dask_shardsql.engine.fetch import read_shard_shared
from dask_shardsql.engine.shared_memory import Offer, offered_memory, received
from dask_shardsql.engine.slices import read_slice_shared
from dask_shardsql.query import PreparedQuery
from dask_shardsql.run import client_of, run_graph, run_tasks, schedule_of, share_topology
from dask_shardsql.split import Split, slice_tasks

__all__ = ["read_tables"]

_NAME = "collect-sharded-sql"

# Which shards' tables to make, by number, or all; and by which offer: their numbers and results.
_Run = Callable[[Set[int] | None, Offer | None], list[tuple[int, Any]]]


def read_tables(
    prepared: PreparedQuery, how: Split | None, scheduler: Any, **options: Any
) -> list[tuple[int, pa.Table]]:
    """Return the tables of the shards, or of their slices, each with the number of its shard.

    Parameters
    ----------
    prepared : PreparedQuery
        What to read.
    how : Split, optional
        How the shards are split.
    scheduler : str, callable or Client, optional
        As in ``dask.compute``.
    **options
        What whoever runs the tasks takes besides, such as ``retries`` or ``priority``.
    """
    schedule = schedule_of(scheduler)
    if how is None:
        return _through_memory(_shards(prepared, schedule, options), schedule)
    return _through_memory(_slices(prepared, how, schedule, options), schedule)


def _shards(prepared: PreparedQuery, schedule: Any, options: dict[str, Any]) -> _Run:
    def run(only: Set[int] | None, offer: Offer | None) -> list[tuple[int, Any]]:
        chosen = [n for n in range(len(prepared.shards)) if only is None or n in only]
        results = run_tasks(
            read_shard_shared,
            prepared.topology,
            [prepared.shards[number] for number in chosen],
            prepared.answer,
            _NAME,
            schedule,
            offer,
            **options,
        )
        return list(zip(chosen, results, strict=True))

    return run


def _slices(prepared: PreparedQuery, how: Split, schedule: Any, options: dict[str, Any]) -> _Run:
    ref, query_id = share_topology(prepared.topology, schedule), prepared.answer.query.query_id

    def run(only: Set[int] | None, offer: Offer | None) -> list[tuple[int, Any]]:
        chosen = how if only is None else how.only(only)
        readers = (read_slice_shared, read_shard_shared)
        graph, keys = slice_tasks(ref, prepared, chosen, *readers, _NAME, offer)
        results = run_graph(graph, keys, query_id, schedule, **options)
        return [(shard, result) for (shard, _), result in zip(chosen.parts, results, strict=True)]

    return run


def _through_memory(run: _Run, schedule: Any) -> list[tuple[int, pa.Table]]:
    """Return the tables that tasks make, through shared memory from workers of this host.

    Where one is lost, all of its shard are read again, as the others are of another snapshot.
    """
    remote = client_of(schedule) is not None
    with offered_memory() if remote else nullcontext() as offer:
        found = [(shard, received(result)) for shard, result in run(None, offer)]
    lost = {shard for shard, table in found if table is None}
    again = iter([received(result) for _, result in run(lost, None)] if lost else ())
    return [(shard, next(again) if shard in lost else table) for shard, table in found]
