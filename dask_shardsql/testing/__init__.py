"""Real PostgreSQL servers on this machine, for tests, examples and trying things out."""

from __future__ import annotations

from dask_shardsql.testing.binaries import PostgreSQLBinaries, find_binaries
from dask_shardsql.testing.servers import ShardServers
from dask_shardsql.testing.start import start_shards

__all__ = ["PostgreSQLBinaries", "ShardServers", "find_binaries", "start_shards"]
