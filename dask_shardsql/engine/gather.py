"""One query over the rows of all shards: one of them gathers what the query needs, and runs it.

The functions that Dask tasks call. Rows go from server to server through the process that the task
runs in, in the servers' own form; nothing here looks into them.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from typing import Any

from dask_shardsql.engine.cancel import refuse_if_cancelled
from dask_shardsql.engine.drivers.base import Columns, OnBatch, Query
from dask_shardsql.engine.drivers.gathering import (
    Estimate,
    Extract,
    PlanningDriver,
    Sending,
    Split,
    Splitting,
    Survey,
    TargetFailedError,
    can_gather,
)
from dask_shardsql.engine.lending import connection_to, naming
from dask_shardsql.engine.pools import Pool, pool_of
from dask_shardsql.engine.registry import TopologyRef
from dask_shardsql.engine.sending import sent_by_all
from dask_shardsql.errors import MergeRefusedError, ShardSQLError
from dask_shardsql.progress import ShardEvent, emit
from dask_shardsql.topology import ShardedTable, Topology

__all__ = ["Gather", "estimate_shard", "expect_shard", "read_gathered", "survey_shard", "too_much"]


@dataclass(frozen=True)
class Gather:
    """What is gathered for a query.

    Parameters
    ----------
    shards : tuple of str
        Names of all shards. If what gathers is none of them, its own rows are left out.
    sharded : tuple of ShardedTable
        The sharded tables.
    max_bytes : int
        How much at the most.
    split : Split, optional
        The query in parts, if it is not what is needed of whole tables that is gathered.
    """

    shards: tuple[str, ...]
    sharded: tuple[ShardedTable, ...]
    max_bytes: int
    split: Split | None = None


def survey_shard(
    ref: TopologyRef,
    shard: str,
    query: Query,
    sharded: Sequence[ShardedTable],
    shards: Sequence[str],
) -> Survey | ShardSQLError:
    """Return what a query reads of the sharded tables, as one shard sees it, or its error."""
    try:
        with connection_to(ref.resolve(), shard, query) as (driver, connection):
            columns = driver.describe(connection, query)
            gathering = can_gather(driver).gathering(connection, query, sharded)
            try:
                survey = gathering.survey()
                extracts = tuple(_at(shard, survey.extracts))
                survey = replace(survey, extracts=extracts, columns=columns)
                if survey.extracts and isinstance(gathering, Splitting):
                    found = gathering.split(shards)
                    if isinstance(found, str):
                        return replace(survey, why=found)
                    return replace(survey, split=found)
                return survey
            finally:
                gathering.abandon()
    except ShardSQLError as error:
        return error


def _at(shard: str, extracts: Sequence[Extract]) -> Iterator[Extract]:
    """Say of reference tables that only one shard's rows are gathered."""
    for one in extracts:
        yield one if one.key else replace(one, shards=frozenset([shard]))


def estimate_shard(
    ref: TopologyRef, shard: str, query: Query, extracts: Sequence[Extract]
) -> tuple[Columns, list[Estimate]] | ShardSQLError:
    """Return a query's columns on one shard, and how much it has of each extract, or its error."""
    try:
        with connection_to(ref.resolve(), shard, query) as (driver, connection):
            estimates = can_gather(driver).estimate(connection, query, extracts)
            return driver.describe(connection, query), estimates
    except ShardSQLError as error:
        return error


def expect_shard(ref: TopologyRef, shard: str, query: Query) -> Estimate | ShardSQLError | None:
    """Return about how much one shard answers to a query, its error, or None if it cannot tell."""
    try:
        with connection_to(ref.resolve(), shard, query) as (driver, connection):
            if not isinstance(driver, PlanningDriver):
                return None
            return driver.planned(connection, query)
    except ShardSQLError as error:
        return error


