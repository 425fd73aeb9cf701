"""The expression behind every DataFrame over shards: one partition a shard."""

from __future__ import annotations

import functools
from typing import Any, ClassVar

import pandas as pd

from dask_shardsql.engine.fetch import Answer, read_shard
from dask_shardsql.engine.registry import TopologyRef
from dask_shardsql.frame._dask import BlockwiseIO, PartitionsFiltered, Task
from dask_shardsql.frame.decimals import install
from dask_shardsql.frame.to_pandas import to_pandas
from dask_shardsql.run import share_topology

__all__ = ["ReadShards"]

install()


class ReadShards(PartitionsFiltered, BlockwiseIO):  # type: ignore[misc]
    """Read one query from every shard.

    Operands: ``ref`` (a :class:`TopologyRef`, never the topology itself), ``shards`` (their
    names), ``answer`` (the query and its columns), ``dtype_backend``, and ``token``, which is
    new for every read so that no persisted older answer is taken for this one.
    """

    _parameters: ClassVar = ["ref", "shards", "answer", "dtype_backend", "token", "_partitions"]
    _defaults: ClassVar = {"_partitions": None}

    @functools.cached_property
    def _name(self) -> str:
        return f"read-sharded-sql-{self.deterministic_token}"

    @functools.cached_property
    def _meta(self) -> pd.DataFrame:
        answer = self.operand("answer")
        empty = answer.schema.empty_table()
        return to_pandas(empty, answer, self.operand("dtype_backend"))

    def _divisions(self) -> tuple[None, ...]:
        return (None,) * (len(self.operand("shards")) + 1)

    def _lower(self) -> None:
        """Before the graph leaves: a client that became current since must know the topology."""
        ref = self.operand("ref")
        if ref.is_known:
            share_topology(ref.resolve())

    def _filtered_task(self, name: Any, index: int) -> Task:
        return Task(
            name,
            read_partition,
            self.operand("ref"),
            self.operand("shards")[index],
            self.operand("answer"),
            self.operand("dtype_backend"),
            _data_producer=True,
        )


def read_partition(
    ref: TopologyRef, shard: str, answer: Answer, dtype_backend: str
) -> pd.DataFrame:
    """Return one shard's answer as a pandas DataFrame."""
    return to_pandas(read_shard(ref, shard, answer), answer, dtype_backend, shard)
