"""``collect``: the union of all shards, now."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pyarrow as pa

from dask_shardsql.config import Settings
from dask_shardsql.engine.drivers.base import AskAgain, Columns
from dask_shardsql.engine.fetch import Answer
from dask_shardsql.engine.scatter import scatter
from dask_shardsql.errors import ShardSQLError
from dask_shardsql.merge import check_merge, prepare
from dask_shardsql.query import AskedQuery, ask, new_query_id, warn_of_union
from dask_shardsql.run import runs_here
from dask_shardsql.split import SplitOptions, split
from dask_shardsql.topology import Topology
from dask_shardsql.union import read_tables

__all__ = ["collect"]


def collect(
    sql: str,
    topology: Topology | None = None,
    params: Sequence[Any] | Mapping[str, Any] | None = None,
    *,
    types: Mapping[str, Any] | None = None,
    shard_column: str | None = None,
    shards: Sequence[str] | None = None,
    unrepresentable: str | None = None,
    check_schema: bool | None = None,
    partitions_per_shard: int | None = None,
    partition_size: str | int | None = None,
    partition_by: str | None = None,
    partition_method: str | None = None,
    merge: str = "union",
    max_gather_bytes: str | int | None = None,
    scheduler: Any = None,
) -> pa.Table:
    """Run one query on every shard and return the union of their answers, or one over all rows.

    Parameters
    ----------
    sql : str
        One query (SELECT, VALUES, TABLE, WITH). Its placeholders are the driver's own: ``%s`` or
        ``%(name)s`` for PostgreSQL, ``?`` or ``:name`` for SQLite, ``?`` or ``$name`` for DuckDB.
    topology : Topology, optional
        The shards; by default the one that ``shardsql.topology`` in ``dask.config`` names.
    params : sequence or mapping, optional
        The parameters' values. Without it a ``%`` in the text stands for itself.
    types : mapping of str to pyarrow.DataType or str, optional
        Other Arrow types than the default ones, by column name: ``{"total": "decimal128(38, 4)"}``.
    shard_column : str, optional
        Name of an extra last column that holds the name of the shard each row came from.
    shards : sequence of str, optional
        Names of the shards to read; all by default.
    unrepresentable : {"raise", "null"}, optional
        What becomes of a value its Arrow type cannot hold (``shardsql.unrepresentable``).
    check_schema : bool, optional
        Whether every shard describes the query before any is read (``shardsql.check-schema``),
        or only the first; each shard's answer is compared with the description in any case.
    partitions_per_shard : int, optional
        Read each shard in as many slices, side by side and in one snapshot (PostgreSQL).
    partition_size : str or int, optional
        Instead: in slices of about that size, as in :func:`read_sharded_sql`.
    partition_by : str, optional
        The column of the answer to cut by; needed where shards are split.
    partition_method : {"range", "hash"}, optional
        How to cut by it, as in :func:`read_sharded_sql`.
    merge : {"union", "global"}, default "union"
        Whether to return what the shards answer, one behind the other, or what one database that
        holds all their rows would answer: see the README.
    max_gather_bytes : str or int, optional
        With ``merge="global"``: how much may be brought together on one shard
        (``shardsql.max-gather-bytes``).
    scheduler : str, callable or Client, optional
        As in ``dask.compute``: by default the current ``distributed.Client``, or what
        ``dask.config`` says, or a thread for each shard.

    Returns
    -------
    pyarrow.Table
        The rows of all shards, in the order of the topology. Columns and types are those that
        the servers describe, also for shards without rows.

    Raises
    ------
    QueryError
        A server refused the query: once, with its message, SQLSTATE and position.
    SchemaMismatchError
        The shards describe the answer differently; raised before any row is read.
    ColumnError
        Two columns have one name, or `types` names a column that is not there.
    UnrepresentableValueError
        A value does not fit its column's Arrow type.
    ConnectionFailedError
        A shard cannot be reached.

    Notes
    -----
    Everything in the text runs in the databases, in a read-only transaction a shard. The union is
    the concatenation of the shards' answers: an aggregate, ORDER BY, LIMIT or DISTINCT holds
    within each shard, not over all of them. No snapshot spans shards.
    """
    options = SplitOptions(partitions_per_shard, partition_size, partition_by, partition_method)
    check_merge(merge, options, max_gather_bytes, shards=shards, shard_column=shard_column)
    settings = Settings.current(
        unrepresentable=unrepresentable,
        check_schema=check_schema,
        max_gather_bytes=max_gather_bytes,
    )
    asked = ask(
        sql,
        topology,
        params,
        types=types,
        shard_column=shard_column,
        shards=shards,
        settings=settings,
    )
    if merge == "union":
        warn_of_union(asked)
    is_simple = merge == "union" and not options.is_asked_for and runs_here(scheduler)
    table = _scattered(asked) if is_simple else None
    if table is not None:
        return table
    prepared = prepare(asked, merge, settings.max_gather_bytes, scheduler)
    how = split(prepared, options, scheduler=scheduler)
    tables = [table for _, table in read_tables(prepared, how, scheduler)]
    return pa.concat_tables(tables).replace_schema_metadata()


def _scattered(asked: AskedQuery, *, at_once: bool = True) -> pa.Table | None:
    """Return the shards' rows, read by this thread; None where their driver cannot do that."""
    batches: dict[str, list[pa.RecordBatch]] = {shard: [] for shard in asked.shards}
    schemas: list[pa.Schema] = []

    def agree(outcomes: Mapping[str, Columns | ShardSQLError]) -> Answer:
        answer = asked.agree(outcomes).answer
        schemas.append(answer.schema)
        return answer

    def take(shard: str, batch: pa.RecordBatch) -> None:
        batches[shard].append(batch)

    at_once = at_once and asked.types is None  # other types may need another form
    try:
        if not scatter(asked.topology, asked.shards, asked.query, agree, take, at_once=at_once):
            return None
    except AskAgain:
        again = replace(asked.query, query_id=new_query_id())  # as the old one was cancelled
        return _scattered(replace(asked, query=again), at_once=False)
    in_order = [batch for shard in asked.shards for batch in batches[shard]]
    return pa.Table.from_batches(in_order, schemas[0])
