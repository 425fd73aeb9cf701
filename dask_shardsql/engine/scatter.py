"""One query on many shards from one thread: it sends to all before it reads from any.

Small answers are read by that thread as they come; a shard that has more than a few rows gets a
thread of its own from then on. So a point query pays for no thread and no task, and large answers
are decoded side by side.
"""

from __future__ import annotations

import functools
import queue
import select
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import pyarrow as pa

from dask_shardsql.engine.cancel import cancel_query, is_cancelled, refuse_if_cancelled
from dask_shardsql.engine.drivers.base import Columns, Query, Stage, StagedDriver
from dask_shardsql.engine.fetch import Answer, Reading
from dask_shardsql.engine.lending import naming
from dask_shardsql.engine.pools import Lease, pool_of
from dask_shardsql.errors import ShardSQLError
from dask_shardsql.progress import current_worker
from dask_shardsql.topology import Topology

__all__ = ["scatter"]

_MOST_THREADS = 32
_POLL_MILLISECONDS = 20
_LOOK_MILLISECONDS = 1000  # after which to see whether anybody still waits

Agree = Callable[[Mapping[str, Columns | ShardSQLError]], Answer]
OnShardBatch = Callable[[str, pa.RecordBatch], None]


def scatter(
    topology: Topology,
    shards: Sequence[str],
    query: Query,
    agree: Agree,
    on_batch: OnShardBatch,
    *,
    at_once: bool = False,
) -> bool:
    """Run a query on all the shards.

    Parameters
    ----------
    topology : Topology
        Where it runs.
    shards : sequence of str
        Names of the shards.
    query : Query
        The query.
    agree : callable
        Makes the answer that all must give of what each shard described, or raises.
    on_batch : callable
        Called with a shard's name and some of its rows, by several threads but for one shard in
        its order.
    at_once : bool
        Whether a driver that has seen the text before may ask for the rows together with their
        description.

    Returns
    -------
    bool
        False when nothing was read: a driver or a connection cannot be used in this way, or two
        shards would use connections of one pool.

    Raises
    ------
    ShardSQLError
        From the first shard that fails; the query is then cancelled on the others.
    AskAgain
        Where it did not do to ask `at_once`; `on_batch` was not called.
    """
    parts = [_Part(topology, shard, query) for shard in shards]
    if not _can_be_asked_together(parts):
        return False
    try:
        _connect(parts)
        if not _send(parts, at_once=at_once):
            for part in parts:
                part.describe()  # so that it can be rolled back, and its connection kept
            return False
        answer = agree({part.shard: part.describe() for part in parts})
        on_worker = current_worker() is not None
        for part in parts:
            part.request(answer, on_batch, on_worker=on_worker)
        _read(parts, query.owner, at_once=at_once)
    except BaseException:
        if any(part.is_waiting for part in parts):
            cancel_query(query.owner)
        raise
    finally:
        _end(parts)
    return True


def _can_be_asked_together(parts: Sequence[_Part]) -> bool:
    # who waits for a second connection of one pool, while others do the same, may wait for ever
    if len({id(part.pool) for part in parts}) < len(parts):
        return False
    # quicker than to ask whether it is a StagedDriver
    return all(hasattr(part.pool.driver, "stage") for part in parts)


def _connect(parts: Sequence[_Part]) -> None:
    """Give each part a connection, or the error that it is not to be had."""
    # one order for all, so that no two threads wait for what the other has
    for part in sorted(parts, key=lambda part: part.pool.order):
        part.reserve()
    new = [part for part in parts if part.lease is not None and part.lease.connection is None]
    if len(new) == 1:
        new[0].connect()
    elif new:
        threads = ThreadPoolExecutor(min(len(new), _MOST_THREADS))
        try:
            list(threads.map(_Part.connect, new))
        finally:  # Ctrl-C does not wait for servers; what they still open is closed or given back
            threads.shutdown(wait=False, cancel_futures=True)


def _send(parts: Sequence[_Part], *, at_once: bool) -> bool:
    """Send to each part what it is asked; return False where the connection of one cannot."""
    script = None
    for part in parts:
        script = part.send(script, at_once=at_once)
    return all(part.is_sent for part in parts)


def _read(parts: Sequence[_Part], query_id: str, *, at_once: bool) -> None:
    """Read the small answers here, and those that turn out to be large in threads."""
    poller = select.poll()
    waiting = {part.stage.fileno(): part for part in parts}
    for descriptor in waiting:
        poller.register(descriptor, select.POLLIN)
    large: list[_Part] = []
    ended: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
    running = 0
    # rows may have come with the description
    found = list(waiting) if at_once else []
    while waiting or large or running:
        while large and running < _MOST_THREADS:
            large.pop(0).start(ended)
            running += 1
        if waiting:
            if not found:
                wait = _POLL_MILLISECONDS if running else _LOOK_MILLISECONDS
                found = [descriptor for descriptor, _ in poller.poll(wait)]
            if not found and not running and is_cancelled(query_id):
                refuse_if_cancelled(query_id, next(iter(waiting.values())).shard)
            for descriptor in found:
                part = waiting[descriptor]
                done = part.advance()
                if done or part.stage.is_large:
                    poller.unregister(descriptor)
                    del waiting[descriptor]
                    if not done:
                        large.append(part)
            found = []
        # wait only where there is nothing to read here and no thread to start
        while running and not (ended.empty() and (waiting or (large and running < _MOST_THREADS))):
            failure = ended.get()
            running -= 1
            if failure is not None:
                raise failure


