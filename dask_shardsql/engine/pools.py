"""One lazy connection pool per process and server, whichever topologies and shards name it.

A pool is keyed by process id: after a fork the child forgets its parent's pools without closing
their connections, which are still the parent's. Pools are never pickled. A thread closes what has
been idle for too long.
"""

from __future__ import annotations

import atexit
import itertools
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from dask_shardsql.config import Settings
from dask_shardsql.engine.credentials import resolve_password
from dask_shardsql.engine.drivers.base import Driver, driver_named
from dask_shardsql.errors import ConnectionFailedError, PoolTimeoutError, ShardSQLError
from dask_shardsql.topology import Server, Topology

__all__ = ["Lease", "Pool", "active_pools", "close_all", "pool_of"]

_pools: dict[tuple[int, Server, str], Pool] = {}
_forgotten: list[Any] = []
_lock = threading.Lock()
_reaper_of: int | None = None
_orders = itertools.count()


class Pool:
    """Connections of this process to one server, opened when they are needed.

    Parameters
    ----------
    driver : Driver
        Opens, checks and closes them.
    server : Server
        Whom to connect to.
    settings : Settings
        How many at most, how long to wait, how long an idle one is kept.
    """

    def __init__(self, driver: Driver, server: Server, settings: Settings) -> None:
        self.driver = driver
        self.server = server
        self.settings = settings
        self.order = next(_orders)  # in which whoever needs several asks for connections
        self._changed = threading.Condition()
        self._idle: list[tuple[float, Any]] = []
        self._busy: dict[int, tuple[Any, str]] = {}
        self._apart: dict[int, tuple[Any, str]] = {}
        self._opening = 0
        self._numbers = itertools.count()

    @contextmanager
    def connection(self, query_id: str, shard: str) -> Iterator[Any]:
        """Lend a connection for the length of a block; `shard` is whom errors name.

        Raises
        ------
        PoolTimeoutError
            None became free in time.
        ConnectionFailedError
            A new one could not be opened.
        """
        lease = self.reserve(query_id, shard)
        try:
            yield lease.open()
        finally:
            lease.end()

    def reserve(self, query_id: str, shard: str) -> Lease:
        """Wait for a connection to be free, or for room to open one; `shard` is whom errors name.

        Raises
        ------
        PoolTimeoutError
            There was none in time.
        """
        lease = Lease(self, next(self._numbers), query_id, shard)
        try:
            self._reserve(lease, query_id, shard)
            return lease
        except BaseException:  # Ctrl-C, when it was reserved
            lease.end()
            raise

    @contextmanager
    def apart(self, query_id: str, shard: str) -> Iterator[Any]:
        """Open a connection beside those that are counted; it is closed if the block raises.

        After the block whoever opened it closes it.

        Raises
        ------
        ConnectionFailedError
            It could not be opened.
        """
        connection = self._open(shard)
        number = next(self._numbers)
        with self._changed:
            self._apart[number] = (connection, query_id)
        try:
            yield connection
        except BaseException:
            self.driver.close(connection)
            raise
        finally:
            with self._changed:
                del self._apart[number]

    @contextmanager
    def beside(self, query_id: str, shard: str) -> Iterator[Any]:
        """Lend one beside those that are counted, whose user may so wait for counted ones."""
        stale: list[Any] = []
        with self._changed:
            connection = self._take_idle(stale)
        self._close_all(stale)
        connection = connection or self._open(shard)
        number, is_well = next(self._numbers), False
        with self._changed:
            self._apart[number] = (connection, query_id)
        try:
            yield connection
            is_well = self.driver.is_usable(connection)
        finally:
            with self._changed:
                del self._apart[number]
                if is_well:
                    self._idle.append((time.monotonic(), connection))
                    self._changed.notify()
            if not is_well:
                self.driver.close(connection)

    def cancel(self, query_id: str) -> bool:
        """Ask the server to stop what the connections lent to that query are running.

        Returns whether there are any. A connection that is given back in the meantime is not
        asked: the request must not reach the query it serves next.
        """
        found = False
        with self._changed:
            for connection, owner in (*self._busy.values(), *self._apart.values()):
                if owner == query_id:
                    found = True
                    self.driver.cancel(connection)
        return found

    def close(self, idle_for: float = 0.0) -> None:
        """Close the connections that have been idle for as many seconds."""
        oldest = time.monotonic() - idle_for
        with self._changed:
            closing = [c for since, c in self._idle if since <= oldest]
            self._idle = [(since, c) for since, c in self._idle if since > oldest]
        self._close_all(closing)

    def _close_all(self, connections: list[Any]) -> None:
        for connection in connections:
            self.driver.close(connection)

    def _reserve(self, lease: Lease, query_id: str, shard: str) -> None:
        deadline = time.monotonic() + self.settings.pool_timeout
        limit = self.settings.max_connections_per_worker
        stale: list[Any] = []
        connection = None
        with self._changed:
            while True:
                connection = self._take_idle(stale)
                if connection is not None or len(self._busy) + self._opening < limit:
                    break
                if not self._changed.wait(deadline - time.monotonic()):
                    raise PoolTimeoutError(
                        f"no connection to shard {shard!r} became free in "
                        f"{self.settings.pool_timeout:g} s: all {limit} of this process are in "
                        "use. Raise shardsql.max-connections-per-worker or shardsql.pool-timeout "
                        "in dask.config, or run fewer tasks at a time",
                        shard=shard,
                        server=self.server.address,
                    )
            # nothing can interrupt these lines, as they call nothing
            lease.connection, lease.is_over = connection, False
            if connection is not None:
                self._busy[lease.number] = (connection, query_id)
            else:
                self._opening += 1
        self._close_all(stale)

    def _open_reserved(self, number: int, query_id: str, shard: str) -> Any:
        connection = None
        try:
            connection = self._open(shard)
        finally:
            with self._changed:
                self._opening -= 1
                if connection is not None:
                    self._busy[number] = (connection, query_id)
                self._changed.notify()
        return connection

    def _take_idle(self, stale: list[Any]) -> Any:
        oldest = time.monotonic() - self.settings.pool_idle
        while self._idle:
            since, connection = self._idle.pop()
            if since >= oldest and self.driver.is_usable(connection):
                return connection
            stale.append(connection)
        return None

    def _drop(self, number: int) -> None:
        """Close a connection that was opened, and did not reach whoever opened it."""
        with self._changed:
            connection, _ = self._busy.pop(number, (None, ""))
            self._changed.notify()
        if connection is not None:
            self.driver.close(connection)

    def _give_back(self, number: int, connection: Any) -> None:
        usable = self.driver.is_usable(connection)
        now = time.monotonic()
        with self._changed:
            if self._busy.pop(number, None) is None:
                return  # Ctrl-C came when it was given back
            if usable:
                self._idle.append((now, connection))
            self._changed.notify()
        if not usable:
            self.driver.close(connection)

    def _open(self, shard: str) -> Any:
        password = resolve_password(self.server, shard)
        failure: ShardSQLError | None = None
        try:
            return self.driver.connect(self.server, password, self.settings)
        except Exception as error:  # noqa: BLE001 - told apart by the driver just below
            translated = self.driver.translate(error)
            if translated is None and isinstance(error, ShardSQLError):
                translated = error
            reason = str(translated or f"{type(error).__name__}: {error}")
            sqlstate = getattr(translated, "sqlstate", None)
            failure = ConnectionFailedError(
                f"cannot connect to shard {shard!r} ({self.server.address}): "
                f"{_without(reason, password)}",
                shard,
                self.server.address,
                sqlstate,
            )
        del password  # nor a local of a frame in its traceback
        raise failure  # outside of the handler: no chained exception repeats a login


