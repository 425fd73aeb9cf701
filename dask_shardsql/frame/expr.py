"""The expressions behind every DataFrame over shards: a partition is a shard, or a slice of one."""

from __future__ import annotations

import functools
import uuid
from typing import Any, ClassVar

import pandas as pd
from dask.tokenize import tokenize

from dask_shardsql.engine.drivers.slicing import Part
from dask_shardsql.engine.fetch import Answer, read_shard
from dask_shardsql.engine.registry import TopologyRef
from dask_shardsql.engine.slices import read_slice
from dask_shardsql.engine.snapshots import Snapshot, end_after_errors
from dask_shardsql.frame import whole
from dask_shardsql.frame._dask import (
    BlockwiseIO,
    Expr,
    List,
    PartitionsFiltered,
    Task,
    TaskRef,
)
from dask_shardsql.frame.decimals import install
from dask_shardsql.frame.to_pandas import to_pandas
from dask_shardsql.run import share_topology
from dask_shardsql.split import snapshot_task

__all__ = ["ReadShards", "Snapshots"]

install()


class Snapshots(Expr):  # type: ignore[misc]
    """For each shard that is split, the snapshot that its slices are read in.

    Operands: ``ref``, ``shards`` (their names), ``query``, ``split``, the read's ``token``;
    ``run``, which is new for every computation: what Dask kept of an older one (persisted
    slices, results that are still wanted) was read in another snapshot; and ``only``: the numbers
    of the shards that are needed (None: all). They leave a snapshot's key as it is, so that all of
    one computation that reads a shard does so in one snapshot.
    """

    _parameters: ClassVar = ["ref", "shards", "query", "split", "token", "run", "only"]
    _defaults: ClassVar = {"run": None, "only": None}

    @property
    def ndim(self) -> int:
        """There are no rows."""
        return 0

    def _divisions(self) -> tuple[None, ...]:
        return (None,) * (len(self.operand("shards")) + 1)

    @functools.cached_property
    def _token(self) -> str:
        names = [name for name in self._parameters if name != "only"]
        return str(tokenize(*map(self.operand, names), ensure_deterministic=True))

    def key_of(self, shard: int) -> tuple[str, int]:
        """Return the key of the snapshot of the shard of that number."""
        return (f"snapshot-sharded-sql-{self._token}", shard)

    def _layer(self) -> dict[Any, Task]:
        ref, shards, query = self.operand("ref"), self.operand("shards"), self.operand("query")
        only = self.operand("only")
        first = {n: part for n, part in self.operand("split").parts if part.number == 0}
        tasks = [
            snapshot_task(self.key_of(n), ref, shards[n], query, part)
            for n, part in first.items()
            if part.slices > 1 and (only is None or n in only)
        ]
        return {task.key: task for task in tasks}


class _Beginning(Expr):  # type: ignore[misc]
    """What reads shards, and has an operand ``snapshots``."""

    def lower_once(self, lowered: dict[str, Any]) -> Any:
        """Begin a computation; `lowered` is Dask's own memory of one, so that all share a run."""
        snapshots = self.operand("snapshots")
        if snapshots is None or snapshots.operand("run") is not None:
            return super().lower_once(lowered)
        run = lowered.setdefault("dask_shardsql-run", uuid.uuid4().hex)
        begun = self.substitute_parameters(
            {"snapshots": snapshots.substitute_parameters({"run": run})}
        )
        return lowered.setdefault(self._name, begun.lower_once(lowered))