def read_gathered(
    topology: Topology,
    at: str,
    query: Query,
    gather: Gather,
    resolve: Callable[[Columns], Columns],
    on_batch: OnBatch,
) -> None:
    """Gather at one shard what a query needs, and run it there.

    Parameters
    ----------
    topology : Topology
        The topology.
    at : str
        Name of the shard.
    query : Query
        The query.
    gather : Gather
        What is gathered.
    resolve, on_batch : callable
        As :meth:`Driver.read` takes them.

    Raises
    ------
    MergeRefusedError
        It cannot be answered so, or there is more than may be gathered.
    ShardSQLError
        A shard's own, with its name.
    """
    refuse_if_cancelled(query.owner, at)
    pool = pool_of(topology, at)
    driver = can_gather(pool.driver)
    gathered = 0
    extracts: Sequence[Extract] = ()

    def count(nbytes: int) -> None:
        nonlocal gathered
        refuse_if_cancelled(query.owner, at)
        gathered += nbytes
        if gathered > gather.max_bytes:
            raise too_much("more", gather.max_bytes, [extract.table for extract in extracts])

    others = [shard for shard in gather.shards if shard != at]
    with naming(at, pool, query), _session(pool, at, query, gather) as session:
        if gather.split is not None:
            gathering = driver.merging(session, query, gather.split, at)
        else:
            gathering = driver.gathering(session, query, gather.sharded)
        try:
            extracts = gathering.survey().extracts
            senders = None
            if isinstance(gathering, Sending):
                senders = sent_by_all(topology, others, query, gathering)
            tell = functools.partial(_tell, query.query_id, time.monotonic())
            gathering.prepare()
            own = gathering.add_own if at in gather.shards else None
            if senders is not None:
                _receive_all(gathering, senders, own, at, count, tell)
            else:
                if own is not None:
                    own()
                for shard in others:
                    with _from_target(), connection_to(topology, shard, query) as (_, source):
                        gathering.take(source, count)
            gathering.read(resolve, on_batch)
        finally:
            gathering.abandon()


@contextmanager
def _session(pool: Pool, at: str, query: Query, gather: Gather) -> Iterator[Any]:
    """Lend a connection that may wait for others; one on which views were made is closed."""
    if gather.split is not None:
        with pool.beside(query.owner, at) as session:
            yield session
        return
    with pool.apart(query.owner, at) as session:
        try:
            yield session
        finally:
            pool.driver.close(session)


def _receive_all(
    gathering: Any,
    senders: Generator[Any],
    own: Callable[[], int] | None,
    at: str,
    count: Callable[[int], None],
    tell: Callable[[str, int, int], None],
) -> None:
    """Take what all shards send, which they begin to before this one computes its own part."""
    with closing(senders):
        next(senders)  # all have begun
        if own is not None:
            tell(at, own(), 0)
        for sender in senders:
            rows, sizes = 0, [0]

            def add(nbytes: int, sizes: list[int] = sizes) -> None:
                sizes.append(nbytes)
                count(nbytes)

            for extract in sender.extracts:
                rows += sender.deliver(extract, gathering.receive, add)
            tell(sender.shard, rows, sum(sizes))


def _tell(query_id: str, started: float, shard: str, rows: int, nbytes: int) -> None:
    """Tell what a shard has sent, and that it took from `started` until now."""
    seconds = time.monotonic() - started
    emit(ShardEvent(query_id, shard, "finished", rows, nbytes, seconds, part="partial"))


@contextmanager
def _from_target() -> Iterator[None]:
    """Let go on what the database that gathers has raised."""
    failure = None
    try:
        yield
    except TargetFailedError as failed:
        failure = failed.error
    if failure is not None:
        raise failure


def too_much(what: str, max_bytes: int, tables: Sequence[str]) -> MergeRefusedError:
    """Return the error that says so."""
    return MergeRefusedError(
        "max-gather-bytes",
        f"{what} of {', '.join(tables)} would have to be gathered, and max_gather_bytes is "
        f"{max_bytes:,}: select fewer rows or columns, or raise it",
    )