class Lease:
    """A connection that a pool lends, or the right to open one.

    Apart from :meth:`Pool.reserve`, so that connections to many servers can be reserved one after
    the other, in an order that all keep to, and opened side by side.

    Parameters
    ----------
    pool : Pool
        Whose it is.
    number : int
        Its number there.
    query_id, shard : str
        For whom.

    Attributes
    ----------
    connection : object or None
        None where one is to be opened.
    is_over : bool
        Whether the pool counts it no more, or not yet.
    """

    def __init__(self, pool: Pool, number: int, query_id: str, shard: str) -> None:
        self._pool, self.number = pool, number
        self._query_id, self._shard = query_id, shard
        self.connection: Any = None
        self.is_over, self._is_opening = True, False

    def open(self) -> Any:
        """Return the connection.

        Raises
        ------
        ConnectionFailedError
            It could not be opened, or the lease was ended in the meantime; it is over.
        """
        pool = self._pool
        with pool._changed:
            if self.connection is not None and not self.is_over:
                return self.connection
            self._is_opening = not self.is_over
        if self._is_opening:
            try:
                connection = pool._open_reserved(self.number, self._query_id, self._shard)
            except BaseException:
                self.is_over = True
                pool._drop(self.number)
                raise
            with pool._changed:
                self._is_opening = False
                if not self.is_over:
                    self.connection = connection
                    return connection
            pool._give_back(self.number, connection)
        raise ConnectionFailedError(
            f"the connection to shard {self._shard!r} is not wanted any more",
            self._shard,
            pool.server.address,
        )

    def end(self) -> None:
        """Give the connection back; safe to call twice, and from another thread than opens it."""
        with self._pool._changed:
            if self.is_over:
                return
            if self.connection is None:
                self.is_over = True
                if not self._is_opening:  # else open() gives it back
                    self._pool._opening -= 1
                    self._pool._changed.notify()
                return
        self._pool._give_back(self.number, self.connection)
        self.is_over = True


