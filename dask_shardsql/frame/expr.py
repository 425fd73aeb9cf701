"""The expressions behind every DataFrame over shards: a partition is a shard, or a slice of one."""

from __future__ import annotations

import functools
from typing import Any, ClassVar

from dask_shardsql.config import Settings
from dask_shardsql.engine.drivers.slicing import Part
from dask_shardsql.engine.fetch import Answer, count_shard
from dask_shardsql.engine.stoppable import Stoppable, end_after_errors
from dask_shardsql.frame import whole
from dask_shardsql.frame._dask import (
    BlockwiseIO,
    Filter,
    Head,
    Index,
    Len,
    List,
    PartitionsFiltered,
    Projection,
    Task,
    TaskRef,
    TreeReduce,
    determine_column_projection,
)
from dask_shardsql.frame.beginning import Beginning, Snapshots
from dask_shardsql.frame.decimals import install
from dask_shardsql.frame.dependents import is_known, parents_of
from dask_shardsql.frame.groups import grouped_later, grouping_of, groups_of, is_grouping
from dask_shardsql.frame.narrowed import narrowed, narrowest
from dask_shardsql.frame.partials import ReadValue, chunks_of, partials_of
from dask_shardsql.frame.partition import read_part, read_partition
from dask_shardsql.frame.pushdown import can_push, known_value, split_conditions
from dask_shardsql.frame.to_pandas import to_pandas
from dask_shardsql.run import share_topology

__all__ = ["ReadShards", "Snapshots"]

install()


class ReadShards(Beginning, PartitionsFiltered, BlockwiseIO):  # type: ignore[misc]
    """Read one query from every shard.

    Operands: ``ref`` (a :class:`TopologyRef`, never the topology itself), ``shards`` (their
    names), ``answer`` (the query and its columns), ``dtype_backend``, ``token``, which is
    new for every read so that no persisted older answer is taken for this one, and ``snapshots``,
    a :class:`Snapshots`, where shards are split. Of what the query answers, ``columns`` are read
    (None: all), of the rows that meet the conditions ``where``, and ``limit`` rows of each
    partition at the most; besides them, columns that are ``computed`` of others.
    """

    _parameters: ClassVar = [
        *("ref", "shards", "answer", "dtype_backend", "token", "snapshots", "_partitions"),
        *("can_narrow", "columns", "where", "limit", "computed"),
    ]
    _defaults: ClassVar = {
        "snapshots": None,
        "_partitions": None,
        "can_narrow": False,
        "columns": None,
        "where": (),
        "limit": None,
        "computed": (),
    }
    _absorb_projections = True
    _filter_passthrough = True

    @functools.cached_property
    def _name(self) -> str:
        return f"read-sharded-sql-{self.deterministic_token}"

    @functools.cached_property
    def _meta(self) -> Any:
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
        names = ("answer", "columns", "where", "limit", "computed")
        return narrowed(*map(self.operand, names))

    def partials(self, parts: Any) -> ReadPartials:
        """Return the parts of chunks of this read, instead of its rows."""
        return ReadPartials(*self.operands, parts)

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
        if not split_conditions(parent.predicate, self)[0]:
            return False
        is_only: bool = super()._filter_passthrough_available(parent, dependents)
        return is_only or not is_known(self, dependents)

    def _chunks(self, dependents: Any) -> Any:
        """Return the chunks that are all that is made of this read, if shards are not split."""
        return chunks_of(self, dependents) if self.operand("snapshots") is None else None

    @property
    def _can_filter(self) -> bool:
        is_exact = can_push(self.operand("answer"), self.operand("dtype_backend"))
        return self._can_narrow and is_exact and self.operand("limit") is None

    def _simplify_up(self, parent: Any, dependents: Any) -> Any:
        if not is_known(self, dependents):  # Dask will look at all of it again
            return None
        if type(parent) is Filter and parent.frame._name == self._name:
            if not self._filter_passthrough_available(parent, dependents):
                return None
            pushed, rest = split_conditions(parent.predicate, self)
            narrowed = self.substitute_parameters({"where": (*self.operand("where"), *pushed)})
            return narrowed if rest is None else Filter(narrowed, rest.substitute(self, narrowed))
        if not self._can_narrow:
            return None
        can_part = type(parent) is Projection and self._can_filter
        if can_part and (parts := self._chunks(dependents)) is not None:
            known = known_value(parent, self)
            if known is not None:
                return ReadValue(self, known, parent._meta.name, parts)
        if (same := self._grouped_later(parent, dependents)) is not None:
            return same
        if type(parent) in (Projection, Index, ReadIndex):
            parent = ReadIndex(self) if type(parent) is Index else parent
            narrowed = self._projected(parent, dependents)
            if narrowed is self and self._can_reorder(parent, dependents):
                return self.substitute_parameters({"columns": list(parent.columns)})
            return parent if narrowed is self else parent.substitute(self, narrowed)
        if len(parents_of(self, dependents)) > 1:  # which may be put beside this one, row by row
            return None
        if is_grouping(parent):
            return self._grouped(parent)
        if type(parent) is Head and parent.n >= 0 and self.operand("limit") is None:
            return parent.substitute(self, self.substitute_parameters({"limit": int(parent.n)}))
        if type(parent) is Len and self.operand("snapshots") is None:
            return CountRows(self)
        if type(parent) is Len and len(self.columns) > 1:  # of slices
            narrowed = self.substitute_parameters({"columns": [narrowest(self.answer)]})
            return parent.substitute(self, narrowed)
        return None

    @functools.cached_property
    def rows(self) -> str:
        """The name of all reads that differ in their columns only."""
        return str(self.substitute_parameters({"columns": None, "computed": ()})._name)

    def _grouped_later(self, parent: Any, dependents: Any) -> Any:
        """Return the same as an expression of this read, if shards can group that in the end."""
        if not self._can_filter or self.operand("snapshots") is not None:
            return None
        return grouped_later(parent, self, dependents)

    def _grouped(self, parent: Any) -> Any:
        """Return the same of groups that the shards make, where they can."""
        if not self._can_filter or self.operand("snapshots") is not None:
            return None
        grouping = grouping_of(parent, self) if parent.frame._name == self._name else None
        if grouping is None:
            return None
        return type(parent)(ReadGroups(*self.operands, grouping), *parent.operands[1:])

    def _can_reorder(self, parent: Any, dependents: Any) -> bool:
        """Whether a read of the same columns in another order is all that is wanted of this one."""
        shard_column = self.operand("answer").shard_column
        is_alone = type(parent) is Projection and len(parents_of(self, dependents)) == 1
        is_same = parent.ndim == 2 and sorted(parent.columns) == sorted(self.columns)
        return is_alone and is_same and shard_column not in parent.columns[:-1]

    def _projected(self, parent: Any, dependents: Any) -> ReadShards:
        """Return a read of no more columns than are needed: at least one, for the number of rows.

        Whatever else is made of this read gets the same ones, so that it stays one read.
        """
        wanted = determine_column_projection(self, parent, dependents)
        wanted = {wanted} if isinstance(wanted, str) else set(wanted)
        names = [column.name for column in self.answer.columns]
        if not wanted & set(names):
            wanted.add(narrowest(self.answer))
        columns = [name for name in self.columns if name in wanted]
        if columns == self.columns:
            return self
        narrowed: ReadShards = self.substitute_parameters({"columns": columns})
        return narrowed

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
            return Task(name, Stoppable(whole), *args, _data_producer=True)
        snapshot = TaskRef(self.operand("snapshots").key_of(number))
        return Task(name, Stoppable(sliced), *args, part, snapshot, _data_producer=True)


