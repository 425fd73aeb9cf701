"""Stop a query's backends when nobody waits for its answer any more."""

from __future__ import annotations

import collections
import threading
import time

from dask_shardsql.engine.pools import active_pools
from dask_shardsql.errors import QueryError

__all__ = ["cancel_query", "is_cancelled", "refuse_if_cancelled"]

_SECONDS = 5.0
_PAUSE = 0.05

_cancelled: collections.deque[str] = collections.deque(maxlen=1000)


def cancel_query(query_id: str) -> None:
    """Cancel what `query_id` runs through this process, and keep its other tasks from starting.

    Parameters
    ----------
    query_id : str
        The id that the query's sessions carry in their ``application_name``.

    Notes
    -----
    A request to cancel that reaches a server between two statements does nothing. So a thread goes
    on asking, for a few seconds at most, until this process holds no connection for the query.
    """
    _cancelled.append(query_id)
    if _ask(query_id):
        threading.Thread(target=_insist, args=(query_id,), daemon=True).start()


def _ask(query_id: str) -> bool:
    """Cancel once; return whether there was anything to cancel."""
    return sum(pool.cancel(query_id) for pool in active_pools()) > 0


def _insist(query_id: str) -> None:
    deadline = time.monotonic() + _SECONDS
    while time.monotonic() < deadline:
        time.sleep(_PAUSE)
        if not _ask(query_id):
            return


def is_cancelled(query_id: str) -> bool:
    """Return whether that query was cancelled in this process."""
    return query_id in _cancelled


def refuse_if_cancelled(query_id: str, shard: str) -> None:
    """Raise when that query was cancelled in this process.

    Raises
    ------
    QueryError
        With SQLSTATE 57014, as the server would say.
    """
    if is_cancelled(query_id):
        raise QueryError("the query was cancelled before it started", shard, sqlstate="57014")
