"""One snapshot for all slices of a shard: who holds it, how long, and how a slice is read in it.

The snapshot is exported by a session of its own, which must stay in its transaction until the last
slice has imported it. That session belongs to the :class:`Snapshot` that its task returns, so that
it ends when Dask lets go of the task's result: after the last slice, an error, a cancellation, or
when the client is gone. Copies that travel to other workers have the name alone.

On a cluster Dask may drop the result that has the session and keep a copy of it (memory that is
spilled, replicas that are reduced), so there the scheduler is asked whether it is needed before
the session ends. And Dask may run the task again when its worker is gone: the scheduler remembers
that it has run, as slices of two snapshots must not become one table.
"""

from __future__ import annotations

import os
import queue
import threading
import weakref
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from dask_shardsql.engine.pools import Pool
from dask_shardsql.errors import ConfigurationError, SnapshotLostError
from dask_shardsql.progress import current_worker

__all__ = ["HoldingSession", "Snapshot", "end_snapshots"]

_SECONDS = 1.0  # between two looks at the sessions of a cluster's workers

_sessions: set[HoldingSession] = set()
_lock = threading.RLock()
_wake: queue.SimpleQueue[None] = queue.SimpleQueue()
_keeper_of: int | None = None


class Snapshot:
    """A snapshot of one shard, for its slices.

    Parameters
    ----------
    shard : str
        The shard's name.
    name : str
        The snapshot's name on the shard's server.
    bounds : tuple of str
        Where to cut, as the driver writes it.
    session : HoldingSession, optional
        What holds the snapshot, and ends with this object, at the latest; a copy has none.
    """

    __slots__ = ("__weakref__", "_session", "bounds", "name", "shard")

    def __init__(
        self,
        shard: str,
        name: str,
        bounds: tuple[str, ...],
        session: HoldingSession | None = None,
    ) -> None:
        self.shard, self.name, self.bounds = shard, name, bounds
        self._session = session
        if session is not None:
            finalizer = weakref.finalize(self, session.let_go)
            finalizer.atexit = False  # a process that ends closes its connections

    def release(self) -> None:
        """End the session that holds the snapshot, if this is not a copy."""
        if self._session is not None:
            self._session.end()

    def let_go(self) -> None:
        """Do as if this object was gone: the traceback of an exception may keep it for long."""
        if self._session is not None:
            self._session.let_go()

    def __reduce__(self) -> Any:
        return (Snapshot, (self.shard, self.name, self.bounds))

    def __repr__(self) -> str:
        return f"<Snapshot {self.name} of {self.shard!r}>"


