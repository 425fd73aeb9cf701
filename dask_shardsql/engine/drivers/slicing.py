"""What a driver must do so that the answer of one shard can be read in slices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from dask_shardsql.engine.drivers.base import Driver, Query
from dask_shardsql.errors import ConfigurationError

__all__ = ["Part", "Slicing", "SlicingDriver", "can_slice"]


@dataclass(frozen=True)
class Slicing:
    """By what an answer is cut.

    Parameters
    ----------
    method : {"ctid", "range", "hash"}
        By where a table's rows are stored; by ranges of a column; by the hash of a column.
    column : str, optional
        The column's name; none for ``ctid``.
    table : str, optional
        The quoted name of the one table that the query reads whole.
    """

    method: str
    column: str | None = None
    table: str | None = None


@dataclass(frozen=True)
class Part:
    """One slice of an answer: the `number`-th, from 0, of `slices`."""

    slicing: Slicing
    number: int
    slices: int


@runtime_checkable
class SlicingDriver(Driver, Protocol):
    """A driver that can give several sessions one snapshot, and cut a query."""

    def measure(self, connection: Any, query: Query, slicing: Slicing) -> int:
        """Return about how many bytes there are to read; raise where it cannot be cut so."""

    def hold(
        self, connection: Any, query: Query, slicing: Slicing, slices: int
    ) -> tuple[str, tuple[str, ...]]:
        """Return the name of a snapshot, and the slices' bounds as they are in this snapshot.

        The snapshot is kept, and so is the shape of the tables that the query reads, until the
        connection is closed.
        """

    def cut(self, query: Query, part: Part, snapshot: str, bounds: tuple[str, ...]) -> Query:
        """Return the query that reads one slice in that snapshot."""

    def snapshot_is_lost(self, connection: Any, snapshot: str) -> bool:
        """Whether the snapshot cannot be used any more."""


def can_slice(driver: Driver) -> SlicingDriver:
    """Return the driver, if it can cut a query.

    Raises
    ------
    ConfigurationError
        It cannot.
    """
    if isinstance(driver, SlicingDriver):
        return driver
    raise ConfigurationError(
        f"driver {driver.name!r} cannot split a shard, as its sessions cannot share a snapshot: "
        "leave out partitions_per_shard and partition_size, for one partition a shard"
    )
