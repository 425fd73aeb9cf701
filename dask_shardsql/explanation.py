"""``explain``: how a query would be answered, without running it."""

from __future__ import annotations

import html
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dask_shardsql.config import Settings
from dask_shardsql.errors import MergeRefusedError
from dask_shardsql.merge import Plan, check_merge, plan, refuse_too_much
from dask_shardsql.progress import ShardEvent, listen
from dask_shardsql.query import PreparedQuery, ask, describe, why_not_a_union
from dask_shardsql.split import SplitOptions
from dask_shardsql.topology import Topology
from dask_shardsql.union import read_tables

__all__ = ["Explanation", "explain"]

_PATIENCE = 5.0
_MEANINGS = {
    "direct": "one shard answers",
    "union": "the answers of the shards, one behind the other",
    "merge": "one shard merges what each answers to a part of it",
    "gather": "one shard gathers what is needed of the others' rows, and answers",
    "refuse": "there is no answer",
}


@dataclass(frozen=True)
class Explanation:
    """How a query would be answered; ``print`` it, or look at it in a notebook.

    Parameters
    ----------
    sql : str
        The query.
    merge : {"union", "global"}
        What was asked for.
    strategy : {"direct", "union", "merge", "gather", "refuse"}
        How it would be answered.
    reason : str
        A word for why, which stays the same: see the README.
    shards : tuple of str
        Names of the shards that answer.
    visited : tuple of str
        Names of the shards that may have rows for it, by what it demands of the shard keys.
    gathered : tuple of dict
        For each sharded table that is gathered: ``table``; ``select``, which reads what is needed
        of it on a shard; and ``bytes``, about how many there are on each, as its planner sees it.
    final : str
        What the shard that gathers then runs.
    max_gather_bytes : int
        How much may be gathered.
    message : str
        Why there is no answer, and what to do; or what is to be said of the union that was asked
        for.
    actual : tuple of dict
        What was measured, if it was run: for each ``shard`` and ``part`` ("answer", or "partial"
        for what it had for that) the number of ``rows``, their ``bytes`` (as Arrow holds an answer,
        as a partial was sent from server to server), and the ``seconds`` until it was there.
    """

    sql: str
    merge: str
    strategy: str
    reason: str
    shards: tuple[str, ...] = ()
    visited: tuple[str, ...] = ()
    gathered: tuple[dict[str, Any], ...] = ()
    final: str = ""
    max_gather_bytes: int = 0
    message: str = ""
    actual: tuple[dict[str, Any], ...] = ()

    @property
    def gathered_bytes(self) -> int:
        """About how many bytes would be gathered."""
        return sum(sum(table["bytes"].values()) for table in self.gathered)

    def to_dict(self) -> dict[str, Any]:
        """Return the same as plain values, which JSON can hold."""
        found = {**vars(self), "shards": list(self.shards), "visited": list(self.visited)}
        found["actual"] = list(self.actual)
        found["gathered"] = [{**one, "bytes": dict(one["bytes"])} for one in self.gathered]
        return found

    def __str__(self) -> str:
        return "\n".join(f"{name:<10}{value}" for name, value in self._lines())

    def _repr_html_(self) -> str:
        rows = (
            f"<tr><th>{html.escape(name)}</th><td><pre>{html.escape(value)}</pre></td></tr>"
            for name, value in self._lines()
        )
        return f"<table>{''.join(rows)}</table>"

    def _lines(self) -> list[tuple[str, str]]:
        indent = "\n" + " " * 10
        strategy = f"{self.strategy} ({self.reason}): {_MEANINGS[self.strategy]}"
        lines = [("query", self.sql.strip().replace("\n", indent)), ("strategy", strategy)]
        if self.message:
            lines.append(("because" if self.strategy == "refuse" else "but", self.message))
        if self.shards:
            lines.append(("on", ", ".join(self.shards)))
        if self.shards and set(self.visited) != set(self.shards):
            visited = ", ".join(self.visited) or "none: no row can meet the conditions"
            lines.append(("rows of", visited))
        for table in self.gathered:
            sizes = ", ".join(f"{shard} {size:,}" for shard, size in table["bytes"].items())
            select = table["select"].strip().replace("\n", indent)
            name = "gathers" if self.strategy == "gather" else "each"
            lines.append((name, f"{select}{indent}about bytes: {sizes}"))
        if self.gathered:
            total = f"{self.gathered_bytes:,} bytes of {self.max_gather_bytes:,} (max_gather_bytes)"
            is_too_much = self.gathered_bytes > self.max_gather_bytes
            lines.append(("in all", total + (", which is refused" if is_too_much else "")))
            lines.append(("then", self.final.strip().replace("\n", indent)))
        for one in self.actual:
            facts = f"{one['rows']:,} rows, {one['bytes']:,} bytes, {one['seconds']:.3f} s"
            lines.append((one["part"], f"{one['shard']}: {facts}"))
        return lines


