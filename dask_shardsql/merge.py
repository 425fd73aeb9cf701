"""``merge="global"``: how to answer as one database that holds all the rows would."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from dask_shardsql.engine.drivers.base import Columns
from dask_shardsql.engine.drivers.gathering import (
    Estimate,
    Extract,
    Split,
    Survey,
    can_gather,
)
from dask_shardsql.engine.gather import Gather, estimate_shard, survey_shard, too_much
from dask_shardsql.errors import (
    ConfigurationError,
    ConnectionFailedError,
    MergeRefusedError,
    ShardSQLError,
)
from dask_shardsql.query import AskedQuery, PreparedQuery, describe
from dask_shardsql.run import run_tasks
from dask_shardsql.split import SplitOptions
from dask_shardsql.topology import MERGING, Topology

__all__ = ["Plan", "check_merge", "plan", "prepare", "refuse_too_much"]

MERGES = ("global", "union")
# how much more than the tables a split query may move, by estimates that are high for groups;
# and how little is never more
_FACTOR, _LITTLE = 8, 1 << 20


def check_merge(
    merge: str,
    options: SplitOptions,
    max_gather_bytes: str | int | None = None,
    **of_shards: Any,
) -> None:
    """Refuse a mode that there is none of, and options that do not go with it.

    Parameters
    ----------
    merge : str
        The mode.
    options : SplitOptions
        How shards are to be split.
    max_gather_bytes : str or int, optional
        How much may be gathered.
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
    if merge == "union" and max_gather_bytes is not None:
        raise ConfigurationError(
            "max_gather_bytes says how much merge='global' may bring together, and a union brings "
            "nothing together: leave it out, or ask for merge='global'"
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
    visited : tuple of str
        The shards that may have rows for it.
    conditions : tuple of str
        Which conditions leave these, if they are not all.
    extracts : tuple of Extract
        What is gathered.
    sizes : mapping
        By visited shard, about how much of each extract there is.
    final : str
        What the shard that gathers then runs.
    merging : str
        Name of the database that gathers, if its own rows need not be moved.
    """

    strategy: str
    reason: str
    prepared: PreparedQuery
    visited: tuple[str, ...]
    conditions: tuple[str, ...] = ()
    extracts: tuple[Extract, ...] = ()
    sizes: Mapping[str, Sequence[Estimate]] = field(default_factory=dict)
    final: str = ""
    merging: str = ""

    @property
    def gathered_bytes(self) -> int:
        """About how many bytes are gathered."""
        return _bytes_of(sizes for shard, sizes in self.sizes.items() if shard != self.merging)


def plan(asked: AskedQuery, max_gather_bytes: int, scheduler: Any) -> Plan:
    """Find out how a query can be answered as one database would; parameters as of `prepare`."""
    topology, shards = asked.topology, asked.shards
    can_gather(asked.driver, elsewhere=topology.merging)
    if len(shards) == 1:
        return Plan("direct", "one-shard", describe(asked, scheduler), shards)
    if not topology.sharded:
        also = "" if topology.merging is None else ", also where a database that merges is named,"
        raise ConfigurationError(
            f"merge='global' needs to know{also} which tables are sharded: name them in the "
            "topology, as in sharded={'orders': 'o_orderkey'} or in a section [sharded] of its file"
        )
    merging, survey = _surveyed(asked, scheduler)
    _refuse_unknown(topology, survey.others)
    described = {merging: survey.columns}
    if not survey.extracts:
        prepared = replace(asked, shards=(merging,), described_by=(merging,)).agree(described)
        return Plan("direct", "reference-tables", prepared, (merging,))
    split = survey.split
    if split is not None and split.strategy in ("direct", "union"):
        return _of_shards(asked, split, scheduler)
    found = _in_parts(asked, survey, described, scheduler)
    if found is None:
        split, wanted = None, (*survey.extracts, *survey.tables)
        reason = survey.why if survey.split is None else "smaller"
        prepared, sizes = _asked(asked, wanted, described, scheduler)
        sizes = _of_first(sizes, len(survey.extracts))
        found = Plan("gather", reason, prepared, shards, (), survey.extracts, sizes, survey.final)
    gather = Gather(shards, topology.sharded, max_gather_bytes, split)
    answer = replace(found.prepared.answer, gather=gather)
    prepared = replace(found.prepared, shards=(merging,), answer=answer)
    return replace(found, prepared=prepared, merging=merging if survey.has_own else "")


def _of_shards(asked: AskedQuery, split: Split, scheduler: Any) -> Plan:
    """Return how a query is answered whose answer is those of the shards; without rows, by one."""
    visited, conditions = _visited(asked, split)
    query = replace(asked.query, sql=split.text, params=None, settings=split.settings)
    asked = replace(asked, query=query, shards=visited or _in_turn(asked)[:1])
    only_compared = [replace(one, select="") for one in split.tables]
    prepared, _ = _asked(asked, only_compared, {}, scheduler)
    return Plan(split.strategy, split.reason, prepared, visited, conditions)


def _in_parts(
    asked: AskedQuery, survey: Survey, described: Mapping[str, Columns], scheduler: Any
) -> Plan | None:
    """Return how a query is answered in parts; None if whole tables are less to gather."""
    if (split := survey.split) is None:
        return None
    visited, conditions = _visited(asked, split)
    wanted, number = (*split.extracts, *split.tables), len(split.extracts)
    prepared, both = _asked(replace(asked, shards=visited), wanted, described, scheduler)
    of_tables = _bytes_of(found[number:] for found in both.values())
    sizes = _of_first(both, number)
    if _bytes_of(sizes.values()) > max(_LITTLE, _FACTOR * of_tables):
        return None  # a join can have many more rows than its tables
    way = split.strategy, split.reason
    return Plan(*way, prepared, visited, conditions, split.extracts, sizes, split.final)


def _visited(asked: AskedQuery, split: Split) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the shards that may have rows, and the conditions that leave them, if not all."""
    if split.shards is None or split.shards.issuperset(asked.shards):
        return asked.shards, ()
    return tuple(filter(split.shards.__contains__, asked.shards)), split.conditions


def _of_first(sizes: Mapping[str, Sequence[Estimate]], number: int) -> dict[str, Any]:
    return {shard: found[:number] for shard, found in sizes.items()}


def _surveyed(asked: AskedQuery, scheduler: Any) -> tuple[str, Survey]:
    """Let one database survey a query; the next one, where that cannot be reached."""
    topology, shards = asked.topology, asked.shards
    chosen = _in_turn(asked) if topology.merging is None else (MERGING,)
    more = (topology.sharded, shards)
    for at in chosen:
        name = "survey-sharded-sql"
        (found,) = run_tasks(survey_shard, topology, [at], asked.query, name, scheduler, *more)
        if not isinstance(found, ConnectionFailedError):
            break
    if isinstance(found, Survey):
        return at, found
    if not isinstance(found, MergeRefusedError):
        describe(asked, scheduler)  # which says how the other shards fare, if it is the same
    raise found


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


def _in_turn(asked: AskedQuery) -> tuple[str, ...]:
    """Return the shards from one on: not always the same, but the same for the same text."""
    first = zlib.crc32(asked.query.sql.encode("utf-8")) % len(asked.shards)
    return (*asked.shards[first:], *asked.shards[:first])


def _asked(
    asked: AskedQuery,
    extracts: Sequence[Extract],
    described: Mapping[str, Columns],
    scheduler: Any,
) -> tuple[PreparedQuery, dict[str, Sequence[Estimate]]]:
    """Let shards describe a query, and tell how much they have of each extract.

    Those whose tables, or descriptions, are not those that others have `described` are refused.
    """
    name = "estimate-sharded-sql"
    found = run_tasks(
        estimate_shard, asked.topology, asked.shards, asked.query, name, scheduler, extracts
    )
    answers = dict(zip(asked.shards, found, strict=True))
    outcomes: dict[str, Any] = dict(described)
    sizes: dict[str, Sequence[Estimate]] = {}
    for shard, answer in answers.items():
        if isinstance(answer, ShardSQLError):
            outcomes[shard] = answer
            continue
        outcomes[shard], estimates = answer
        sizes[shard] = [
            size if one.is_on(shard) else Estimate()
            for size, one in zip(estimates, extracts, strict=True)
        ]
    return replace(asked, described_by=tuple(outcomes)).agree(outcomes), sizes


def _bytes_of(sizes: Iterable[Sequence[Estimate]]) -> int:
    return sum(one.nbytes for each in sizes for one in each)
