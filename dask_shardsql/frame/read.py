"""``read_sharded_sql`` and ``read_sharded_table``: the lazy union as a dask DataFrame."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from typing import Any

import dask.dataframe as dd

from dask_shardsql.config import Settings, default_topology
from dask_shardsql.engine import registry
from dask_shardsql.engine.drivers.base import driver_named
from dask_shardsql.engine.drivers.narrowing import NarrowingDriver
from dask_shardsql.errors import ConfigurationError
from dask_shardsql.frame.collection import DataFrame
from dask_shardsql.frame.expr import ReadShards, Snapshots
from dask_shardsql.merge import check_merge, prepare
from dask_shardsql.query import ask, warn_of_union
from dask_shardsql.split import SplitOptions, split
from dask_shardsql.topology import Topology

__all__ = ["read_sharded_sql", "read_sharded_table"]


def read_sharded_sql(
    sql: str,
    topology: Topology | None = None,
    params: Sequence[Any] | Mapping[str, Any] | None = None,
    *,
    dtype_backend: str | None = None,
    types: Mapping[str, Any] | None = None,
    shard_column: str | None = None,
    shards: Sequence[str] | None = None,
    unrepresentable: str | None = None,
    check_schema: bool | None = None,
    snapshot: str | None = None,
    partitions_per_shard: int | None = None,
    partition_size: str | int | None = None,
    partition_by: str | None = None,
    partition_method: str | None = None,
    merge: str = "union",
    max_gather_bytes: str | int | None = None,
    scheduler: Any = None,
) -> dd.DataFrame:
    """Read one query from every shard as a lazy dask DataFrame, by default one partition a shard.

    Parameters
    ----------
    sql : str
        One query (SELECT, VALUES, TABLE, WITH). Its placeholders are the driver's own: ``%s`` or
        ``%(name)s`` for PostgreSQL, ``?`` or ``:name`` for SQLite, ``?`` or ``$name`` for DuckDB.
    topology : Topology, optional
        The shards; by default the one that ``shardsql.topology`` in ``dask.config`` names.
    params : sequence or mapping, optional
        The parameters' values. Without it a ``%`` in the text stands for itself.
    dtype_backend : {"pyarrow", "numpy_nullable", "numpy"}, optional
        Kind of the DataFrame's dtypes, as in pandas' readers (``shardsql.dtype-backend``,
        ``"pyarrow"`` by default, which is lossless).
    types : mapping of str to pyarrow.DataType or str, optional
        Other Arrow types than the default ones, by column name: ``{"price": "float64"}``.
    shard_column : str, optional
        Name of an extra last column that holds the name of the shard each row came from.
    shards : sequence of str, optional
        Names of the shards to read; all by default.
    unrepresentable : {"raise", "null"}, optional
        What becomes of a value its Arrow type cannot hold (``shardsql.unrepresentable``).
    check_schema : bool, optional
        Whether every shard describes the query now (``shardsql.check-schema``), or only the
        first; each shard's answer is compared with the description in any case.
    snapshot : str, optional
        A name for this read. Reads of the same text, parameters, topology and name have the same
        keys, so that Dask may take one for the other. Without it every read is a new one.
    partitions_per_shard : int, optional
        Split each shard into as many partitions (PostgreSQL).
    partition_size : str or int, optional
        Instead: split each shard into partitions of about that size, as ``"256 MiB"``. How large
        the answer is, the server's planner estimates (rows times their width).
    partition_by : str, optional
        The column of the answer to cut by; needed where shards are split. It must be the same
        whenever the query is run: no ``random()``, no ``row_number()`` over equal rows.
    partition_method : {"range", "hash"}, optional
        Cut by ranges between percentiles of the column, by default, or by its hash. Ranges of an
        indexed column spare the server from reading all rows for each slice.
    merge : {"union", "global"}, default "union"
        Whether to read what the shards answer, one behind the other, or what one database that
        holds all their rows would answer: see :func:`collect`. That is one partition, but where
        the union is that answer.
    max_gather_bytes : str or int, optional
        With ``merge="global"``: how much may be brought together on one shard
        (``shardsql.max-gather-bytes``).
    scheduler : str, callable or Client, optional
        Where the description runs, as in ``dask.compute``.

    Returns
    -------
    dask.dataframe.DataFrame
        One partition a shard, or a slice of one, in the order of the topology, with unknown
        divisions. Columns and dtypes are those that the servers describe, also for shards
        without rows.

    Raises
    ------
    QueryError
        A server refused the query: once, with its message, SQLSTATE and position. Or the query
        chooses some of its rows (LIMIT, FETCH, DISTINCT ON), and is to be split.
    ConfigurationError
        Options that do not fit each other, or a driver that cannot split, or gather.
    MergeRefusedError
        With ``merge="global"``: the query cannot be answered so.
    SnapshotLostError
        When computed: a shard's snapshot ended before all its slices were read.
    SchemaMismatchError
        The shards describe the answer differently.
    ColumnError
        Two columns have one name, or `types` names a column that is not there.
    ConnectionFailedError
        A shard cannot be reached.

    Notes
    -----
    Nothing but the description runs now. The query runs when the DataFrame is computed, in a
    read-only transaction a shard, wherever Dask then runs: threads, a LocalCluster, a remote
    scheduler. The rows are the concatenation of the shards' answers; no snapshot spans shards.

    Where shards are split, every computation reads all slices of a shard in one snapshot. One more
    session a shard, beside ``max-connections-per-worker``, exports it and stays in its transaction
    until the last slice is read. NULLs are in a shard's last slice, alone where they are as many as
    a slice of their own would have. The slices are not equally large where values repeat.

    Examples
    --------
    >>> ddf = read_sharded_sql("SELECT * FROM orders WHERE o_custkey = %s", topology, [543])
    >>> ddf.groupby("o_orderpriority").o_totalprice.sum().compute()  # doctest: +SKIP
    """
    return _read(
        sql,
        topology,
        params,
        table=None,
        dtype_backend=dtype_backend,
        types=types,
        shard_column=shard_column,
        shards=shards,
        unrepresentable=unrepresentable,
        check_schema=check_schema,
        snapshot=snapshot,
        partitions_per_shard=partitions_per_shard,
        partition_size=partition_size,
        partition_by=partition_by,
        partition_method=partition_method,
        merge=merge,
        max_gather_bytes=max_gather_bytes,
        scheduler=scheduler,
    )


def read_sharded_table(
    table: str,
    topology: Topology | None = None,
    *,
    columns: Sequence[str] | None = None,
    schema: str | None = None,
    **options: Any,
) -> dd.DataFrame:
    """Read a sharded table from every shard as a lazy dask DataFrame.

    Parameters
    ----------
    table : str
        The table's name exactly as it is in the database; it is quoted.
    topology : Topology, optional
        The shards; by default the one that ``shardsql.topology`` in ``dask.config`` names.
    columns : sequence of str, optional
        The columns to read; all by default.
    schema : str, optional
        The database schema that the table is in.
    partitions_per_shard, partition_size, partition_by, partition_method : optional
        Split each shard into partitions, as in :func:`read_sharded_sql`. Without `partition_by`
        a table is cut by where its rows are stored (``ctid``): each slice reads its own pages and
        no others. `partition_size` is then that of the table on the server's disk (with what is
        stored apart from it, TOAST), all partitions together. `partition_by` may be any column of
        the table.
    **options
        As in :func:`read_sharded_sql`.

    Returns
    -------
    dask.dataframe.DataFrame
        As from :func:`read_sharded_sql`.

    Raises
    ------
    ConfigurationError
        The topology names sharded tables, and this is none of them: a reference table is whole on
        every shard, so that its union would hold every row n times. Or it is to be split by where
        its rows are stored, and is a view or a foreign table.

    Notes
    -----
    Servers before PostgreSQL 14 read the whole table for each slice by ``ctid``: the rows are the
    same, but nothing is gained.

    Examples
    --------
    >>> ddf = read_sharded_table("lineitem", topology, partition_size="256 MiB")
    >>> ddf.map_partitions(len).compute()  # doctest: +SKIP
    """
    topology = default_topology(topology)
    if not isinstance(table, str) or not isinstance(schema, str | None):
        raise ConfigurationError("the table and its schema must be named by texts")
    full = f"{schema}.{table}" if schema else table
    known = [entry.name for entry in topology.sharded]
    if known and not any(_same_table(full, name) for name in known):
        one = options.get("shards")
        if one is None or len(one) != 1:
            raise ConfigurationError(
                f"{full!r} is not a sharded table of this topology (sharded are "
                f"{', '.join(known)}), so it is whole on every shard. Read it from one of them: "
                f"shards=[{topology.shards[0].name!r}]"
            )
    if columns is not None and (
        not isinstance(columns, Sequence)
        or isinstance(columns, str)
        or not columns
        or not all(isinstance(c, str) for c in columns)
    ):
        raise ConfigurationError("columns must be a list of at least one column's name")
    quote = driver_named(topology.shards[0].primary.driver).quote_identifier
    chosen = ", ".join(quote(column) for column in columns) if columns else "*"
    name = ".".join(quote(part) for part in (schema, table) if part)
    return _read(f"SELECT {chosen} FROM {name}", topology, table=name, **options)


def _read(
    sql: str,
    topology: Topology | None,
    params: Sequence[Any] | Mapping[str, Any] | None = None,
    *,
    table: str | None,
    dtype_backend: str | None = None,
    types: Mapping[str, Any] | None = None,
    shard_column: str | None = None,
    shards: Sequence[str] | None = None,
    unrepresentable: str | None = None,
    check_schema: bool | None = None,
    snapshot: str | None = None,
    partitions_per_shard: int | None = None,
    partition_size: str | int | None = None,
    partition_by: str | None = None,
    partition_method: str | None = None,
    merge: str = "union",
    max_gather_bytes: str | int | None = None,
    scheduler: Any = None,
) -> dd.DataFrame:
    """Read a query; `table` is the quoted name of the one table that it reads whole."""
    options = SplitOptions(partitions_per_shard, partition_size, partition_by, partition_method)
    check_merge(merge, options, max_gather_bytes, shards=shards, shard_column=shard_column)
    settings = Settings.current(
        dtype_backend=dtype_backend,
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
        find_not_null=settings.dtype_backend == "numpy",
    )
    if merge == "union" and table is None:
        warn_of_union(asked, 4)
    prepared = prepare(asked, merge, settings.max_gather_bytes, scheduler)
    ref = registry.register(prepared.topology)
    answer, token = prepared.answer, uuid.uuid4().hex
    if snapshot is not None:
        if not isinstance(snapshot, str) or not snapshot.isprintable() or not snapshot:
            raise ConfigurationError("snapshot must be a name, of characters that can be printed")
        answer, token = answer.named(snapshot), snapshot
    how, snapshots = split(prepared, options, table, scheduler), None
    if how is not None:
        snapshots = Snapshots(ref, prepared.shards, answer.query, how, token)
    backend = settings.dtype_backend
    can_narrow = isinstance(asked.driver, NarrowingDriver)
    operands = (ref, prepared.shards, answer, backend, token, snapshots, None, can_narrow)
    return DataFrame(ReadShards(*operands))


def _same_table(one: str, other: str) -> bool:
    """Whether two names may mean one table: their schemas count where both have one."""
    if "." in one and "." in other:
        return one == other
    return one.rpartition(".")[2] == other.rpartition(".")[2]
