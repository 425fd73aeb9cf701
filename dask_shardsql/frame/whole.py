"""All partitions as one DataFrame: where they meet on a worker, how it goes to the client.

Arrow tables are pickled as the buffers they have, without a copy. dask's own serializer for them
writes them once more, and pandas makes one piece of each column of a DataFrame before it pickles
it: for large answers, either costs as much as reading them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from dask_shardsql.engine import fetch, slices
from dask_shardsql.engine.drivers.slicing import Part
from dask_shardsql.engine.fetch import Answer
from dask_shardsql.engine.registry import TopologyRef
from dask_shardsql.engine.snapshots import Snapshot
from dask_shardsql.frame.to_pandas import to_pandas
from dask_shardsql.progress import current_worker

__all__ = ["Parcel", "concatenate", "join", "read_shard", "read_slice"]


class Parcel:
    """An Arrow table that is pickled, and not serialized by dask.

    Parameters
    ----------
    table : pyarrow.Table
        The table.
    """

    __slots__ = ("table",)

    def __init__(self, table: pa.Table) -> None:
        self.table = table

    def __reduce__(self) -> tuple[Any, ...]:
        return Parcel, (self.table,)

    def __sizeof__(self) -> int:
        return int(self.table.nbytes)


def read_shard(ref: TopologyRef, shard: str, answer: Answer) -> Parcel:
    """Return one shard's answer."""
    return Parcel(fetch.read_shard(ref, shard, answer))


def read_slice(
    ref: TopologyRef, shard: str, answer: Answer, part: Part, snapshot: Snapshot
) -> Parcel:
    """Return one slice of a shard's answer."""
    return Parcel(slices.read_slice(ref, shard, answer, part, snapshot))


def join(parcels: Sequence[Parcel], answer: Answer) -> pd.DataFrame:
    """Return the partitions' tables as one DataFrame, with the index that dask would give it."""
    tables = [parcel.table for parcel in parcels]
    return _join(tables, answer, pd.DataFrame if current_worker() is None else _OnItsWay)


def concatenate(
    tables: Sequence[tuple[str, pa.Table]], answer: Answer, dtype_backend: str
) -> pd.DataFrame:
    """Return tables as one DataFrame, with the index that dask would give it.

    Parameters
    ----------
    tables : sequence of (str, pyarrow.Table)
        The name of a shard, and rows of it.
    answer : Answer
        What the columns are.
    dtype_backend : {"pyarrow", "numpy_nullable", "numpy"}
        See :func:`to_pandas`, also for errors.
    """
    if dtype_backend == "pyarrow":
        return _join([table for _, table in tables], answer, pd.DataFrame)
    return pd.concat([to_pandas(table, answer, dtype_backend, shard) for shard, table in tables])


def _join(tables: list[pa.Table], answer: Answer, kind: type[pd.DataFrame]) -> pd.DataFrame:
    frame = kind(to_pandas(pa.concat_tables(tables), answer, "pyarrow"), copy=False)
    if len(tables) > 1:
        frame.index = pd.Index(np.concatenate([np.arange(len(table)) for table in tables]))
    if isinstance(frame, _OnItsWay):
        object.__setattr__(frame, "_made_of", (tables, answer, frame._parts()))
    return frame


class _OnItsWay(pd.DataFrame):
    """A DataFrame that is pickled as the tables it was made of, and arrives as a plain one."""

    _metadata: list[str] = []  # noqa: RUF012 - as pandas declares it

    def _parts(self) -> list[Any]:
        """Return what is another object after any change: Arrow changes nothing in place."""
        arrays = [self[name].array for name in self.columns]
        inner = [a.__arrow_array__() if hasattr(a, "__arrow_array__") else object() for a in arrays]
        return [self.index, self.columns, *inner]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        made_of = getattr(self, "_made_of", None)
        if made_of is not None:
            tables, answer, parts = made_of
            now = self._parts()
            if len(now) == len(parts) and all(a is b for a, b in zip(now, parts, strict=True)):
                return _join, (tables, answer, pd.DataFrame)
        return pd.DataFrame, (pd.DataFrame(self),)
