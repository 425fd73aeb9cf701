"""``dask-shardsql explain``: how a query would be answered, to stdout."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from dask_shardsql.cli.asking import asking, ending, named_topology, parse_params
from dask_shardsql.explanation import explain

__all__ = ["run_explain"]


def run_explain(
    sql: str,
    *,
    topology: Path | None,
    params: Sequence[str],
    scheduler: str | None,
    merge: str,
    max_gather_bytes: str | None,
    analyze: bool,
    as_json: bool,
) -> None:
    """Write how a query would be answered.

    Parameters
    ----------
    sql, topology, params, scheduler, merge, max_gather_bytes
        As of :func:`dask_shardsql.cli.query.run_query`.
    analyze : bool
        Whether to run it as well, and measure.
    as_json : bool
        Whether to write it as JSON, not as text for people.

    Raises
    ------
    InputError
        The options do not fit each other, or name something that is not there.
    ShardSQLError
        Whatever :func:`dask_shardsql.explain` raises.
    OSError
        The scheduler cannot be reached, or the answer cannot be written.
    """
    values = parse_params(params, sql)
    shards = named_topology(topology)
    console = Console(stderr=True, highlight=False) if analyze else None
    with ending():
        with asking(shards, scheduler, console) as client:
            found = explain(
                sql,
                shards,
                values,
                merge=merge,
                max_gather_bytes=max_gather_bytes,
                analyze=analyze,
                scheduler=client,
            )
        print(json.dumps(found.to_dict(), indent=2) if as_json else found, flush=True)