class HoldingSession:
    """The session that holds a snapshot in this process.

    Parameters
    ----------
    key : hashable
        The key of the task that it is for, which runs now.
    pool : Pool
        Whose driver closes the connection.
    """

    def __init__(self, key: Any, pool: Pool) -> None:
        self.key, self._pool, self._pid = key, pool, os.getpid()
        worker = _worker_of(key)
        self.worker = None if worker is None else weakref.ref(worker)
        self._client: Any = None
        self._connection: Any = None
        self.is_over = self.is_let_go = False
        with _lock:
            _sessions.add(self)
        if worker is not None:
            _start_keeper()

    @property
    def is_local(self) -> bool:
        """Whether no worker of a cluster runs the task."""
        return self.worker is None

    @property
    def is_open(self) -> bool:
        """Whether the snapshot is held by now."""
        return self._connection is not None

    def take(self, connection: Any) -> None:
        """Keep the connection, unless nobody wants it any more."""
        with _lock:
            self._connection = connection
        if self.is_over:
            self.end()

    def publish(self) -> None:
        """Tell the scheduler that slices may now be read in this snapshot.

        Raises
        ------
        SnapshotLostError
            There was another one before: some slices may have been read in that.
        """
        if self.worker is None:
            return
        from distributed import get_client

        try:
            self._client = get_client()
            is_first = self._client.run_on_scheduler(_first_run(), key=self.key)
        except Exception as error:
            raise ConfigurationError(
                f"the scheduler cannot be asked whether this snapshot is the first one: {error}. "
                "Read without partitions_per_shard and partition_size"
            ) from error
        if not is_first:
            raise SnapshotLostError(
                "the worker that held the snapshot of this shard is gone, and some slices may have "
                "been read in it: one of another time cannot take its place. Let go of what was "
                "read (its futures, persisted DataFrames), and compute it again"
            )

    def let_go(self) -> None:
        """End, as the task's result is gone, or soon, if Dask may still have a copy of it."""
        if self.worker is None:
            self.end()
        else:
            self.is_let_go = True
            _wake.put(None)

    def end(self) -> None:
        """Close the connection; safe to call twice."""
        with _lock:
            self.is_over = True
            _sessions.discard(self)
            connection, self._connection = self._connection, None
        if connection is None:
            return
        if self._pid == os.getpid():
            self._pool.driver.close(connection)
        else:  # it is the parent's
            _inherited.append(connection)

    def end_if_idle(self) -> None:
        """End when the worker is closed, or when the scheduler needs the result no more."""
        worker = self.worker() if self.worker is not None else None
        if worker is None or worker.status.name in ("closing", "closed", "failed"):
            self.end()
        elif self.is_let_go:
            try:
                needed = self._client.run_on_scheduler(_is_needed(), key=self.key)
            except Exception:  # noqa: BLE001 - whoever could need it is not there any more
                needed = False
            if not needed:
                self.end()


_inherited: list[Any] = []


def end_snapshots(state: Any) -> None:
    """End the snapshots of a computation on this process's threads that has failed.

    The traceback of an exception keeps a computation's results, and it may be kept for long.
    """
    for result in list(state.get("cache", {}).values()):
        if isinstance(result, Snapshot):
            result.release()
    running = state.get("running", ())
    with _lock:
        sessions = [session for session in _sessions if session.is_local]
    for session in sessions:
        if session.key in running:  # not done, or done and not looked at any more
            session.end()


def _worker_of(key: Any) -> Any:
    """Return the ``distributed.Worker`` that runs the task of that key here, or None."""
    worker = current_worker()
    # another key is that of a task of the user's that computes in itself
    return worker if worker is not None and worker.get_current_task() == key else None


def _first_run() -> Callable[..., bool]:
    """Return what the scheduler runs; inside a function, so that it is pickled by value."""

    def first_run(dask_scheduler: Any, key: Any) -> bool:
        task = dask_scheduler.tasks.get(key)
        if task is None:  # nobody waits for it any more
            return True
        if task.metadata is None:
            task.metadata = {}
        is_first = "dask_shardsql" not in task.metadata
        task.metadata["dask_shardsql"] = "has held a snapshot"
        return is_first

    return first_run


def _is_needed() -> Callable[..., bool]:
    def is_needed(dask_scheduler: Any, key: Any) -> bool:
        task = dask_scheduler.tasks.get(key)
        return task is not None and task.state == "memory"

    return is_needed


def _start_keeper() -> None:
    global _keeper_of
    with _lock:
        if _keeper_of != os.getpid():
            _keeper_of = os.getpid()
            threading.Thread(target=_keep, name="dask_shardsql-snapshots", daemon=True).start()
    _wake.put(None)


def _keep() -> None:
    """End the sessions of this process's workers in time, as long as the process lives."""
    while True:
        with _lock:
            sessions = [s for s in _sessions if s.worker is not None]
        with suppress(queue.Empty):
            _wake.get(timeout=_SECONDS if sessions else None)
        for session in sessions:
            session.end_if_idle()


def _after_fork() -> None:
    global _lock, _wake
    _lock, _wake = threading.RLock(), queue.SimpleQueue()
    _sessions.clear()


os.register_at_fork(after_in_child=_after_fork)
