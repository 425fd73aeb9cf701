"""``merge="global"``: how to answer as one database that holds all the rows would."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from dask_shardsql.engine.drivers.gathering import Extract, can_gather
from dask_shardsql.engine.gather import Gather, estimate_shard, survey_shard, too_much
from dask_shardsql.errors import ConfigurationError, ShardSQLError
from dask_shardsql.query import AskedQuery, PreparedQuery, describe
from dask_shardsql.run import run_tasks

__all__ = ["MERGES", "prepare_global", "refuse_unknown_merge"]

MERGES = ("global", "union")


def refuse_unknown_merge(merge: str, options: dict[str, Any]) -> None:
    """Refuse a mode that there is none of, and options that do not go with it.

    Raises
    ------
    ConfigurationError
        That is so.
    """
    if merge not in MERGES:
        raise ConfigurationError(
            f"merge is {merge!r}, where {' or '.join(map(repr, MERGES))} is needed"
        )
    given = [name for name, value in options.items() if value is not None]
    if merge == "global" and given:
        raise ConfigurationError(
            f"{given[0]} says something of single shards, and merge='global' gives one answer over "
            "all of them: leave it out"
        )


def prepare_global(asked: AskedQuery, max_gather_bytes: int, scheduler: Any) -> PreparedQuery:
    """Return the query as one shard is to answer it, with what it gathers for that.

    Parameters
    ----------
    asked : AskedQuery
        The query, for all shards.
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
    topology, shards, query = asked.topology, asked.shards, asked.query
    can_gather(asked.driver)
    prepared = describe(asked, scheduler)
    if len(shards) == 1:
        return prepared
    if not topology.sharded:
        raise ConfigurationError(
            "merge='global' needs to know which tables are sharded: name them in the topology, as "
            "in sharded={'orders': 'o_orderkey'}"
        )
    at = _spread(shards, query.sql)
    (survey,) = run_tasks(
        survey_shard, topology, [at], query, "survey-sharded-sql", scheduler, topology.sharded
    )
    if isinstance(survey, ShardSQLError):
        raise survey
    alone = replace(prepared, shards=(at,))
    if not survey.extracts:
        return alone  # reference tables only: they are whole on every shard
    from dask_shardsql.sql.split import is_union  # sqlglot takes a while

    keys = {extract.table: extract.key for extract in survey.extracts}
    if not survey.through_views and is_union(survey.text, keys):
        return prepared
    _refuse_too_much(asked, survey.extracts, max_gather_bytes, scheduler)
    gather = Gather(shards, topology.sharded, max_gather_bytes)
    return replace(alone, answer=replace(prepared.answer, gather=gather))


def _spread(shards: Sequence[Any], sql: str) -> Any:
    """Choose one: not always the same, but the same for the same text."""
    return shards[zlib.crc32(sql.encode("utf-8")) % len(shards)]


def _refuse_too_much(
    asked: AskedQuery, extracts: Sequence[Extract], most: int, scheduler: Any
) -> None:
    found = run_tasks(
        estimate_shard,
        asked.topology,
        asked.shards,
        asked.query,
        "estimate-sharded-sql",
        scheduler,
        extracts,
    )
    for sizes in found:
        if isinstance(sizes, ShardSQLError):
            raise sizes
    if (total := sum(map(sum, found))) > most:
        tables = [extract.table for extract in extracts]
        raise too_much(f"about {total:,} bytes", most, tables)
