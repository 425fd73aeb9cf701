"""``stream``: the rows of all shards as they come, in bounded memory."""

from __future__ import annotations

import itertools
import queue
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, NamedTuple

import pyarrow as pa

from dask_shardsql.config import Settings, size_in_bytes
from dask_shardsql.engine.drivers.base import Columns
from dask_shardsql.engine.fetch import Answer, read_batches, read_shard_shared
from dask_shardsql.engine.registry import TopologyRef
from dask_shardsql.engine.scatter import scatter
from dask_shardsql.engine.shared_memory import Offer, offered_memory, received
from dask_shardsql.errors import ShardSQLError
from dask_shardsql.merge import check_merge, prepare
from dask_shardsql.query import AskedQuery, PreparedQuery, ask, warn_of_union
from dask_shardsql.run import cancel_everywhere, client_of, run_tasks, schedule_of, share_topology
from dask_shardsql.split import SplitOptions
from dask_shardsql.topology import Topology

__all__ = ["stream"]

_POLL_SECONDS = 0.1
_MOST_WAITING = 4  # batches that were read and not taken

Put = Callable[[pa.RecordBatch], None]


def stream(
    sql: str,
    topology: Topology | None = None,
    params: Sequence[Any] | Mapping[str, Any] | None = None,
    *,
    types: Mapping[str, Any] | None = None,
    shard_column: str | None = None,
    shards: Sequence[str] | None = None,
    unrepresentable: str | None = None,
    check_schema: bool | None = None,
    batch_size: int | str = "16 MiB",
    merge: str = "union",
    max_gather_bytes: str | int | None = None,
    scheduler: Any = None,
) -> pa.RecordBatchReader:
    """Run one query on every shard and return the rows as they come, from whichever shard.

    Parameters
    ----------
    sql : str
        One query, as for :func:`collect`.
    topology : Topology, optional
        The shards; by default the one that ``shardsql.topology`` in ``dask.config`` names.
    params : sequence or mapping, optional
        The parameters' values. Without it a ``%`` in the text stands for itself.
    types : mapping of str to pyarrow.DataType or str, optional
        Other Arrow types than the default ones, by column name.
    shard_column : str, optional
        Name of an extra last column that holds the name of the shard each row came from.
    shards : sequence of str, optional
        Names of the shards to read; all by default.
    unrepresentable : {"raise", "null"}, optional
        What becomes of a value its Arrow type cannot hold (``shardsql.unrepresentable``).
    check_schema : bool, optional
        Whether every shard describes the query before any is read (``shardsql.check-schema``),
        or only the first.
    batch_size : int or str, default "16 MiB"
        How large a record batch may become, in bytes; a single row may exceed it.
    merge : {"union", "global"}, default "union"
        As in :func:`collect`. With ``"global"`` rows have the order that the query gives them.
    max_gather_bytes : str or int, optional
        As in :func:`collect`.
    scheduler : str, callable or Client, optional
        As in ``dask.compute``.

    Returns
    -------
    pyarrow.RecordBatchReader
        Iterate over it, or give it to whatever takes one. Rows of one shard are in the order that
        the shard gave them; batches of different shards are mixed as they come. It can be read
        once. An error of a shard is raised where the next batch would be, after which there are no
        more. Dropping the reader (``del``; pyarrow's ``close`` does not tell us) stops the query
        on all shards.

    Raises
    ------
    ShardSQLError
        As :func:`collect`, at once for whatever is wrong before rows are read.

    Notes
    -----
    In this process there is one batch a shard in memory, which is being filled, and at most four
    more: servers wait while nobody takes them. On a Dask cluster a task reads the whole answer of
    one shard, and not more shards are read at a time than the cluster has threads.

    Examples
    --------
    >>> for batch in stream("SELECT * FROM lineitem", topology):  # doctest: +SKIP
    ...     print(batch.num_rows)
    """
    check_merge(merge, SplitOptions(), max_gather_bytes, shards=shards, shard_column=shard_column)
    settings = Settings.current(
        unrepresentable=unrepresentable,
        check_schema=check_schema,
        max_gather_bytes=max_gather_bytes,
    )
    asked = ask(
        sql,
        topology,
        params,
        types=types,
        shard_column=shard_column,
        shards=shards,
        settings=settings,
    )
    if merge == "union":
        warn_of_union(asked)
    query = replace(asked.query, batch_bytes=size_in_bytes("batch_size", batch_size))
    asked = replace(asked, query=query)
    feed = _Feed(_Wanted(asked, merge, settings.max_gather_bytes), scheduler)
    return pa.RecordBatchReader.from_batches(feed.schema, feed)


class _Wanted(NamedTuple):
    """What is to be read."""

    asked: AskedQuery
    merge: str
    max_gather_bytes: int

    def prepare(self, scheduler: Any) -> PreparedQuery:
        """Let the shards describe it."""
        return prepare(self.asked, self.merge, self.max_gather_bytes, scheduler)


class _StoppedError(Exception):
    """Nobody wants more rows."""