def pool_of(topology: Topology, shard: str) -> Pool:
    """Return this process's pool for the primary server of a shard.

    Raises
    ------
    TopologyError
        There is no such shard.
    ConfigurationError
        Its driver cannot be loaded here.
    """
    server = topology.server_of(shard)
    # a callable may give each shard another password
    by_shard = server.password is not None and server.password.kind == "password_callable"
    key = (os.getpid(), server, shard if by_shard else "")
    settings = Settings.current()
    with _lock:
        pool = _pools.get(key)
    if pool is None:
        made = Pool(driver_named(server.driver), server, settings)
        with _lock:
            pool = _pools.setdefault(key, made)
        _start_reaper()
    pool.settings = settings
    return pool


def active_pools() -> list[Pool]:
    """Return the pools of this process."""
    with _lock:
        return list(_pools.values())


def close_all() -> None:
    """Close the idle connections of every pool of this process."""
    for pool in active_pools():
        pool.close()


def _start_reaper() -> None:
    global _reaper_of
    with _lock:
        if _reaper_of == os.getpid():
            return
        _reaper_of = os.getpid()
    threading.Thread(target=_reap, name="dask_shardsql-idle", daemon=True).start()


def _reap() -> None:
    """Close idle connections as long as the process lives."""
    while True:
        pools = active_pools()
        soonest = min((pool.settings.pool_idle for pool in pools), default=5.0)
        time.sleep(min(max(soonest / 2, 0.1), 5.0))
        for pool in active_pools():
            pool.close(pool.settings.pool_idle)


def _without(text: str, password: str | None) -> str:
    return " ".join((text.replace(password, "***") if password else text).split())


def _forget() -> None:
    global _lock
    _lock = threading.Lock()
    _forgotten.append(dict(_pools))  # keeps them from being closed under the parent
    _pools.clear()


atexit.register(close_all)
os.register_at_fork(after_in_child=_forget)
