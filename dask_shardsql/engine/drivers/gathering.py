"""What a driver must do so that one of its databases can answer for the rows of all shards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from dask_shardsql.engine.drivers.base import Columns, Driver, OnBatch, Query
from dask_shardsql.errors import ConfigurationError
from dask_shardsql.topology import ShardedTable

__all__ = ["Extract", "Gathering", "GatheringDriver", "Survey", "TargetFailedError", "can_gather"]


@dataclass(frozen=True)
class Extract:
    """The rows and columns of one sharded table that a query needs.

    Parameters
    ----------
    table : str
        The table's name, without its schema.
    key : str
        Its shard key.
    select : str
        The query that reads them on a shard.
    into : str
        Where the driver's own database takes them.
    in_text : bool
        Whether they travel in their text form.
    full_name : str
        The table's name with its schema, quoted.
    types : tuple
        For each column its name and the driver's own description of its type.
    """

    table: str
    key: str
    select: str
    into: str
    in_text: bool = False
    full_name: str = ""
    types: tuple[tuple[str, str, str], ...] = ()


@dataclass(frozen=True)
class Survey:
    """What a query reads of the sharded tables.

    Parameters
    ----------
    text : str
        The query, with its parameters merged into it.
    extracts : tuple of Extract
        Nothing where it reads reference tables only.
    may_be_union : bool
        Whether, as far as the server knows, each row may stand for itself: the query reads no view
        of a sharded table, has no aggregate or window, and calls no function of the user's.
    final : str
        What is run over all that is gathered.
    """

    text: str
    extracts: tuple[Extract, ...]
    may_be_union: bool
    final: str = ""


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
        """Make room for it, and put this database's own rows there."""

    def take(self, source: Any, count: Callable[[int], None]) -> None:
        """Copy all extracts from another shard's connection; `count` hears of bytes, and may raise.

        What this database itself says is a :class:`TargetFailedError`; all else is the source's.
        """

    def read(self, resolve: Callable[[Columns], Columns], on_batch: OnBatch) -> None:
        """Run the query over all of it; as :meth:`Driver.read`. The transaction then ends."""

    def abandon(self) -> None:
        """End the transaction, or close the connection; never raises."""


@runtime_checkable
class GatheringDriver(Driver, Protocol):
    """A driver whose databases can gather."""

    def gathering(
        self, connection: Any, query: Query, sharded: Sequence[ShardedTable]
    ) -> Gathering:
        """Begin to gather for a query."""

    def estimate(self, connection: Any, query: Query, extracts: Sequence[Extract]) -> list[int]:
        """Return about how many bytes each of the extracts has here."""


def can_gather(driver: Driver) -> GatheringDriver:
    """Return the driver, if its databases can gather.

    Raises
    ------
    ConfigurationError
        They cannot.
    """
    if isinstance(driver, GatheringDriver):
        return driver
    raise ConfigurationError(
        f"driver {driver.name!r} cannot answer a query over the rows of all shards yet: leave out "
        "merge='global', for the union of the shards' answers"
    )