class _Feed:
    """An iterator over record batches that a thread puts into a queue.

    The thread does not know this object, so that it is collected, and the query stopped, when
    nobody iterates any more.
    """

    def __init__(self, wanted: _Wanted, scheduler: Any) -> None:
        asked = wanted.asked
        self._line = line = _Line(min(len(asked.shards), _MOST_WAITING))
        schedule = schedule_of(scheduler)
        client = client_of(schedule)
        work = _read_here if client is None else _read_on_cluster
        arguments = (line, work, wanted, client)
        self.stop = weakref.finalize(self, _abandon, line, schedule, asked.query.query_id)
        # a daemon, as a server that hangs must not keep the process from ending
        name = "dask_shardsql-stream"
        thread = threading.Thread(target=_work, args=arguments, name=name, daemon=True)
        try:
            thread.start()
            self.schema: pa.Schema = line.take()
        except BaseException:
            self.stop()
            raise

    def __iter__(self) -> Iterator[pa.RecordBatch]:
        return self

    def __next__(self) -> pa.RecordBatch:
        batch = self._line.take()
        if batch is None:
            raise StopIteration
        return batch


def _abandon(line: _Line, schedule: Any, query_id: str) -> None:
    """Stop reading, in this process and on workers, unless all has been read."""
    line.stop()
    if not line.is_over:
        # in a thread, as this may be called anywhere by Python's collection of garbage
        arguments = (schedule, query_id)
        threading.Thread(target=cancel_everywhere, args=arguments, daemon=True).start()


class _Line:
    """A queue of bounded length between who reads and who takes; either end may stop."""

    def __init__(self, length: int) -> None:
        self._items: queue.Queue[Any] = queue.Queue(length)
        self._stopped = threading.Event()
        self._end: BaseException | None = None
        self._is_ending = self.is_over = False

    def put(self, item: Any) -> None:
        """Add an item; wait for room, and raise when nobody wants it."""
        self._put(item, lambda: self._is_ending)

    def _put(self, item: Any, is_late: Callable[[], bool] = lambda: False) -> None:
        while not (self._stopped.is_set() or is_late()):
            with suppress(queue.Full):
                self._items.put(item, timeout=_POLL_SECONDS)
                return
        raise _StoppedError

    def take(self) -> Any:
        """Return the next item, or None when there are no more, or raise what ended it."""
        if not self.is_over:
            item = self._items.get()
            if not isinstance(item, BaseException) and item is not None:
                return item
            self.is_over, self._end = True, item
        if self._end is not None:
            raise self._end
        return None

    def stop(self) -> None:
        """Let whoever reads stop."""
        self._stopped.set()
        with suppress(queue.Empty):
            while True:
                self._items.get_nowait()

    def end(self, item: BaseException | None) -> None:
        """Let this be the last item; nobody else can add any more."""
        with suppress(_StoppedError):
            self._is_ending = True
            self._put(item)


def _work(
    line: _Line, work: Callable[[_Line, _Wanted, Any], None], wanted: _Wanted, client: Any
) -> None:
    """Read, and put what comes into the line: the schema, the batches, and None or an error."""
    end: BaseException | None = None
    try:
        work(line, wanted, client)
    except _StoppedError:
        return
    except BaseException as error:  # noqa: BLE001 - raised again by who takes
        end = error
    line.end(end)


def _read_here(line: _Line, wanted: _Wanted, client: None) -> None:
    """Read in this process."""
    asked = wanted.asked

    def agree(outcomes: Mapping[str, Columns | ShardSQLError]) -> Answer:
        answer = asked.agree(outcomes).answer
        line.put(answer.schema)
        return answer

    def put(shard: str, batch: pa.RecordBatch) -> None:
        line.put(batch)

    def read(ref: TopologyRef, shard: str, answer: Answer) -> None:
        read_batches(ref, shard, answer, line.put)

    topology = asked.topology
    if wanted.merge == "union" and scatter(topology, asked.shards, asked.query, agree, put):
        return
    prepared = wanted.prepare("threads")
    line.put(prepared.answer.schema)
    run_tasks(read, topology, prepared.shards, prepared.answer, "stream-sharded-sql", "threads")


def _read_on_cluster(line: _Line, wanted: _Wanted, client: Any) -> None:
    """Read on the workers of a cluster, not more shards at a time than it has threads."""
    prepared = wanted.prepare(client)
    line.put(prepared.answer.schema)
    ref = share_topology(prepared.topology, client.get)
    query_id = prepared.answer.query.query_id
    todo = list(prepared.shards)
    running: dict[Any, str] = {}
    numbers = itertools.count()
    done: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def submit(shard: str, offer: Offer | None) -> None:
        key = f"stream-sharded-sql-{query_id}-{shard}-{next(numbers)}"
        future = client.submit(
            read_shard_shared, ref, shard, prepared.answer, offer, key=key, pure=False
        )
        running[future] = shard
        future.add_done_callback(done.put)

    try:
        with offered_memory() as offer:
            while todo or running:
                while todo and len(running) < max(1, sum(client.nthreads().values())):
                    submit(todo.pop(0), offer)
                future = done.get()
                shard = running.pop(future)
                table = received(future.result())
                future.release()
                if table is None:
                    submit(shard, None)
                    continue
                for batch in table.to_batches():
                    line.put(batch)
    except BaseException:
        client.cancel(list(running), force=True)
        cancel_everywhere(client.get, query_id)
        raise