def explain(
    sql: str,
    topology: Topology | None = None,
    params: Sequence[Any] | Mapping[str, Any] | None = None,
    *,
    merge: str = "union",
    max_gather_bytes: str | int | None = None,
    analyze: bool = False,
    scheduler: Any = None,
) -> Explanation:
    """Return how a query would be answered; nothing of it is run, if that is not asked for.

    Parameters
    ----------
    sql : str
        One query.
    topology : Topology, optional
        The shards; by default the one that ``shardsql.topology`` in ``dask.config`` names.
    params : sequence or mapping, optional
        The parameters' values; they are shown, as the servers' planners have seen them.
    merge : {"union", "global"}, default "union"
        As in :func:`collect`.
    max_gather_bytes : str or int, optional
        As in :func:`collect`.
    analyze : bool, default False
        Whether to run it, and measure rows, bytes and time for each shard.
    scheduler : str, callable or Client, optional
        Where the shards are asked, as in ``dask.compute``.

    Returns
    -------
    Explanation
        What it says when it is printed; ``to_dict()`` gives the same as plain values.

    Raises
    ------
    ShardSQLError
        As :func:`collect` does for a query that is wrong. One that cannot be answered with
        ``merge="global"`` is no error here: its strategy is ``"refuse"``.

    Examples
    --------
    >>> print(explain("SELECT count(*) FROM orders", topology, merge="global"))  # doctest: +SKIP
    """
    check_merge(merge, SplitOptions())
    settings = Settings.current(max_gather_bytes=max_gather_bytes)
    asked = ask(sql, topology, params, settings=settings)
    if merge == "union":
        prepared = describe(asked, scheduler) if analyze else None
        why = why_not_a_union(asked)
        message = "" if why is None else f"it is not what one database would answer: {why}"
        actual = () if prepared is None else _measured(prepared, scheduler)
        return Explanation(
            asked.query.sql,
            merge,
            "union",
            "asked-for",
            asked.shards,
            asked.shards,
            message=message,
            actual=actual,
        )
    most = settings.max_gather_bytes
    try:
        found = plan(asked, most, scheduler)
    except MergeRefusedError as error:
        return Explanation(asked.query.sql, merge, "refuse", error.reason, message=error.message)
    if analyze:
        refuse_too_much(found, most)
    return Explanation(
        asked.query.sql,
        merge,
        found.strategy,
        found.reason,
        found.prepared.shards,
        found.visited,
        tuple(_gathered(found)),
        found.final,
        most,
        actual=_measured(found.prepared, scheduler) if analyze else (),
    )


def _measured(prepared: PreparedQuery, scheduler: Any) -> tuple[dict[str, Any], ...]:
    """Run a query, and return what each shard's part of it was."""
    query_id = prepared.answer.query.query_id
    heard: dict[tuple[str, str], ShardEvent] = {}

    def hear(event: ShardEvent) -> None:
        if event.query_id == query_id and event.state == "finished":
            heard[event.part, event.shard] = event

    with listen(hear):
        read_tables(prepared, None, scheduler)
        deadline = time.monotonic() + _PATIENCE  # a worker's events come a moment later
        while time.monotonic() < deadline and any(
            ("answer", shard) not in heard for shard in prepared.shards
        ):
            time.sleep(0.01)
    return tuple(
        {
            "shard": shard,
            "part": part,
            "rows": event.rows,
            "bytes": event.nbytes,
            "seconds": event.seconds,
        }
        for (part, shard), event in sorted(heard.items(), key=lambda one: (-len(one[0][0]), one[0]))
    )


def _gathered(found: Plan) -> list[dict[str, Any]]:
    return [
        {
            "table": extract.table,
            "select": extract.select,
            "bytes": {shard: sizes[number] for shard, sizes in found.sizes.items()},
        }
        for number, extract in enumerate(found.extracts)
    ]
