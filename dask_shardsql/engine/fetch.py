"""One query on one shard -> its description, or its whole answer as Arrow.

These are the functions that Dask tasks call. A task publishes nothing before the shard has
answered in full, so one that is run again can neither lose nor repeat rows.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Self, cast

import pyarrow as pa

from dask_shardsql.engine.cancel import refuse_if_cancelled
from dask_shardsql.engine.drivers.base import Columns, OnBatch, Query
from dask_shardsql.engine.drivers.narrowing import Narrowing, NarrowingDriver
from dask_shardsql.engine.gather import Gather, read_gathered
from dask_shardsql.engine.lending import connection_to
from dask_shardsql.engine.registry import TopologyRef
from dask_shardsql.engine.shared_memory import Offer, SharedTable, SharedWriter
from dask_shardsql.errors import SchemaMismatchError, ShardSQLError
from dask_shardsql.progress import ShardEvent, current_worker, emit, is_heard
from dask_shardsql.sql.types import Column, arrow_schema, arrow_type_of

__all__ = [
    "Answer",
    "Reading",
    "compare_columns",
    "count_shard",
    "describe_shard",
    "read_batches",
    "read_shard",
    "read_shard_shared",
]


@dataclass(frozen=True)
class Answer:
    """What every shard is asked for, and what each of them must describe it as.

    Parameters
    ----------
    query : Query
        The query.
    described : tuple of Column
        The columns as the servers describe them.
    columns : tuple of Column
        The same with the Arrow types to deliver.
    shard_column : str, optional
        Name of an extra last column that holds the shard's name.
    slice : (int, int), default (0, 1)
        Which slice of the shard's answer, counted from 0, and of how many.
    gather : Gather, optional
        What the shard that is read from is to gather from the others first.
    narrowing : Narrowing, optional
        What is read of the query's answer, if it is less than all.
    """

    query: Query
    described: Columns
    columns: Columns
    shard_column: str | None = None
    slice: tuple[int, int] = (0, 1)
    gather: Gather | None = None
    narrowing: Narrowing | None = None

    def named(self, snapshot: str) -> Answer:
        """Return the same with the snapshot's name for the query's id."""
        return replace(self, query=replace(self.query, query_id=snapshot))

    @property
    def schema(self) -> pa.Schema:
        """The Arrow schema of every shard's table."""
        schema = arrow_schema(self.columns)
        if self.shard_column is not None:
            schema = schema.append(pa.field(self.shard_column, pa.string(), nullable=False))
        return schema


def describe_shard(ref: TopologyRef, shard: str, query: Query) -> Columns | ShardSQLError:
    """Return the columns of the answer of one shard, or the error it gave.

    The error is returned, not raised, so that the caller can say once what n shards said.
    """
    try:
        with connection_to(ref.resolve(), shard, query) as (driver, connection):
            return driver.describe(connection, query)
    except ShardSQLError as error:
        return error


def read_shard(ref: TopologyRef, shard: str, answer: Answer) -> pa.Table:
    """Return the whole answer of one shard; as :func:`read_batches`."""
    batches: list[pa.RecordBatch] = []
    read_batches(ref, shard, answer, batches.append)
    return pa.Table.from_batches(batches, answer.schema)


def count_shard(ref: TopologyRef, shard: str, answer: Answer) -> int:
    """Return how many rows the answer of one shard has, of which none is read."""
    found: int = read_shard(ref, shard, counted(answer)).column(0)[0].as_py()
    return found


def counted(answer: Answer) -> Answer:
    """Return an answer that has the number of rows instead of them."""
    narrowing = answer.narrowing or Narrowing((answer.described[0].name,))
    columns = (Column("count", "int8", arrow_type_of("int8")),)
    return replace(
        answer,
        described=columns,
        columns=columns,
        shard_column=None,
        narrowing=replace(narrowing, is_counted=True),
    )


def read_shard_shared(
    ref: TopologyRef, shard: str, answer: Answer, offer: Offer | None
) -> SharedTable | pa.Table:
    """Return the whole answer of one shard in memory that whoever made the offer may map."""
    with SharedWriter(answer.schema, offer) as writer:
        read_batches(ref, shard, answer, writer.write)
        return writer.finish()


