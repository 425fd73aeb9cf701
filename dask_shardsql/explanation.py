"""``explain``: how a query, or a DataFrame, would be answered, without running it."""

from __future__ import annotations

import copy
import html
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from textwrap import shorten
from typing import Any, overload

import dask.dataframe as dd

from dask_shardsql.config import Settings
from dask_shardsql.engine.gather import expect_shard
from dask_shardsql.errors import ConfigurationError, MergeRefusedError, ShardSQLError
from dask_shardsql.frame.explained import explained, is_frame
from dask_shardsql.merge import Plan, check_merge, plan
from dask_shardsql.progress import ShardEvent, listen
from dask_shardsql.query import AskedQuery, PreparedQuery, ask, describe, why_not_a_union
from dask_shardsql.run import run_tasks
from dask_shardsql.split import SplitOptions
from dask_shardsql.topology import Topology
from dask_shardsql.union import read_tables

__all__ = ["Explanation", "FrameExplanation", "explain"]

_PATIENCE = 5.0
_INDENT = "\n" + " " * 10
_BECAUSE = {
    "all-rows": "rows of several shards meet",
    "function": "it calls a function, an operator or an aggregate of yours",
    "recursive": "it is recursive",
    "row-width": "the rows of a part of it would be too wide for a table",
    "smaller": "the parts in which each shard could answer would be larger than the tables",
    "too-long": "its text is too long to be looked into",
    "volatile": "it calls what each shard would decide for itself, as random()",
    "whole-rows": "it reads a table's rows as values of one type",
}
_MEANINGS = {
    "direct": "one shard answers",
    "union": "the answers of the shards, one behind the other",
    "merge": "one shard merges what each answers to a part of it",
    "gather": "one shard gathers what is needed of the others' rows, and answers",
    "refuse": "there is no answer",
}


class _Printed:
    """Lines, each under a name, to print or to look at in a notebook."""

    def to_dict(self) -> dict[str, Any]:
        """Return the same as plain values, which JSON can hold."""
        found = copy.deepcopy(vars(self))
        return {key: list(v) if isinstance(v, tuple) else v for key, v in found.items()}

    def __str__(self) -> str:
        return "\n".join(f"{name:<10}{value}" for name, value in self._lines())

    def _repr_html_(self) -> str:
        rows = (
            f"<tr><th>{html.escape(name)}</th><td><pre>{html.escape(value)}</pre></td></tr>"
            for name, value in self._lines()
        )
        return f"<table>{''.join(rows)}</table>"

    def _lines(self) -> list[tuple[str, str]]:
        raise NotImplementedError


@dataclass(frozen=True)
class Explanation(_Printed):
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
    pruned : tuple of str
        Names of the others.
    conditions : tuple of str
        What it demands, if that leaves some out.
    estimated : dict
        By shard that is read, about how many ``rows`` and ``bytes`` it has for it, as its planner
        sees it; none where a database does not tell.
    gathered : tuple of dict
        For each part that is gathered: ``table``; ``select``, which reads what is needed of it on
        a shard; and ``rows`` and ``bytes``, about how many there are on each shard that is asked.
    gathered_bytes : int
        About how many bytes are moved; without those that are where they are gathered.
    final : str
        What is then run; or what each shard runs, if that is not the query as it was written.
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
    pruned: tuple[str, ...] = ()
    conditions: tuple[str, ...] = ()
    estimated: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    gathered: tuple[dict[str, Any], ...] = ()
    gathered_bytes: int = 0
    final: str = ""
    max_gather_bytes: int = 0
    message: str = ""
    actual: tuple[dict[str, Any], ...] = ()

    def _lines(self) -> list[tuple[str, str]]:
        indent = _INDENT
        strategy = f"{self.strategy} ({self.reason}): {_MEANINGS[self.strategy]}"
        lines = [("query", self.sql.strip().replace("\n", indent)), ("strategy", strategy)]
        if self.strategy == "gather":
            because = _BECAUSE.get(self.reason, "its form is not understood")
            lines.append(("because", because))
        if self.message:
            lines.append(("because" if self.strategy == "refuse" else "but", self.message))
        if self.shards:
            lines.append(("on", ", ".join(self.shards)))
        if self.shards and set(self.visited) != set(self.shards):
            visited = ", ".join(self.visited) or "none: no row can meet the conditions"
            lines.append(("rows of", visited))
        if self.pruned:
            asked = shorten("; ".join(self.conditions), 1000, placeholder=" ...")
            lines.append(("not of", f"{', '.join(self.pruned)}: the query asks for {asked}"))
        for part in self.gathered:
            select = part["select"].strip().replace("\n", indent)
            name = "gathers" if self.strategy == "gather" else "each"
            sizes = [(shard, part["rows"][shard], size) for shard, size in part["bytes"].items()]
            lines.append((name, f"{select}{indent}{_about(sizes)}"))
        if self.gathered:
            total = f"about {self.gathered_bytes:,} bytes moved"
            total += f", of {self.max_gather_bytes:,} (max_gather_bytes)"
            is_too_much = self.gathered_bytes > self.max_gather_bytes
            lines.append(("in all", total + (", which is refused" if is_too_much else "")))
            lines.append(("then", self.final.strip().replace("\n", indent)))
        else:
            if self.final:
                lines.append(("each", self.final.strip().replace("\n", indent)))
            if self.estimated:
                sizes = [
                    (shard, one["rows"], one["bytes"]) for shard, one in self.estimated.items()
                ]
                lines.append(("expected", _about(sizes)))
        for one in self.actual:
            facts = f"{one['rows']:,} rows, {one['bytes']:,} bytes, {one['seconds']:.3f} s"
            lines.append((one["part"], f"{one['shard']}: {facts}"))
        return lines