class ReadIndex(Index):  # type: ignore[misc]
    """The index of a read, which a filter may have to pass when only rows are counted."""

    def _simplify_up(self, parent: Any, dependents: Any) -> Any:
        read = self.frame
        if not is_known(self, dependents) or not is_known(read, dependents):
            return None
        if type(parent) is Len and isinstance(read, ReadShards):
            return Len(read)
        if type(parent) is not Filter or parent.frame._name != self._name or not read._can_filter:
            return None
        inside = {one._name for one in parent.predicate.walk()}
        around = {*inside, self._name, parent._name}
        for one in (read, self, *parent.predicate.walk()):
            if not {other._name for other in parents_of(one, dependents)} <= around:
                return None  # the rest is made of all rows
        pushed, rest = split_conditions(parent.predicate, read)
        if not pushed:
            return None
        narrowed = read.substitute_parameters({"where": (*read.operand("where"), *pushed)})
        index = ReadIndex(narrowed)
        return index if rest is None else Filter(index, rest.substitute(read, narrowed))


class ReadCounts(ReadShards):
    """How many rows each shard has of a read: what is counted there is not sent."""

    @functools.cached_property
    def _name(self) -> str:
        return f"count-sharded-sql-{self.deterministic_token}"

    @functools.cached_property
    def _meta(self) -> Any:
        return 0

    def _simplify_up(self, parent: Any, dependents: Any) -> None:
        return None

    def _filtered_task(self, name: Any, index: int) -> Task:
        return self.task_of(name, index, count_shard, None)  # shards are not split


class ReadPartials(ReadShards):
    """The parts of all chunks of a read; operands are those of the read, and ``parts``."""

    _parameters: ClassVar = [*ReadShards._parameters, "parts"]

    @functools.cached_property
    def _name(self) -> str:
        return f"partials-sharded-sql-{self.deterministic_token}"

    @functools.cached_property
    def _meta(self) -> Any:
        return tuple(part.value(None) for part in self.operand("parts"))

    def _simplify_up(self, parent: Any, dependents: Any) -> None:
        return None

    def _filtered_task(self, name: Any, index: int) -> Task:
        return self.task_of(name, index, partials_of, None, self.operand("parts"))


class ReadGroups(ReadShards):
    """What shards have grouped of a read; operands are those of the read, and ``grouping``."""

    _parameters: ClassVar = [*ReadShards._parameters, "grouping"]

    @functools.cached_property
    def _name(self) -> str:
        return f"groups-sharded-sql-{self.deterministic_token}"

    def _simplify_up(self, parent: Any, dependents: Any) -> None:
        return None

    def _filtered_task(self, name: Any, index: int) -> Task:
        rows = narrowed(self.operand("answer"), None, self.operand("where"), None, ())
        return self.task_of(name, index, groups_of, None, self.operand("grouping"), rows)


class CountRows(Len):  # type: ignore[misc]
    """How many rows a read has."""

    def _simplify_down(self) -> None:
        return None

    def _lower(self) -> Any:
        counts = ReadCounts(*self.frame.operands)
        return TreeReduce(counts, type(self), self._meta, self.combine, self.aggregate, {}, {})


class ReadWhole(Beginning):
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
    def _meta(self) -> Any:
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
