"""Reading a shard's answer in slices: the functions that tasks call."""

from __future__ import annotations

import multiprocessing
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pyarrow as pa

from dask_shardsql.engine.cancel import refuse_if_cancelled
from dask_shardsql.engine.drivers.base import Query
from dask_shardsql.engine.drivers.slicing import Part, Slicing, can_slice
from dask_shardsql.engine.fetch import Answer, read_shard, read_shard_shared
from dask_shardsql.engine.lending import connection_to, naming
from dask_shardsql.engine.pools import pool_of
from dask_shardsql.engine.registry import TopologyRef
from dask_shardsql.engine.shared_memory import Offer, SharedTable
from dask_shardsql.engine.snapshots import HoldingSession, Snapshot
from dask_shardsql.errors import (
    ConfigurationError,
    QueryError,
    ShardSQLError,
    SnapshotLostError,
)

__all__ = ["hold_snapshot", "measure_shard", "read_slice", "read_slice_shared"]

_GONE = frozenset({"22023", "42704", "55000"})  # what servers say of a snapshot that is gone
_LOCK_TIMEOUT = "55P03"


def measure_shard(
    ref: TopologyRef, shard: str, query: Query, slicing: Slicing
) -> int | ShardSQLError:
    """Return about how many bytes one shard has to read, or the error it gave.

    As in ``describe_shard``, so that the caller can say once what n shards said.
    """
    try:
        with connection_to(ref.resolve(), shard, query) as (driver, connection):
            return can_slice(driver).measure(connection, query, slicing)
    except ShardSQLError as error:
        return error


def hold_snapshot(
    ref: TopologyRef, shard: str, query: Query, slicing: Slicing, slices: int, key: Any
) -> Snapshot:
    """Return a snapshot of one shard, which holds a session open until it is let go of.

    Parameters
    ----------
    ref : TopologyRef
        The topology.
    shard : str
        Name of the shard.
    query : Query
        What the slices are of.
    slicing : Slicing
        By what it is cut.
    slices : int
        Into how many.
    key : hashable
        The key of the task that calls this.

    Raises
    ------
    SnapshotLostError
        This task ran before, and what it returned is lost.
    ShardSQLError
        Whatever else goes wrong, with the shard's name.
    """
    pool = pool_of(ref.resolve(), shard)
    session = HoldingSession(key, pool)
    try:
        with naming(shard, pool, query):
            refuse_if_cancelled(query.owner, shard)
            if session.is_local and _is_pool_process():
                raise ConfigurationError(
                    "scheduler='processes' cannot split a shard: no process outlives its task to "
                    "hold the snapshot. Use scheduler='threads', or a LocalCluster"
                )
            with pool.apart(query.owner, shard) as connection:
                refuse_if_cancelled(query.owner, shard)
                held = can_slice(pool.driver).hold(connection, query, slicing, slices)
            session.take(connection)
            session.publish()
    except BaseException:
        session.end()
        raise
    return Snapshot(shard, *held, session)


def read_slice(
    ref: TopologyRef, shard: str, answer: Answer, part: Part, snapshot: Snapshot
) -> pa.Table:
    """Return one slice of the answer of one shard; otherwise as ``read_shard``."""
    with _cut(ref, shard, answer, part, snapshot) as sliced:
        return read_shard(ref, shard, sliced)


def read_slice_shared(
    ref: TopologyRef,
    shard: str,
    answer: Answer,
    part: Part,
    snapshot: Snapshot,
    offer: Offer | None,
) -> SharedTable | pa.Table:
    """Return one slice of the answer of one shard; otherwise as ``read_shard_shared``."""
    with _cut(ref, shard, answer, part, snapshot) as sliced:
        return read_shard_shared(ref, shard, sliced, offer)


@contextmanager
def _cut(
    ref: TopologyRef, shard: str, answer: Answer, part: Part, snapshot: Snapshot
) -> Iterator[Answer]:
    """Give the answer of a slice; say clearly what a slice alone can meet."""
    driver = can_slice(pool_of(ref.resolve(), shard).driver)
    query = driver.cut(answer.query, part, snapshot.name, snapshot.bounds)
    try:
        yield replace(answer, query=query, slice=(part.number, part.slices))
    except QueryError as error:
        if error.sqlstate == _LOCK_TIMEOUT:
            error.hint = (
                "a session that is to change a table of this query (ALTER TABLE, TRUNCATE, "
                "VACUUM FULL) waits until the query's snapshot is released, and keeps the slices "
                "waiting: read again when it is done"
            )
        if error.sqlstate not in _GONE or not _is_lost(ref, shard, answer.query, snapshot):
            raise
        raise SnapshotLostError(
            f"the session that held the snapshot of shard {shard!r} is gone, before slice "
            f"{part.number + 1} of {part.slices} could be read in it (the server said: "
            f"{error.message}). Its worker was stopped, or the session was ended on the server: "
            "compute it again",
            shard,
            error.server,
        ) from error


def _is_lost(ref: TopologyRef, shard: str, query: Query, snapshot: Snapshot) -> bool:
    with connection_to(ref.resolve(), shard, query) as (driver, connection):
        return can_slice(driver).snapshot_is_lost(connection, snapshot.name)


def _is_pool_process() -> bool:
    in_main = threading.current_thread() is threading.main_thread()
    return in_main and multiprocessing.parent_process() is not None
