"""Lending a server's connection to a query; whatever is raised meanwhile names the shard."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from dask_shardsql.engine.cancel import refuse_if_cancelled
from dask_shardsql.engine.drivers.base import Driver, Query
from dask_shardsql.engine.pools import Pool, pool_of
from dask_shardsql.errors import ShardSQLError
from dask_shardsql.topology import Topology

__all__ = ["connection_to", "naming"]


@contextmanager
def connection_to(topology: Topology, shard: str, query: Query) -> Iterator[tuple[Driver, Any]]:
    """Lend a connection to the shard; whatever is raised inside names the shard."""
    refuse_if_cancelled(query.owner, shard)
    pool = pool_of(topology, shard)
    with naming(shard, pool, query), pool.connection(query.owner, shard) as connection:
        refuse_if_cancelled(query.owner, shard)  # from here on, cancelling reaches it
        yield pool.driver, connection


class naming:  # noqa: N801 - used like a function, and entered too often to be a generator
    """Make an error of this package of whatever is raised inside, with the shard's name.

    Parameters
    ----------
    shard : str
        Name of the shard.
    pool : Pool
        Whose driver and server they are.
    query : Query
        What is run.
    keep : callable, optional
        Gets the error instead of it being raised.
    """

    def __init__(
        self,
        shard: str,
        pool: Pool,
        query: Query,
        keep: Callable[[ShardSQLError], None] | None = None,
    ) -> None:
        self._shard, self._pool, self._query, self._keep = shard, pool, query, keep

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> bool:
        if not isinstance(error, Exception):
            return False
        ours = isinstance(error, ShardSQLError)
        named = error if ours else self._pool.driver.translate(error, self._query)
        if not isinstance(named, ShardSQLError):
            return False
        if named.shard is None:
            named.shard, named.server = self._shard, self._pool.server.address
        named.__cause__ = named.__cause__ if ours else error  # and nothing else behind it
        if self._keep is not None:
            self._keep(named)
        elif not ours:
            raise named
        return self._keep is not None
