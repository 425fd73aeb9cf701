"""What a driver must do so that one of its databases can answer for the rows of all shards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, BinaryIO, NamedTuple, Protocol, runtime_checkable

from dask_shardsql.engine.drivers.base import Columns, Driver, OnBatch, Query
from dask_shardsql.errors import ConfigurationError, SchemaMismatchError
from dask_shardsql.topology import Server, ShardedTable

__all__ = [
    "Estimate",
    "Extract",
    "Gathering",
    "GatheringDriver",
    "GathersOnly",
    "PlanningDriver",
    "Sending",
    "Split",
    "Splitting",
    "Survey",
    "TargetFailedError",
    "can_gather",
    "refuse_other_view",
]


@dataclass(frozen=True)
class Extract:
    """The rows and columns of one table that a query needs.

    Parameters
    ----------
    table : str
        The table's name, without its schema.
    key : str
        Its shard key; empty for a reference table, of which one shard's rows are gathered.
    select : str
        The query that reads them on a shard.
    into : str
        Where the driver's own database takes them.
    in_text : bool
        Whether they travel in their text form.
    full_name : str
        The table's name with its schema, quoted.
    types : tuple
        For each column its name and the driver's own descriptions of its type.
    described : tuple of Column
        The columns that the answer must have, if that is to be compared.
    settings : tuple of str
        Statements that a session needs to read it.
    database : str
        What the databases must agree on.
    shards : frozenset of str, optional
        The shards that may have any of it; all by default.
    definition : str
        What a view is defined as.
    is_whole : bool
        Whether the query reads whole rows, of which the type is the table's.
    """

    table: str
    key: str
    select: str
    into: str
    in_text: bool = False
    full_name: str = ""
    types: tuple[tuple[str | None, ...], ...] = ()
    described: Columns = ()
    settings: tuple[str, ...] = ()
    database: str = ""
    shards: frozenset[str] | None = None
    definition: str = ""
    is_whole: bool = False

    def is_on(self, shard: str) -> bool:
        """Whether that shard may have any of it."""
        return self.shards is None or shard in self.shards

    def describe(self, columns: Columns) -> Extract:
        """Return the same, which must have these columns."""
        return replace(self, described=columns)


class Estimate(NamedTuple):
    """About how much there is of something."""

    rows: int = 0
    nbytes: int = 0


@dataclass(frozen=True)
class Split:
    """A query in parts.

    Parameters
    ----------
    settings : tuple of str
        Statements that a session needs for its part.
    extracts : tuple of Extract
        What each shard is asked for.
    final : str
        What is run over all that they answer.
    text : str
        The whole query, in which nothing depends on what else a shard has.
    tables : tuple of Extract
        Of all tables and views, what is read by it; with the types that all shards must have.
    strategy : {"direct", "union", "merge", "gather"}
        Whether one shard answers; the shards' answers are the answer; or what the extracts are.
    reason : str
        A word for why, which stays the same.
    shards : frozenset of str, optional
        The shards that may have rows for it; all by default.
    conditions : tuple of str
        Which conditions leave these.
    """

    settings: tuple[str, ...]
    extracts: tuple[Extract, ...]
    final: str
    text: str = ""
    tables: tuple[Extract, ...] = ()
    strategy: str = ""
    reason: str = ""
    shards: frozenset[str] | None = None
    conditions: tuple[str, ...] = ()


@dataclass(frozen=True)
class Survey:
    """What a query reads of the sharded tables.

    Parameters
    ----------
    text : str
        The query, with its parameters merged into it.
    extracts : tuple of Extract
        Nothing where it reads reference tables only.
    final : str
        What is run over all that is gathered.
    split : Split, optional
        How it can be answered with less.
    others : tuple of str
        Names of the other tables that it reads, with their schemas if there are any.
    tables : tuple of Extract
        What else must be alike on all databases.
    has_own : bool, default False
        Whether this database's own rows need not be moved.
    why : str
        A word for why it can not be answered with less, which stays the same.
    columns : tuple of Column
        The columns of the query.
    """

    text: str
    extracts: tuple[Extract, ...]
    final: str = ""
    split: Split | None = None
    others: tuple[str, ...] = ()
    tables: tuple[Extract, ...] = ()
    has_own: bool = False
    why: str = "all-rows"
    columns: Columns = ()


class TargetFailedError(Exception):
    """The database that gathers has raised `error`, not the one that the rows come from."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