@dataclass(frozen=True)
class FrameExplanation(_Printed):
    """What is asked of shards for a dask DataFrame; ``print`` it, or look at it in a notebook.

    Parameters
    ----------
    reads : tuple of dict
        For each read: what it ``asks_for`` ("rows", or their "count", "reductions" or "groups");
        ``sql``, which each shard gets, with its placeholders; the ``shards``; the number of
        ``partitions``, and what they are ``sliced_by``, if each shard has several: the slice is
        then a part of the SQL as well; the ``columns`` that come; the ``conditions`` that became
        SQL; the ``limit`` for each partition; ``because``: why no condition can become SQL.
    left : tuple of dict
        What is left to dask: each ``operation``, of ``ddf``, and ``because``, why.
    message : str
        What is to be said of it.
    """

    reads: tuple[dict[str, Any], ...]
    left: tuple[dict[str, str], ...] = ()
    message: str = ""

    def _lines(self) -> list[tuple[str, str]]:
        lines = [] if self.reads else [("reads", "nothing of shards")]
        for read in self.reads:
            lines.append(("each", read["sql"].strip().replace("\n", _INDENT)))
            lines.append(("asked for", f"{read['asks_for']}: {', '.join(read['columns'])}"))
            on, by = ", ".join(read["shards"]), read["sliced_by"]
            sliced = f", in {read['partitions']} partitions by {by}" if by else ""
            lines.append(("on", on + sliced))
            lines += [("where", one) for one in read["conditions"]]
            if read["because"]:
                lines.append(("as it is", read["because"]))
        lines += [("in dask", f"{one['operation']}{_INDENT}{one['because']}") for one in self.left]
        return lines + ([("but", self.message)] if self.message else [])


