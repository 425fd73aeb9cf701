"""``merge="global"``: how to answer as one database that holds all the rows would."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from dask_shardsql.engine.drivers.gathering import Extract, can_gather
from dask_shardsql.engine.gather import Gather, estimate_shard, survey_shard, too_much
from dask_shardsql.errors import ConfigurationError, MergeRefusedError, ShardSQLError
from dask_shardsql.query import AskedQuery, PreparedQuery, describe
from dask_shardsql.run import run_tasks
from dask_shardsql.split import SplitOptions
from dask_shardsql.topology import MERGING, Topology

__all__ = ["Plan", "check_merge", "plan", "prepare", "refuse_too_much"]

MERGES = ("global", "union")
# how much more than the tables a split query may move, by estimates that are high for groups;
# and how little is never more
_FACTOR, _LITTLE = 8, 1 << 20


def check_merge(merge: str, options: SplitOptions, **of_shards: Any) -> None:
    """Refuse a mode that there is none of, and options that do not go with it.

    Parameters
    ----------
    merge : str
        The mode.
    options : SplitOptions
        How shards are to be split.
    **of_shards
        Other options that say something of single shards.

    Raises
    ------
    ConfigurationError
        That is so.
    """
    if merge not in MERGES:
        needed = " or ".join(map(repr, MERGES))
        raise ConfigurationError(f"merge is {merge!r}, where {needed} is needed")
    chosen = {**vars(options), **of_shards}
    given = [name for name, value in chosen.items() if value is not None]
    if merge == "global" and given:
        raise ConfigurationError(
            f"{given[0]} says something of single shards, and merge='global' gives one answer over "
            "all of them: leave it out"
        )


def prepare(asked: AskedQuery, merge: str, max_gather_bytes: int, scheduler: Any) -> PreparedQuery:
    """Let the shards describe a query, and return it as it is to be read.

    Parameters
    ----------
    asked : AskedQuery
        The query, for all shards.
    merge : {"union", "global"}
        What is to be answered.
    max_gather_bytes : int
        How much may be gathered.
    scheduler : str, callable or Client, optional
        Where the shards are asked, as in ``dask.compute``.

    Raises
    ------
    MergeRefusedError
        It cannot be answered so, or too much would have to be gathered.
    ConfigurationError
        The topology does not say which tables are sharded, or the driver cannot gather.
    ShardSQLError
        The shards' own.
    """
    if merge == "union":
        return describe(asked, scheduler)
    found = plan(asked, max_gather_bytes, scheduler)
    refuse_too_much(found, max_gather_bytes)
    return found.prepared


def refuse_too_much(found: Plan, max_gather_bytes: int) -> None:
    """Refuse to gather more than is allowed, by what the servers' planners expect.

    Raises
    ------
    MergeRefusedError
        It is more.
    """
    if found.gathered_bytes > max_gather_bytes:
        about = f"about {found.gathered_bytes:,} bytes"
        raise too_much(about, max_gather_bytes, [one.table for one in found.extracts])


@dataclass(frozen=True)
class Plan:
    """How a query is to be answered as one database would.

    Parameters
    ----------
    strategy : {"direct", "union", "merge", "gather"}
        One shard answers; the shards' answers are the answer; one shard merges what the others
        answer to parts of the query; one shard gathers their rows.
    reason : str
        A word for why, which stays the same.
    prepared : PreparedQuery
        The query as it is to be read.
    extracts : tuple of Extract
        What is gathered.
    sizes : mapping
        By shard, about how many bytes of each extract there are.
    final : str
        What the shard that gathers then runs.
    visited : tuple of str
        The shards that may have rows for it.
    """

    strategy: str
    reason: str
    prepared: PreparedQuery
    extracts: tuple[Extract, ...] = ()
    sizes: Mapping[str, Sequence[int]] = field(default_factory=dict)
    final: str = ""
    visited: tuple[str, ...] = ()

    @property
    def gathered_bytes(self) -> int:
        """About how many bytes are gathered."""
        return sum(map(sum, self.sizes.values()))


def plan(asked: AskedQuery, max_gather_bytes: int, scheduler: Any) -> Plan:
    """Find out how a query can be answered as one database would; parameters as of `prepare`."""
    topology, shards, query = asked.topology, asked.shards, asked.query
    can_gather(asked.driver, elsewhere=topology.merging)
    prepared = describe(asked, scheduler)
    if len(shards) == 1:
        return Plan("direct", "one-shard", prepared, visited=shards)
    if not topology.sharded:
        raise ConfigurationError(
            "merge='global' needs to know which tables are sharded: name them in the topology, as "
            "in sharded={'orders': 'o_orderkey'}"
        )
    at = _spread(shards, query.sql)
    merging = at if topology.merging is None else MERGING
    more = (topology.sharded, shards)
    (survey,) = run_tasks(
        survey_shard, topology, [merging], query, "survey-sharded-sql", scheduler, *more
    )
    if isinstance(survey, ShardSQLError):
        raise survey
    _refuse_unknown(topology, survey.others)
    alone = replace(prepared, shards=(at,))
    if not survey.extracts:
        return Plan("direct", "reference-tables", alone, visited=(at,))
    split, visited = survey.split, shards
    if split is not None and split.shards is not None:
        visited = tuple(shard for shard in shards if shard in (split.shards or ()))
    if split is not None and split.strategy in ("direct", "union"):
        if len(visited) > 1:
            _sizes(asked, visited, split.tables, scheduler)  # which compares the tables
        at_one_or_more = replace(prepared, shards=visited or (at,))
        return Plan(split.strategy, split.reason, at_one_or_more, visited=visited)
    extracts, final, strategy, reason = survey.extracts, survey.final, "gather", "all-rows"
    if split is not None:
        both = _sizes(asked, shards, (*split.extracts, *extracts), scheduler)
        number = len(split.extracts)
        sizes = {shard: found[:number] for shard, found in both.items()}
        whole = {shard: found[number:] for shard, found in both.items()}
        most = max(_LITTLE, _FACTOR * sum(map(sum, whole.values())))
        if sum(map(sum, sizes.values())) <= most:
            extracts, final = split.extracts, split.final
            strategy, reason = split.strategy, split.reason
        else:  # a join can have many more rows than its tables
            split, sizes, visited = None, whole, shards
    else:
        sizes = _sizes(asked, shards, extracts, scheduler)
    gather = Gather(shards, topology.sharded, max_gather_bytes, split)
    gathering = replace(prepared, shards=(merging,), answer=replace(prepared.answer, gather=gather))
    return Plan(strategy, reason, gathering, extracts, sizes, final, visited)


def _refuse_unknown(topology: Topology, tables: Sequence[str]) -> None:
    """Refuse tables that are not known to be whole on every shard, if the topology names those."""
    if topology.reference is None:
        return
    known = {name.lower() for name in topology.reference}
    for table in tables:
        if table.lower() not in known and table.rpartition(".")[2].lower() not in known:
            named = [*(one.name for one in topology.sharded), *topology.reference]
            raise MergeRefusedError(
                "unknown-table",
                f"it reads {table}, which the topology names neither as sharded nor as a reference "
                f"table; it names {', '.join(map(repr, named))}",
            )


def _spread(shards: Sequence[Any], sql: str) -> Any:
    """Choose one: not always the same, but the same for the same text."""
    return shards[zlib.crc32(sql.encode("utf-8")) % len(shards)]


def _sizes(
    asked: AskedQuery, shards: Sequence[str], extracts: Sequence[Extract], scheduler: Any
) -> dict[str, Sequence[int]]:
    """Return about how many bytes each shard has of each extract, if its columns are the same."""
    name, query = "estimate-sharded-sql", asked.query
    found = run_tasks(estimate_shard, asked.topology, shards, query, name, scheduler, extracts)
    for sizes in found:
        if isinstance(sizes, ShardSQLError):
            raise sizes
    return {
        shard: [n if one.is_on(shard) else 0 for n, one in zip(sizes, extracts, strict=True)]
        for shard, sizes in zip(shards, found, strict=True)
    }
