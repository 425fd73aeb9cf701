"""Stop a query's backends when nobody waits for its answer any more."""

from __future__ import annotations

import collections

from dask_shardsql.engine.pools import active_pools
from dask_shardsql.errors import QueryError

__all__ = ["cancel_query", "refuse_if_cancelled"]

_cancelled: collections.deque[str] = collections.deque(maxlen=1000)


def cancel_query(query_id: str) -> None:
    """Cancel what `query_id` runs through this process, and keep its other tasks from starting.

    Parameters
    ----------
    query_id : str
        The id that the query's sessions carry in their ``application_name``.
    """
    _cancelled.append(query_id)
    for pool in active_pools():
        pool.cancel(query_id)


def refuse_if_cancelled(query_id: str, shard: str) -> None:
    """Raise when that query was cancelled in this process.

    Raises
    ------
    QueryError
        With SQLSTATE 57014, as the server would say.
    """
    if query_id in _cancelled:
        raise QueryError("the query was cancelled before it started", shard, sqlstate="57014")