def read_batches(ref: TopologyRef, shard: str, answer: Answer, on_batch: OnBatch) -> None:
    """Read the whole answer of one shard.

    Parameters
    ----------
    ref : TopologyRef
        The topology.
    shard : str
        Name of the shard.
    answer : Answer
        The query, and the columns it must have.
    on_batch : callable
        Gets the rows as they come, in record batches of the answer's schema; nothing more is
        received while it does not return.

    Raises
    ------
    SchemaMismatchError
        The shard's tables have changed since the query was described.
    ShardSQLError
        Whatever else goes wrong, with the shard's name.
    """
    topology, query = ref.resolve(), answer.query
    with Reading(shard, answer, on_batch) as reading:
        if answer.gather is not None:
            read_gathered(topology, shard, query, answer.gather, reading.resolve, reading.take)
            return
        with connection_to(topology, shard, query) as (driver, connection):
            if answer.narrowing is not None:
                query = cast(NarrowingDriver, driver).narrow(query, answer.narrowing)
            driver.read(connection, query, reading.resolve, reading.take)


class Reading:
    """What is made of the answer of one shard while it is read: a context that tells how it ends.

    Parameters
    ----------
    shard : str
        Name of the shard.
    answer : Answer
        The query, and the columns it must have.
    on_batch : callable
        Gets the rows.
    on_worker : bool, optional
        Whether this runs on a Dask worker, where that is known already.
    """

    def __init__(
        self, shard: str, answer: Answer, on_batch: OnBatch, *, on_worker: bool | None = None
    ) -> None:
        self._shard, self._answer, self._on_batch = shard, answer, on_batch
        self._started = time.monotonic()
        self._rows = self._bytes = 0
        self._on_worker = current_worker() is not None if on_worker is None else on_worker
        self._tell("started")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.finish("finished" if kind is None else "failed")

    def finish(self, state: str) -> None:
        """Tell that it has finished or failed."""
        self._tell(state)

    def resolve(self, found: Columns) -> Columns:
        """Compare a description with the one that was planned with; return the types to deliver.

        Raises
        ------
        SchemaMismatchError
            It is another one.
        """
        shard, answer = self._shard, self._answer
        refuse_if_cancelled(answer.query.owner, shard)
        differences = compare_columns({shard: found}, answer.described)
        if differences:
            raise SchemaMismatchError(
                f"shard {shard!r} does not describe the query as it was described when it was "
                "planned: "
                + "; ".join(f"{c!r} is {f}, was {e}" for _, c, f, e in differences)
                + ". The shards differ, or a table was altered: compare them, and read again",
                differences,
            )
        return answer.columns

    def take(self, batch: pa.RecordBatch) -> None:
        """Pass on some rows."""
        answer = self._answer
        refuse_if_cancelled(answer.query.owner, self._shard)
        self._rows += batch.num_rows
        self._bytes += batch.nbytes
        if answer.shard_column is not None:
            names = pa.repeat(pa.scalar(self._shard, pa.string()), batch.num_rows)
            batch = pa.RecordBatch.from_arrays([*batch.columns, names], schema=answer.schema)
        self._on_batch(batch)
        self._tell("reading")

    def _tell(self, state: str) -> None:
        if not (self._on_worker or is_heard()):
            return
        seconds = time.monotonic() - self._started
        query_id = self._answer.query.query_id
        read = (self._rows, self._bytes, seconds)
        emit(ShardEvent(query_id, self._shard, state, *read, *self._answer.slice))


def compare_columns(
    found: dict[str, Columns], expected: Columns
) -> tuple[tuple[str, str, str, str], ...]:
    """Return ``(shard, column, found, expected)`` wherever a shard describes another column."""
    differences = []
    for shard, columns in found.items():
        if columns == expected:
            continue
        for number in range(max(len(columns), len(expected))):
            have = columns[number] if number < len(columns) else None
            want = expected[number] if number < len(expected) else None
            if have and want and (have.name, have.type_name) == (want.name, want.type_name):
                continue
            name = (want or have).name  # type: ignore[union-attr]
            same = have is not None and want is not None and have.name == want.name
            shown = [
                "missing" if c is None else (c.type_name if same else f"{c.name} {c.type_name}")
                for c in (have, want)
            ]
            differences.append((shard, name, shown[0], shown[1]))
    return tuple(differences)