class ReadShards(_Beginning, PartitionsFiltered, BlockwiseIO):  # type: ignore[misc]
    """Read one query from every shard.

    Operands: ``ref`` (a :class:`TopologyRef`, never the topology itself), ``shards`` (their
    names), ``answer`` (the query and its columns), ``dtype_backend``, ``token``, which is
    new for every read so that no persisted older answer is taken for this one, and ``snapshots``,
    a :class:`Snapshots`, where shards are split.
    """

    _parameters: ClassVar = [
        *("ref", "shards", "answer", "dtype_backend", "token", "snapshots", "_partitions")
    ]
    _defaults: ClassVar = {"snapshots": None, "_partitions": None}

    @functools.cached_property
    def _name(self) -> str:
        return f"read-sharded-sql-{self.deterministic_token}"

    @functools.cached_property
    def _meta(self) -> pd.DataFrame:
        answer = self.operand("answer")
        empty = answer.schema.empty_table()
        return to_pandas(empty, answer, self.operand("dtype_backend"))

    @functools.cached_property
    def _parts(self) -> tuple[tuple[int, Part | None], ...]:
        """For each partition the number of its shard and, where shards are split, the slice."""
        snapshots = self.operand("snapshots")
        if snapshots is None:
            return tuple((number, None) for number in range(len(self.operand("shards"))))
        parts: tuple[tuple[int, Part | None], ...] = snapshots.operand("split").parts
        return parts

    @property
    def is_named(self) -> bool:
        """Whether the user has named the snapshot: what Dask holds of it then stands for it."""
        return bool(self.operand("token") == self.operand("answer").query.query_id)

    def _divisions(self) -> tuple[None, ...]:
        return (None,) * (len(self._parts) + 1)

    def _simplify_down(self) -> ReadShards | None:
        """Hold no snapshot of a shard that is not read."""
        snapshots = self.operand("snapshots")
        if snapshots is None or not self._filtered:
            return None
        only = tuple(sorted({self._parts[index][0] for index in self._partitions}))
        if snapshots.operand("only") == only:
            return None
        needed = snapshots.substitute_parameters({"only": only})
        narrowed: ReadShards = self.substitute_parameters({"snapshots": needed})
        return narrowed

    def finalize_compute(self) -> Any:
        """Choose how ``compute()`` makes one DataFrame of the partitions."""
        # the other backends check values, shard by shard
        if self.is_named or self.operand("dtype_backend") != "pyarrow":
            return super().finalize_compute()
        return ReadWhole(*(self._simplify_down() or self).operands)

    def _lower(self) -> None:
        """Before the graph leaves: a client that became current since must know the topology."""
        ref = self.operand("ref")
        if ref.is_known:
            share_topology(ref.resolve())
        if self.operand("snapshots") is not None:
            end_after_errors()

    def _filtered_task(self, name: Any, index: int) -> Task:
        backend = self.operand("dtype_backend")
        return self.task_of(name, index, read_partition, read_part, backend)

    def task_of(self, name: Any, index: int, whole: Any, sliced: Any, *more: Any) -> Task:
        """Return the task of a partition: one function reads a shard, the other a slice of one."""
        number, part = self._parts[index]
        shard = self.operand("shards")[number]
        args = (self.operand("ref"), shard, self.operand("answer"), *more)
        if part is None or part.slices == 1:
            return Task(name, whole, *args, _data_producer=True)
        snapshot = TaskRef(self.operand("snapshots").key_of(number))
        return Task(name, sliced, *args, part, snapshot, _data_producer=True)


class ReadWhole(_Beginning):
    """What ``compute()`` of a :class:`ReadShards` gives: all partitions as one DataFrame.

    They meet as Arrow tables (see `whole.py`); dask would concatenate DataFrames on one worker.
    Operands are those of the read.
    """

    _parameters: ClassVar = ReadShards._parameters
    _defaults: ClassVar = ReadShards._defaults

    @functools.cached_property
    def _name(self) -> str:
        return f"read-sharded-sql-whole-{self.deterministic_token}"

    @functools.cached_property
    def _read(self) -> ReadShards:
        return ReadShards(*self.operands)

    @functools.cached_property
    def _meta(self) -> pd.DataFrame:
        return self._read._meta

    def _divisions(self) -> tuple[None, ...]:
        return (None, None)

    def _lower(self) -> None:
        self._read._lower()

    def _layer(self) -> dict[Any, Task]:
        read = self._read
        numbers = read._partitions if read._filtered else range(read.npartitions)
        name = f"read-sharded-sql-table-{self.deterministic_token}"
        tasks = [read.task_of((name, n), n, whole.read_shard, whole.read_slice) for n in numbers]
        parcels = List(*(TaskRef(task.key) for task in tasks))
        key = (self._name, 0)
        joined = Task(key, whole.join, parcels, self.operand("answer"))
        return {task.key: task for task in [*tasks, joined]}


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