def _end(parts: Sequence[_Part]) -> None:
    """End all parts but those that their threads end, also when Ctrl-C comes now."""
    interrupted: BaseException | None = None
    for part in (part for part in parts for _ in range(2)):
        try:
            if not part.has_thread:
                part.end()
        except BaseException as error:  # noqa: BLE001 - raised again
            interrupted = error
    if interrupted is not None:
        raise interrupted


class _Part:
    """One shard's part in a query: its connection, and how far it has come."""

    def __init__(self, topology: Topology, shard: str, query: Query) -> None:
        self.shard, self.pool = shard, pool_of(topology, shard)
        self.lease: Lease | None = None
        self.is_waiting = self.has_thread = False
        self._query = query
        self._failure: ShardSQLError | None = None
        self._stage: Stage | None = None
        self._columns: Columns = ()
        self._reading: Reading | None = None

    def reserve(self) -> None:
        """Wait for the right to a connection."""
        refuse_if_cancelled(self._query.owner, self.shard)
        self.lease = self.pool.reserve(self._query.owner, self.shard)

    def connect(self) -> None:
        """Open the connection, if that is still to be done."""
        if (lease := self.lease) is not None:
            with self._keeping_failure():
                lease.open()

    def send(self, script: Any, *, at_once: bool) -> Any:
        """Send what describes the query; return that, for the parts that come after this one."""
        if self._failure is None and self.lease is not None:
            driver, connection = cast(StagedDriver, self.pool.driver), self.lease.connection
            with self._keeping_failure():
                # the connection is lent: from here on, cancelling reaches it
                refuse_if_cancelled(self._query.owner, self.shard)
                script = script or driver.script(connection, self._query)
                self._stage = driver.stage(connection, self._query, script, at_once=at_once)
        self.is_waiting = self._stage is not None
        return script

    @property
    def is_sent(self) -> bool:
        """Whether that was possible, or failed: not so where the connection cannot do it."""
        return self.is_waiting or self._failure is not None

    def describe(self) -> Columns | ShardSQLError:
        """Return the columns, or what has gone wrong so far."""
        if self._stage is not None:
            with self._keeping_failure():
                self._columns = self._stage.describe()
            self.is_waiting = False
        return self._columns if self._failure is None else self._failure

    def request(self, answer: Answer, on_batch: OnShardBatch, *, on_worker: bool) -> None:
        """Ask for the rows."""
        take = functools.partial(on_batch, self.shard)
        self._reading = Reading(self.shard, answer, take, on_worker=on_worker)
        if self._failure is not None:
            raise self._failure
        with naming(self.shard, self.pool, self._query):
            columns = self._reading.resolve(self._columns)
            self.is_waiting = True
            self.stage.request(columns, self._reading.take)

    @property
    def stage(self) -> Stage:
        """What was sent."""
        if self._stage is None:
            raise RuntimeError("nothing was sent")
        return self._stage

    def advance(self, *, whole: bool = False) -> bool:
        """Read what has come, or all of it; return whether that was all."""
        with naming(self.shard, self.pool, self._query):
            done = self.stage.advance(whole=whole)
        if done:
            self._end("finished")
        return done

    def start(self, ended: queue.SimpleQueue[BaseException | None]) -> None:
        """Read the rest in a thread, which tells when it ends and how."""

        def run() -> None:
            failure: BaseException | None = None
            try:
                self.advance(whole=True)
            except BaseException as error:  # noqa: BLE001 - raised again by who waits for it
                failure = error
            finally:
                self.end()
                ended.put(failure)

        self.has_thread = True
        # a daemon, as a server that hangs must not keep the process from ending
        threading.Thread(target=run, name=f"dask_shardsql-{self.shard}", daemon=True).start()

    def end(self) -> None:
        """Leave the connection clean or closed, and give it back; safe to call twice."""
        self._end("failed")

    def _end(self, state: str) -> None:
        try:
            if self._stage is not None:
                self._stage.abandon()
        finally:
            if self.lease is not None:
                self.lease.end()
            self.is_waiting = False
        reading, self._reading = self._reading, None
        if reading is not None:
            reading.finish(state)

    def _keeping_failure(self) -> naming:
        return naming(self.shard, self.pool, self._query, self._keep)

    def _keep(self, error: ShardSQLError) -> None:
        self._failure = error
