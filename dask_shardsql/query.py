"""From a text and a topology to a described query: what ``collect`` and the DataFrame share."""

from __future__ import annotations

import copy
import uuid
import warnings
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

from dask_shardsql.config import Settings, default_topology
from dask_shardsql.engine.drivers.base import Columns, Driver, Query, driver_named
from dask_shardsql.engine.fetch import Answer, compare_columns, describe_shard
from dask_shardsql.errors import (
    ColumnError,
    ConfigurationError,
    ParameterError,
    QueryError,
    SchemaMismatchError,
    ShardSQLError,
    UnionSemanticsWarning,
)
from dask_shardsql.run import run_tasks
from dask_shardsql.sql import semantics
from dask_shardsql.sql.types import override_types
from dask_shardsql.topology import Topology

__all__ = [
    "AskedQuery",
    "PreparedQuery",
    "ask",
    "describe",
    "new_query_id",
    "warn_of_union",
    "why_not_a_union",
]


@dataclass(frozen=True)
class AskedQuery:
    """A query that was checked, for the shards to describe.

    Parameters
    ----------
    topology : Topology
        Where it runs.
    shards : tuple of str
        Names of the shards to read, in the order of the topology.
    driver : Driver
        Of these shards.
    query : Query
        The query.
    described_by : tuple of str
        Names of the shards that are to describe it before any is read.
    types : mapping, optional
        Other Arrow types than the default ones, by column name.
    shard_column : str, optional
        Name of an extra last column that holds the shard's name.
    """

    topology: Topology
    shards: tuple[str, ...]
    driver: Driver
    query: Query
    described_by: tuple[str, ...]
    types: Mapping[str, Any] | None
    shard_column: str | None

    def agree(self, outcomes: Mapping[str, Columns | ShardSQLError]) -> PreparedQuery:
        """Return the query with the one description that the shards gave.

        Parameters
        ----------
        outcomes : mapping
            By shard, the columns as it describes them, or the error it gave; only those of
            `described_by` count.

        Raises
        ------
        ShardSQLError
            The shards' own, or theirs are not one, or they are not as they must be.
        """
        described = _agreed({shard: outcomes[shard] for shard in self.described_by}, self.query)
        _refuse_bad_names(described, self.shard_column)
        columns = override_types(described, self.types)
        answer = Answer(self.query, described, columns, self.shard_column)
        return PreparedQuery(self.topology, self.shards, answer)


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


def describe(asked: AskedQuery, scheduler: Any = None) -> PreparedQuery:
    """Let the shards describe a query, as Dask tasks."""
    name, by = "describe-sharded-sql", asked.described_by
    outcomes = run_tasks(describe_shard, asked.topology, by, asked.query, name, scheduler)
    return asked.agree(dict(zip(by, outcomes, strict=True)))


def ask(
    sql: str,
    topology: Topology | None,
    params: Sequence[Any] | Mapping[str, Any] | None,
    *,
    types: Mapping[str, Any] | None = None,
    shard_column: str | None = None,
    shards: Sequence[str] | None = None,
    settings: Settings,
    find_not_null: bool = False,
) -> AskedQuery:
    """Check a query, and nothing more.

    Raises
    ------
    ShardSQLError
        The text, the parameters or the topology are not as they must be.
    """
    topology = default_topology(topology)
    names = _chosen(topology, shards)
    driver = _only_driver(topology, names)
    query = Query(
        driver.check(sql),
        _frozen(params),
        new_query_id(),
        settings.unrepresentable,
        find_not_null,
    )
    described_by = names if settings.check_schema else names[:1]
    types = _mapping_or_none("types", types)
    return AskedQuery(topology, names, driver, query, described_by, types, shard_column)


def warn_of_union(asked: AskedQuery, stacklevel: int = 3) -> None:
    """Warn where the union of the shards' answers is not what one database would answer."""
    if (why := why_not_a_union(asked)) is not None:
        warnings.warn(
            f"the union of {len(asked.shards)} shards' answers is not what one database would "
            f"answer: {why}. merge='global' gives that; filter this warning if the union is meant",
            UnionSemanticsWarning,
            stacklevel=stacklevel,
        )


def why_not_a_union(asked: AskedQuery) -> str | None:
    """Return what of a query holds within each shard only, as far as its text shows."""
    tables = asked.topology.sharded
    if len(asked.shards) < 2 or not tables or len({t.function for t in tables}) > 1:
        return None
    named = tuple((table.name, table.key) for table in tables)
    return semantics.why_not_a_union(asked.query.sql, named)


def new_query_id() -> str:
    """Return a name for one run of a query, which its sessions carry."""
    return uuid.uuid4().hex[:12]


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
        if others and len({one.message for one in errors.values()}) == 1:
            error.message = f"{error}; {len(errors)} of {shards} shards say so"
        elif others and not isinstance(error, QueryError):
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
        example = f"a.{twice[0]} AS a_{twice[0]}" if twice[0].isidentifier() else "... AS name"
        raise ColumnError(
            f"the query returns more than one column named {', '.join(map(repr, twice))}. Give "
            f"each its own name, as in SELECT {example}",
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
