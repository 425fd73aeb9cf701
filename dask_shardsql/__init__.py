"""One SQL text over many PostgreSQL shards, as a lazy dask DataFrame or an Arrow table."""

from __future__ import annotations

from dask_shardsql.config import register_defaults as _register_defaults
from dask_shardsql.eager import collect
from dask_shardsql.errors import (
    ColumnError,
    ConfigurationError,
    ConnectionFailedError,
    ConnectionLostError,
    CredentialError,
    MergeRefusedError,
    ParameterError,
    PoolTimeoutError,
    QueryError,
    SchemaMismatchError,
    ShardSQLError,
    SnapshotLostError,
    StatementError,
    TopologyError,
    TopologyNotFoundError,
    UnionSemanticsWarning,
    UnrepresentableValueError,
)
from dask_shardsql.explanation import Explanation, FrameExplanation, explain
from dask_shardsql.frame.read import read_sharded_sql, read_sharded_table
from dask_shardsql.progress import ShardEvent, listen
from dask_shardsql.sharding import (
    ShardByCallable,
    ShardByHash,
    ShardByList,
    ShardByModulo,
    ShardByRange,
    ShardingFunction,
)
from dask_shardsql.streaming import stream
from dask_shardsql.topology import Server, Shard, ShardedTable, Topology

__all__ = [
    "ColumnError",
    "ConfigurationError",
    "ConnectionFailedError",
    "ConnectionLostError",
    "CredentialError",
    "Explanation",
    "FrameExplanation",
    "MergeRefusedError",
    "ParameterError",
    "PoolTimeoutError",
    "QueryError",
    "SchemaMismatchError",
    "Server",
    "Shard",
    "ShardByCallable",
    "ShardByHash",
    "ShardByList",
    "ShardByModulo",
    "ShardByRange",
    "ShardEvent",
    "ShardSQLError",
    "ShardedTable",
    "ShardingFunction",
    "SnapshotLostError",
    "StatementError",
    "Topology",
    "TopologyError",
    "TopologyNotFoundError",
    "UnionSemanticsWarning",
    "UnrepresentableValueError",
    "collect",
    "explain",
    "listen",
    "read_sharded_sql",
    "read_sharded_table",
    "stream",
]

__version__ = "0.1.0"

_register_defaults()