@overload
def explain(
    sql: str,
    topology: Topology | None = None,
    params: Sequence[Any] | Mapping[str, Any] | None = None,
    *,
    merge: str = "union",
    max_gather_bytes: str | int | None = None,
    analyze: bool = False,
    scheduler: Any = None,
) -> Explanation: ...
@overload
def explain(sql: dd.DataFrame | dd.Series | dd.Index | dd.Scalar) -> FrameExplanation: ...
def explain(
    sql: Any,
    topology: Topology | None = None,
    params: Sequence[Any] | Mapping[str, Any] | None = None,
    *,
    merge: str = "union",
    max_gather_bytes: str | int | None = None,
    analyze: bool = False,
    scheduler: Any = None,
) -> Explanation | FrameExplanation:
    """Return how a query would be answered; nothing of it is run, if that is not asked for.

    Parameters
    ----------
    sql : str, or dask DataFrame, Series, Index or Scalar
        One query; or, and then nothing else, what is made of :func:`read_sharded_sql`.
    topology : Topology, optional
        The shards; by default the one that ``shardsql.topology`` in ``dask.config`` names.
    params : sequence or mapping, optional
        The parameters' values; they are shown, as the servers' planners have seen them.
    merge : {"union", "global"}, default "union"
        As in :func:`collect`.
    max_gather_bytes : str or int, optional
        As in :func:`collect`.
    analyze : bool, default False
        Whether to run it, if it is not refused, and measure rows, bytes and time for each shard.
    scheduler : str, callable or Client, optional
        Where the shards are asked, as in ``dask.compute``.

    Returns
    -------
    Explanation or FrameExplanation
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
    if is_frame(sql):
        options = (topology, params, max_gather_bytes, scheduler)
        if merge != "union" or analyze or any(one is not None for one in options):
            raise ConfigurationError("explain takes nothing else beside a dask DataFrame")
        reads, left, message = explained(sql)
        return FrameExplanation(tuple(reads), tuple(left), message)
    check_merge(merge, SplitOptions(), max_gather_bytes)
    settings = Settings.current(max_gather_bytes=max_gather_bytes)
    asked = ask(sql, topology, params, settings=settings)
    query = asked.query
    if merge == "union":
        why = why_not_a_union(asked)
        message = "" if why is None else f"it is not what one database would answer: {why}"
        prepared = describe(asked, scheduler)
        found = Plan("union", "asked-for", prepared, asked.shards)
        return _explained(asked, merge, found, scheduler, analyze=analyze, message=message)
    most = settings.max_gather_bytes
    try:
        found = plan(asked, most, scheduler)
    except MergeRefusedError as error:
        return Explanation(query.sql, merge, "refuse", error.reason, message=error.message)
    analyze = analyze and found.gathered_bytes <= most
    return _explained(asked, merge, found, scheduler, analyze=analyze, max_gather_bytes=most)


def _explained(
    asked: AskedQuery, merge: str, found: Plan, scheduler: Any, *, analyze: bool, **more: Any
) -> Explanation:
    prepared, query = found.prepared, found.prepared.answer.query
    own_text = found.final or (query.sql if query.sql != asked.query.sql else "")
    return Explanation(
        asked.query.sql,
        merge,
        found.strategy,
        found.reason,
        prepared.shards,
        found.visited,
        tuple(shard for shard in asked.shards if shard not in found.visited)
        if found.conditions
        else (),
        found.conditions,
        _estimated(found, scheduler),
        tuple(_gathered(found)),
        found.gathered_bytes,
        own_text,
        actual=_measured(prepared, scheduler) if analyze else (),
        **more,
    )


def _estimated(found: Plan, scheduler: Any) -> dict[str, dict[str, int]]:
    """Return about how much each shard has for a query, which those tell that answer it."""
    sizes = {shard: list(each) for shard, each in found.sizes.items()}
    if not sizes:
        prepared = found.prepared
        shards, query = prepared.shards, prepared.answer.query
        each = run_tasks(
            expect_shard, prepared.topology, shards, query, "expect-sharded-sql", scheduler
        )
        for error in each:
            if isinstance(error, ShardSQLError):
                raise error
        sizes = {s: [one] for s, one in zip(shards, each, strict=True) if one is not None}
    return {
        shard: {"rows": sum(one.rows for one in each), "bytes": sum(one.nbytes for one in each)}
        for shard, each in sizes.items()
    }


def _about(sizes: Sequence[tuple[str, int, int]]) -> str:
    """Return about how much there is, in words."""
    each = (f"{shard} {rows:,} rows, {nbytes:,} bytes" for shard, rows, nbytes in sizes)
    return f"about: {'; '.join(each)}"


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


def _gathered(found: Plan) -> Iterator[dict[str, Any]]:
    for number, extract in enumerate(found.extracts):
        on = {shard: each[number] for shard, each in found.sizes.items() if extract.is_on(shard)}
        rows = {shard: size.rows for shard, size in on.items()}
        nbytes = {shard: size.nbytes for shard, size in on.items()}
        yield {"table": extract.table, "select": extract.select, "rows": rows, "bytes": nbytes}
