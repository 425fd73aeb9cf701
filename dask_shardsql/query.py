"""From a text and a topology to the shards' answers: what ``collect`` and the DataFrame share."""

from __future__ import annotations

import copy
import sys
import threading
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import dask
import pyarrow as pa
from dask import threaded
from dask._task_spec import Task
from dask.base import get_scheduler

from dask_shardsql.config import Settings, default_topology
from dask_shardsql.engine import registry
from dask_shardsql.engine.cancel import cancel_query
from dask_shardsql.engine.drivers.base import Columns, Driver, Query, driver_named
from dask_shardsql.engine.fetch import Answer, compare_columns, describe_shard, read_shard
from dask_shardsql.errors import (
    ColumnError,
    ConfigurationError,
    ParameterError,
    QueryError,
    SchemaMismatchError,
    ShardSQLError,
)
from dask_shardsql.sql.types import override_types
from dask_shardsql.topology import Topology

__all__ = ["PreparedQuery", "collect", "prepare", "share_topology"]

_MAX_THREADS = 32


@dataclass(frozen=True)
class PreparedQuery:
    """A query that every shard has described, ready to be read.

    Parameters
    ----------
    topology : Topology
        Where it runs.
    shards : tuple of str
        Names of the shards to read, in the order of the topology.
    answer : Answer
        The query and its columns.
    """

    topology: Topology
    shards: tuple[str, ...]
    answer: Answer


