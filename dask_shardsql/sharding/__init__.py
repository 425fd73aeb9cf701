"""Sharding functions: value -> shard, and which shards a range of values may need."""

from __future__ import annotations

from dask_shardsql.sharding.function import ShardingFunction
from dask_shardsql.sharding.kinds import ShardByHash, ShardByList, ShardByModulo, ShardByRange
from dask_shardsql.sharding.own import ShardByCallable

__all__ = [
    "ShardByCallable",
    "ShardByHash",
    "ShardByList",
    "ShardByModulo",
    "ShardByRange",
    "ShardingFunction",
]