@runtime_checkable
class Gathering(Protocol):
    """One query in the database that gathers for it; in one transaction, which it begins."""

    def survey(self) -> Survey:
        """Begin, and return what is needed of the sharded tables."""

    def prepare(self) -> None:
        """Make room for it."""

    def add_own(self) -> int:
        """Put this database's own rows there; return how many that were just now."""

    def take(self, source: Any, count: Callable[[int], None]) -> None:
        """Copy all extracts from another shard's connection; `count` hears of bytes, and may raise.

        What this database itself says is a :class:`TargetFailedError`; all else is the source's.
        """

    def read(self, resolve: Callable[[Columns], Columns], on_batch: OnBatch) -> None:
        """Run the query over all of it; as :meth:`Driver.read`. The transaction then ends."""

    def abandon(self) -> None:
        """End the transaction, or close the connection; never raises."""


@runtime_checkable
class Splitting(Protocol):
    """A :class:`Gathering` that knows how to do with less than what is needed of whole tables."""

    def split(self, shards: Sequence[str]) -> Split | str:
        """Return how, or a word for why not, after the survey; nothing comes after it.

        `shards` are the names of all.
        """


@runtime_checkable
class Sending(Protocol):
    """How a shard sends what is gathered, so that several can at a time.

    A :class:`Gathering` that is one is not asked to `take`, but to `receive`.
    """

    extracts: Sequence[Extract]

    def begin(self, source: Any, extracts: Sequence[Extract]) -> None:
        """Begin, on a connection to a shard, and make sure that it sends what is expected."""

    def send(self, source: Any, extract: Extract, file: BinaryIO) -> None:
        """Write what the shard has of an extract."""

    def end(self, source: Any) -> None:
        """End on that connection; never raises."""

    def cancel(self, source: Any) -> None:
        """Ask its server to stop; another thread is using the connection."""

    def receive(self, extract: Extract, stream: Any) -> int:
        """Take what another shard has written, from a file; return how many rows there were."""


@runtime_checkable
class GatheringDriver(Driver, Protocol):
    """A driver whose databases can gather."""

    def gathering(
        self, connection: Any, query: Query, sharded: Sequence[ShardedTable]
    ) -> Gathering:
        """Begin to gather for a query."""

    def merging(self, connection: Any, query: Query, split: Split, shard: str) -> Gathering:
        """Begin to merge what is answered to a query in parts, at the shard of that name."""

    def estimate(
        self, connection: Any, query: Query, extracts: Sequence[Extract]
    ) -> list[Estimate]:
        """Return about how much each of the extracts has here, where it is what it was elsewhere.

        One without a query that reads it is compared only.
        """


@runtime_checkable
class PlanningDriver(Driver, Protocol):
    """A driver whose databases tell how much they expect a query to give."""

    def planned(self, connection: Any, query: Query) -> Estimate:
        """Return it, as the planner sees it; nothing is run."""


class GathersOnly:
    """What a driver has whose surveys never say that a query can be answered in parts."""

    def merging(self, connection: Any, query: Query, split: Split, shard: str) -> Gathering:
        """Refuse."""
        raise ConfigurationError("this driver cannot merge a query in parts: gather its rows")


def can_gather(driver: Driver, elsewhere: Server | None = None) -> GatheringDriver:
    """Return the driver, if its databases can gather: also in one that is no shard.

    Raises
    ------
    ConfigurationError
        They cannot.
    """
    if elsewhere is not None and isinstance(driver, GathersOnly):
        raise ConfigurationError(
            f"rows of driver {driver.name!r} are merged in memory: the topology must name no "
            "database that merges (merge_dsn, or [merge] in its file)"
        )
    if isinstance(driver, GatheringDriver):
        return driver
    raise ConfigurationError(
        f"driver {driver.name!r} cannot answer a query over the rows of all shards yet: leave out "
        "merge='global', for the union of the shards' answers"
    )


def refuse_other_view(extract: Extract, definition: str) -> None:
    """Refuse a view that is defined in another way than where the query was looked at.

    Raises
    ------
    SchemaMismatchError
        It is; or it is a view on one of them only.
    """
    if " ".join(definition.split()) != " ".join(extract.definition.split()):
        here, there = (text or "(it is no view)" for text in (definition, extract.definition))
        raise SchemaMismatchError(
            f"{extract.full_name or extract.table} is defined in another way than on the shard "
            f"that this one is compared with. Here:\n{here}\nThere:\n{there}\nDefine it alike "
            "on all shards"
        )
