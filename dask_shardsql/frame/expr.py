"""The expressions behind every DataFrame over shards: a partition is a shard, or a slice of one."""

from __future__ import annotations

import functools
import uuid
from dataclasses import replace
from typing import Any, ClassVar

import pandas as pd
from dask.tokenize import tokenize

from dask_shardsql.config import Settings
from dask_shardsql.engine.drivers.narrowing import Narrowing
from dask_shardsql.engine.drivers.slicing import Part
from dask_shardsql.engine.fetch import Answer, read_shard
from dask_shardsql.engine.registry import TopologyRef
from dask_shardsql.engine.slices import read_slice
from dask_shardsql.engine.snapshots import Snapshot, end_after_errors
from dask_shardsql.frame import whole
from dask_shardsql.frame._dask import (
    BlockwiseIO,
    Expr,
    Filter,
    Head,
    List,
    PartitionsFiltered,
    Projection,
    Task,
    TaskRef,
    determine_column_projection,
)
from dask_shardsql.frame.decimals import install
from dask_shardsql.frame.pushdown import can_push, split_conditions
from dask_shardsql.frame.to_pandas import to_pandas
from dask_shardsql.run import share_topology
from dask_shardsql.split import snapshot_task
from dask_shardsql.sql.types import Column

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
    a :class:`Snapshots`, where shards are split. Of what the query answers, ``columns`` are read
    (None: all), of the rows that meet the conditions ``where``, and ``limit`` rows of each
    partition at the most.
    """

    _parameters: ClassVar = [
        *("ref", "shards", "answer", "dtype_backend", "token", "snapshots", "_partitions"),
        *("can_narrow", "columns", "where", "limit"),
    ]
    _defaults: ClassVar = {
        "snapshots": None,
        "_partitions": None,
        "can_narrow": False,
        "columns": None,
        "where": (),
        "limit": None,
    }
    _absorb_projections = True
    _filter_passthrough = True

    @functools.cached_property
    def _name(self) -> str:
        return f"read-sharded-sql-{self.deterministic_token}"

    @functools.cached_property
    def _meta(self) -> pd.DataFrame:
        answer = self.answer
        empty = answer.schema.empty_table()
        return to_pandas(empty, answer, self.operand("dtype_backend"))

    @property
    def columns(self) -> list[str]:
        """Names of the columns."""
        return list(self._meta.columns)

    @functools.cached_property
    def answer(self) -> Answer:
        """What is asked of every shard: no more than is needed of the query's answer."""
        whole: Answer = self.operand("answer")
        columns, where, limit = (self.operand(name) for name in ("columns", "where", "limit"))
        if columns is None and not where and limit is None:
            return whole
        chosen = [
            number
            for number, column in enumerate(whole.columns)
            if columns is None or column.name in columns
        ]
        described = tuple(whole.described[number] for number in chosen)
        has_shard = columns is None or whole.shard_column in columns
        return replace(
            whole,
            described=described,
            columns=tuple(whole.columns[number] for number in chosen),
            shard_column=whole.shard_column if has_shard else None,
            narrowing=Narrowing(tuple(column.name for column in described), where, limit),
        )

    @property
    def _can_narrow(self) -> bool:
        """Whether less can be read than all: else what Dask holds of it, or a final query, is."""
        is_plain = self.operand("answer").gather is None and not self.is_named
        return is_plain and self.operand("can_narrow") and Settings.current().pushdown

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

    def _filter_passthrough_available(self, parent: Any, dependents: Any) -> bool:
        """Whether a filter can move into the query, and projections are to wait for that."""
        if type(parent) is not Filter or not self._can_filter:
            return False
        is_only = super()._filter_passthrough_available(parent, dependents)
        return is_only and bool(split_conditions(parent.predicate, self)[0])

    @property
    def _can_filter(self) -> bool:
        is_exact = can_push(self.operand("answer"), self.operand("dtype_backend"))
        return self._can_narrow and is_exact and self.operand("limit") is None

    def _simplify_up(self, parent: Any, dependents: Any) -> Any:
        if type(parent) is Filter and parent.frame._name == self._name:
            if not self._filter_passthrough_available(parent, dependents):
                return None
            pushed, rest = split_conditions(parent.predicate, self)
            narrowed = self.substitute_parameters({"where": (*self.operand("where"), *pushed)})
            return narrowed if rest is None else Filter(narrowed, rest.substitute(self, narrowed))
        if type(parent) is Projection and self._can_narrow:
            return self._project(parent, dependents)
        if type(parent) is Head and self._can_narrow and self.operand("limit") is None:
            narrowed = self.substitute_parameters({"limit": int(parent.n)})
            return parent.substitute(self, narrowed) if parent.n >= 0 else None
        return None

    def _project(self, parent: Any, dependents: Any) -> Any:
        """Read no more columns than are needed: at least one, for the number of rows."""
        wanted = determine_column_projection(self, parent, dependents)
        wanted = {wanted} if isinstance(wanted, str) else set(wanted)
        names = [column.name for column in self.answer.columns]
        if not wanted & set(names):
            wanted.add(min(self.answer.columns, key=_width).name)
        columns = [name for name in self.columns if name in wanted]
        if columns == self.columns:
            return None
        return parent.substitute(self, self.substitute_parameters({"columns": columns}))

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
        args = (self.operand("ref"), shard, self.answer, *more)
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
        joined = Task(key, whole.join, parcels, self._read.answer)
        return {task.key: task for task in [*tasks, joined]}


def _width(column: Column) -> int:
    """Return about how many bytes a value has."""
    try:
        return int(column.arrow_type.bit_width) // 8
    except ValueError:
        return 1000


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