def prepare(
    sql: str,
    topology: Topology | None,
    params: Sequence[Any] | Mapping[str, Any] | None,
    *,
    types: Mapping[str, Any] | None = None,
    shard_column: str | None = None,
    shards: Sequence[str] | None = None,
    settings: Settings,
    find_not_null: bool = False,
    scheduler: Any = None,
) -> PreparedQuery:
    """Check a query, and let the shards describe it.

    Raises
    ------
    ShardSQLError
        The text, the parameters, the topology or the shards' descriptions are not as they must be.
    """
    topology = default_topology(topology)
    names = _chosen(topology, shards)
    driver = _only_driver(topology, names)
    query = Query(
        driver.check(sql),
        _frozen(params),
        uuid.uuid4().hex[:12],
        settings.unrepresentable,
        find_not_null,
    )
    ask = names if settings.check_schema else names[:1]
    types = _mapping_or_none("types", types)
    outcomes = _run(describe_shard, topology, ask, query, "describe-sharded-sql", scheduler)
    described = _agreed(dict(zip(ask, outcomes, strict=True)), query)
    _refuse_bad_names(described, shard_column)
    columns = override_types(described, types)
    return PreparedQuery(topology, names, Answer(query, described, columns, shard_column))


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
    scheduler: Any = None,
) -> pa.Table:
    """Run one query on every shard and return the union of their answers.

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
    settings = Settings.current(unrepresentable=unrepresentable, check_schema=check_schema)
    prepared = prepare(
        sql,
        topology,
        params,
        types=types,
        shard_column=shard_column,
        shards=shards,
        settings=settings,
        scheduler=scheduler,
    )
    tables = _run(
        read_shard,
        prepared.topology,
        prepared.shards,
        prepared.answer,
        "collect-sharded-sql",
        scheduler,
    )
    return pa.concat_tables(tables).replace_schema_metadata()


def share_topology(topology: Topology, schedule: Any = None) -> registry.TopologyRef:
    """Make the topology known here and on the workers that `schedule` would use.

    Parameters
    ----------
    topology : Topology
        What tasks are to find by the reference that comes back.
    schedule : callable, optional
        What ``dask.base.get_scheduler`` gives; by default what it gives now.
    """
    ref = registry.register(topology)
    if schedule is None:
        with suppress(RuntimeError, ValueError):  # asynchronous clients
            schedule = get_scheduler()
    client = _client_of(schedule)
    if client is not None:
        from dask_shardsql.engine.worker_plugin import give_to_workers

        give_to_workers(client, topology)
    return ref


def _run(
    function: Callable[..., Any],
    topology: Topology,
    shards: Sequence[str],
    request: Query | Answer,
    name: str,
    scheduler: Any,
) -> list[Any]:
    """Run `function` for each shard as a Dask task, wherever Dask is to run, and wait."""
    try:
        schedule = get_scheduler(scheduler=scheduler) or threaded.get
    except (RuntimeError, ValueError) as error:  # asynchronous clients, unknown names
        raise ConfigurationError(
            f"dask cannot run the query here: {error}. Pass scheduler='threads', or a client that "
            "is not asynchronous"
        ) from error
    ref = share_topology(topology, schedule)
    token = uuid.uuid4().hex
    keys = [(f"{name}-{token}", number) for number in range(len(shards))]
    graph = {
        key: Task(key, function, ref, shard, request)
        for key, shard in zip(keys, shards, strict=True)
    }
    options = {}
    if schedule is threaded.get:
        options["num_workers"] = _threads(len(shards))
    query_id = (request.query if isinstance(request, Answer) else request).query_id
    try:
        results = schedule(graph, keys, **options)
    except BaseException:
        _cancel(schedule, query_id)
        raise
    return list(results)


def _cancel(schedule: Any, query_id: str) -> None:
    """Stop the query's backends, whether this process or a cluster's workers hold them."""
    cancel_query(query_id)
    client = _client_of(schedule)
    if client is not None:

        def tell_workers() -> None:
            with suppress(Exception):  # the error that brought us here is the one to report
                client.run(cancel_query, query_id)

        # in a thread, as a worker that hangs must not keep the user waiting
        thread = threading.Thread(target=tell_workers, daemon=True)
        thread.start()
        thread.join(1.0)


def _threads(shards: int) -> int | None:
    """Return a thread for each shard, as they mostly wait, unless the user chose a number."""
    if dask.config.get("num_workers", None) or dask.config.get("pool", None):
        return None
    return max(1, min(shards, _MAX_THREADS))


def _client_of(schedule: Any) -> Any:
    """Return the ``distributed.Client`` whose method `schedule` is, or None."""
    client = getattr(schedule, "__self__", None)
    if "distributed" not in sys.modules or client is None:
        return None
    from distributed import Client

    return client if isinstance(client, Client) and not client.asynchronous else None


def _frozen(params: Any) -> Any:
    """Return a copy of the parameters, so that later changes do not reach a lazy query."""
    if params is None:
        return None
    if isinstance(params, Mapping):
        return {key: _copied(value) for key, value in params.items()}
    if isinstance(params, str | bytes | Set) or not isinstance(params, Iterable):
        raise ParameterError(
            f"params must be a sequence or a mapping of values, not {type(params).__name__}"
        )
    return tuple(_copied(value) for value in params)


def _copied(value: Any) -> Any:
    try:
        return copy.deepcopy(value)
    except Exception:  # noqa: BLE001 - psycopg2's own wrappers, memory views: as they are
        return value


def _mapping_or_none(name: str, value: Any) -> Any:
    if value is not None and not isinstance(value, Mapping):
        raise ConfigurationError(
            f"{name} must map the names of columns to their types, as in "
            f"{{'price': 'float64'}}; it is a {type(value).__name__}"
        )
    return value


def _chosen(topology: Topology, shards: Sequence[str] | None) -> tuple[str, ...]:
    if shards is None:
        return tuple(shard.name for shard in topology.shards)
    if isinstance(shards, str) or not isinstance(shards, Iterable) or not shards:
        raise ConfigurationError("shards must be a list of at least one shard's name")
    wanted = {topology.shard(name).name for name in shards}
    return tuple(shard.name for shard in topology.shards if shard.name in wanted)


def _only_driver(topology: Topology, shards: Sequence[str]) -> Driver:
    """Return the driver of the shards; one text can only be written in one dialect."""
    wanted = set(shards)
    names = {s.primary.driver for s in topology.shards if s.name in wanted}
    if len(names) > 1:
        raise ConfigurationError(
            f"the shards use different drivers ({', '.join(sorted(names))}); one query can only be "
            "written in one dialect. Name shards of one kind with shards=[...]"
        )
    return driver_named(names.pop())


def _agreed(outcomes: dict[str, Columns | ShardSQLError], query: Query) -> Columns:
    """Return the one description, or raise once what one, some or all shards said."""
    errors = {s: o for s, o in outcomes.items() if isinstance(o, ShardSQLError)}
    if errors:
        raise _one_of(errors, len(outcomes))
    found: dict[str, Columns] = outcomes  # type: ignore[assignment]
    first = next(iter(found))
    expected = found[first]
    differences = compare_columns(found, expected)
    if differences:
        lines = [
            f"  shard {shard!r}, column {column!r}: {have}, but {want} on shard {first!r}"
            for shard, column, have, want in differences[:20]
        ]
        if len(differences) > 20:
            lines.append(f"  ... {len(differences)} differences in all")
        raise SchemaMismatchError(
            "the shards describe the columns of the query differently, so that their rows cannot "
            "be one table; nothing was read:\n"
            + "\n".join(lines)
            + "\nAlter the tables to agree, or cast these columns to one type in the query",
            differences,
        )
    if query.find_not_null:
        from dataclasses import replace

        together = zip(*found.values(), strict=True)
        return tuple(replace(c[0], nullable=any(x.nullable for x in c)) for c in together)
    return expected


def _one_of(errors: dict[str, ShardSQLError], shards: int) -> ShardSQLError:
    """Return the first error, with a note of how the other shards fared."""
    shard, error = next(iter(errors.items()))
    others = [name for name in errors if name != shard]
    if shards == 1 or not isinstance(error, QueryError):
        if others and not isinstance(error, QueryError):
            rest = "; ".join(str(errors[name]) for name in others[:8])
            error.message = f"{error}; and {len(others)} more of {shards} shards failed: {rest}"
        return error
    same = all(getattr(e, "sqlstate", None) == error.sqlstate for e in errors.values())
    if len(errors) == shards and same:
        return error.with_note(f"note: all {shards} shards say so")
    if others and same:
        return error.with_note(f"note: also on {', '.join(map(repr, others))}, not on the others")
    if others:
        rest = "; ".join(str(errors[name]).splitlines()[0] for name in others[:8])
        return error.with_note(f"note: {len(others)} more of {shards} shards failed: {rest}")
    rest = "the other shard accepts" if shards == 2 else f"the other {shards - 1} shards accept"
    return error.with_note(f"note: {rest} the query")


def _refuse_bad_names(columns: Columns, shard_column: str | None) -> None:
    names = [column.name for column in columns]
    twice = tuple(dict.fromkeys(name for name in names if names.count(name) > 1))
    if twice:
        raise ColumnError(
            f"the query returns more than one column named {', '.join(map(repr, twice))}. Give "
            f"each its own name, as in SELECT a.{twice[0]} AS a_{twice[0]}",
            twice,
        )
    if shard_column is not None:
        if not isinstance(shard_column, str) or not shard_column:
            raise ConfigurationError("shard_column must be the name of the column to add")
        if shard_column in names:
            raise ColumnError(
                f"shard_column is {shard_column!r}, which is also a column of the query; choose "
                "another name",
                (shard_column,),
            )
