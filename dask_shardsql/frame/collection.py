"""The DataFrame that a read gives: how ``compute()`` of all of it goes to the client.

Dask makes one DataFrame of the partitions on one worker, and sends that. Here a cluster's workers
send each shard's Arrow table by itself, or share its memory with a client on their host, and the
client makes the DataFrame: no worker ever holds more than its own shards.
"""

from __future__ import annotations

from typing import Any

import dask.dataframe as dd
import pandas as pd

from dask_shardsql.errors import ConfigurationError
from dask_shardsql.frame.expr import ReadShards
from dask_shardsql.frame.whole import concatenate
from dask_shardsql.query import PreparedQuery, new_query_id
from dask_shardsql.run import client_of, schedule_of
from dask_shardsql.union import read_tables

__all__ = ["DataFrame"]


class DataFrame(dd.DataFrame):  # type: ignore[misc]
    """A dask DataFrame; all that is made of it are Dask's own."""

    def compute(self, **kwargs: Any) -> pd.DataFrame:
        """Read all shards now, and return their rows as one pandas DataFrame.

        Parameters
        ----------
        **kwargs
            As in ``dask.dataframe.DataFrame.compute``.
        """
        read, options = self.expr, dict(kwargs)
        scheduler = options.pop("scheduler", None)
        is_whole = isinstance(read, ReadShards) and options.pop("optimize_graph", True)
        if (
            not is_whole
            or read.is_named  # what Dask holds of it already is to be taken
            or not _is_on_cluster(scheduler)
            or not read.operand("ref").is_known
        ):
            frame: pd.DataFrame = super().compute(**kwargs)
            return frame
        return _collect(read, scheduler, options)


def _is_on_cluster(scheduler: Any) -> bool:
    try:
        return client_of(schedule_of(scheduler)) is not None
    except ConfigurationError:  # Dask says better what is wrong
        return False


def _collect(read: ReadShards, scheduler: Any, options: dict[str, Any]) -> pd.DataFrame:
    topology, shards = read.operand("ref").resolve(), read.operand("shards")
    # one run that fails, and is cancelled, is not to cancel the next
    answer = read.answer.named(new_query_id())
    snapshots = read.operand("snapshots")
    how = None if snapshots is None else snapshots.operand("split")
    tables = read_tables(PreparedQuery(topology, shards, answer), how, scheduler, **options)
    named = [(shards[number], table) for number, table in tables]
    return concatenate(named, answer, read.operand("dtype_backend"))
