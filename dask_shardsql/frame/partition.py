"""A partition of a DataFrame: the functions that tasks call to read it."""

from __future__ import annotations

import pandas as pd

from dask_shardsql.engine.drivers.slicing import Part
from dask_shardsql.engine.fetch import Answer, read_shard
from dask_shardsql.engine.registry import TopologyRef
from dask_shardsql.engine.slices import read_slice
from dask_shardsql.engine.snapshots import Snapshot
from dask_shardsql.frame.to_pandas import to_pandas

__all__ = ["read_part", "read_partition"]


def read_partition(
    ref: TopologyRef, shard: str, answer: Answer, dtype_backend: str
) -> pd.DataFrame:
    """Return one shard's answer as a pandas DataFrame."""
    return to_pandas(read_shard(ref, shard, answer), answer, dtype_backend, shard)


def read_part(
    ref: TopologyRef,
    shard: str,
    answer: Answer,
    dtype_backend: str,
    part: Part,
    snapshot: Snapshot,
) -> pd.DataFrame:
    """Return one slice of a shard's answer as a pandas DataFrame."""
    table = read_slice(ref, shard, answer, part, snapshot)
    return to_pandas(table, answer, dtype_backend, shard)
