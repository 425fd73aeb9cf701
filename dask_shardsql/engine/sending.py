"""One shard's rows on their way to the database that gathers: sent by a thread of its own.

So all shards compute at once, while the one that gathers takes their rows one after the other.
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from typing import Any

from dask_shardsql.engine.cancel import refuse_if_cancelled
from dask_shardsql.engine.drivers.base import Query
from dask_shardsql.engine.drivers.gathering import Extract, Sending
from dask_shardsql.engine.lending import naming
from dask_shardsql.engine.pools import Pool, pool_of
from dask_shardsql.errors import ConnectionLostError
from dask_shardsql.topology import Topology

__all__ = ["Sender", "sent_by_all"]

_AT_ONCE = 16
_PIPE_BYTES = 1 << 16


def sent_by_all(
    topology: Topology, shards: Sequence[str], query: Query, sending: Sending
) -> Generator[Sender | None]:
    """Let every shard begin to send, a few at a time; yield nothing, then each at its turn.

    Connections are taken, and given back, in the one order that all keep to who need several: so
    nobody waits for who waits for them. Of shards on one server one sends at a time.
    """
    asked = {shard: [one for one in sending.extracts if one.is_on(shard)] for shard in shards}
    pools = [(shard, pool_of(topology, shard)) for shard in shards if asked[shard]]
    left = sorted(pools, key=lambda one: one[1].order)
    begun: list[Sender] = []

    def begin() -> None:
        while left and len(begun) < _AT_ONCE:
            shard, pool = left[0]
            if any(pool is sender.pool for sender in begun):
                break
            begun.append(Sender(pool, shard, query, sending, asked[shard]))
            del left[0]

    try:
        begin()
        yield None
        while begun:
            yield begun[0]
            begun.pop(0).close()
            begin()
    finally:
        for sender in begun:
            sender.close()


class Sender:
    """Sends what one shard has, each extract through a pipe.

    Parameters
    ----------
    pool : Pool
        Of connections to the shard.
    shard : str
        Name of the shard.
    query : Query
        The query.
    sending : Sending
        How it is sent.
    extracts : sequence of Extract
        What is asked of it.

    Raises
    ------
    PoolTimeoutError
        No connection became free in time.
    """

    def __init__(
        self,
        pool: Pool,
        shard: str,
        query: Query,
        sending: Sending,
        extracts: Sequence[Extract],
    ) -> None:
        self.pool, self.shard, self._query = pool, shard, query
        self._sending, self.extracts = sending, extracts
        self._ends: queue.SimpleQueue[Incoming | None] = queue.SimpleQueue()
        self._failure: BaseException | None = None
        self._source: Any = None
        self._source_lock = threading.Lock()  # nobody else gets the connection meanwhile
        self._is_wanted = True
        self._left = len(extracts)
        self._lease = pool.reserve(query.owner, shard)
        self._thread = threading.Thread(target=self._run, name="dask_shardsql-send", daemon=True)
        self._thread.start()

    def deliver(
        self,
        extract: Extract,
        receive: Callable[[Extract, Any], int],
        count: Callable[[int], None],
    ) -> int:
        """Let the next extract be received; `count` hears of its bytes, and may raise.

        Returns how many rows there were. What the shard has raised is raised here, with its name;
        all else is the receiver's.
        """
        incoming = self._ends.get()
        if incoming is None:
            raise self._why()
        incoming.count = count
        try:
            rows = receive(extract, incoming)
        except BaseException:
            if incoming.failure is not None:
                raise incoming.failure from None
            raise
        finally:
            incoming.close()
        self._left -= 1
        if not incoming.is_whole:  # the receiver has read less than all, and is content
            raise self._why()
        return rows

    def close(self) -> None:
        """End it, whatever it is doing."""
        self._is_wanted = False
        while not self._ends.empty():
            if (end := self._ends.get()) is not None:
                end.close()
        with self._source_lock:
            if self._left and self._source is not None:
                self._sending.cancel(self._source)
        self._thread.join(1.0)

    def _why(self) -> BaseException:
        """Return what has ended it too early."""
        self._thread.join()
        return self._failure or ConnectionLostError("the shard has sent less than it had")

    def _run(self) -> None:
        try:
            with naming(self.shard, self.pool, self._query):
                source = self._source = self._lease.open()
                refuse_if_cancelled(self._query.owner, self.shard)
                self._send(source)
        except BaseException as error:  # noqa: BLE001 - raised by who receives
            self._failure = error
        finally:
            with self._source_lock:
                self._source = None
            self._lease.end()
            self._ends.put(None)

    def _send(self, source: Any) -> None:
        try:
            self._sending.begin(source, self.extracts)
            for extract in self.extracts:
                if not self._is_wanted:
                    break
                read_end, write_end = os.pipe()
                incoming = Incoming(read_end, self._why)
                with os.fdopen(write_end, "wb", _PIPE_BYTES) as file:
                    self._ends.put(incoming)
                    if not self._is_wanted:  # nobody will read it
                        incoming.close()
                    self._sending.send(source, extract, file)
                    file.flush()
                    incoming.is_whole = True  # known before the reader meets the end
        finally:
            self._sending.end(source)


class Incoming:
    """What is read of one extract; what goes wrong meanwhile is kept in `failure`."""

    def __init__(self, end: int, why: Callable[[], BaseException]) -> None:
        self._end, self._why = os.fdopen(end, "rb", 0), why
        self.failure: BaseException | None = None
        self.is_whole = False
        self.count: Callable[[int], None] = lambda nbytes: None

    def read(self, size: int = _PIPE_BYTES) -> bytes:
        """Return some bytes; none at the end of what was sent without an error."""
        try:
            data = self._end.read(size)
            self.count(len(data))
            if not data and not self.is_whole:
                raise self._why()
        except BaseException as error:
            self.failure = error
            raise
        return data

    def readline(self) -> bytes:
        """Raise: psycopg2 asks whether it is there, and never calls it."""
        raise NotImplementedError

    def close(self) -> None:
        """Close it; whoever sends then meets an error."""
        with suppress(OSError):
            self._end.close()
