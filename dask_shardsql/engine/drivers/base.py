"""The protocol every driver follows, and where drivers are found."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any, Protocol, runtime_checkable

import pyarrow as pa

from dask_shardsql.config import Settings
from dask_shardsql.errors import ConfigurationError, ShardSQLError
from dask_shardsql.sql.types import Column
from dask_shardsql.topology import Server

__all__ = [
    "AskAgain",
    "Columns",
    "Driver",
    "OnBatch",
    "Query",
    "Stage",
    "StagedDriver",
    "driver_named",
]

ENTRY_POINT_GROUP = "dask_shardsql.drivers"

Columns = tuple[Column, ...]
OnBatch = Callable[[pa.RecordBatch], None]


@dataclass(frozen=True)
class Query:
    """What to run on a shard, and how.

    Parameters
    ----------
    sql : str
        One query, in the dialect of the shards.
    params : sequence or mapping, optional
        Values of its placeholders, in the driver's own paramstyle. Without it a ``%`` is a ``%``.
    query_id : str
        Name of this run, seen in ``pg_stat_activity.application_name``.
    unrepresentable : {"raise", "null"}
        What becomes of a value that its Arrow type cannot hold.
    find_not_null : bool
        Whether the description is to say which columns can hold no NULL.
    snapshot : str, optional
        Name of a snapshot of this shard that another session has exported and still holds.
    batch_bytes : int, default 64 MiB
        How large a record batch may become, where a driver reads in batches that large.
    settings : tuple of str
        Statements that the text needs in its transaction: what names in it stand for.
    run : str
        Id of one task's run of it, where that can be cancelled by itself.
    """

    sql: str
    params: Sequence[Any] | Mapping[str, Any] | None = None
    query_id: str = ""
    unrepresentable: str = "raise"
    find_not_null: bool = False
    snapshot: str | None = None
    batch_bytes: int = 64 << 20
    settings: tuple[str, ...] = ()
    run: str = ""

    @property
    def owner(self) -> str:
        """Whom connections are lent to: what is cancelled with all that they run."""
        return self.run or self.query_id


class AskAgain(Exception):  # noqa: N818 - not an error: whoever asks at once catches it
    """The rows were asked for in a form that they turn out not to have: ask, but not at once."""


@runtime_checkable
class Driver(Protocol):
    """One kind of database.

    A driver holds no connection and no state: one object serves every thread. Whatever its
    module raises, :meth:`translate` makes an error of this package of it.
    """

    name: str

    def check(self, sql: str) -> str:
        """Return the text of the one query in `sql`; raise ``StatementError`` for any other."""

    def quote_identifier(self, name: str) -> str:
        """Return `name` quoted as an identifier."""

    def connect(self, server: Server, password: str | None, settings: Settings) -> Any:
        """Open a connection; it may be used by one thread at a time."""

    def is_usable(self, connection: Any) -> bool:
        """Whether an idle connection can be expected to work; no round trip."""

    def describe(self, connection: Any, query: Query) -> Columns:
        """Return the columns of the answer without reading a row."""

    def read(
        self,
        connection: Any,
        query: Query,
        resolve: Callable[[Columns], Columns],
        on_batch: OnBatch,
    ) -> None:
        """Read the whole answer.

        `resolve` gets the described columns before any row is read, and returns them with the
        Arrow types to deliver, or raises. `on_batch` gets the rows as they come, in record batches
        of these columns; while it does not return, no more rows are received than fit in buffers
        of a fixed size. When an exception leaves this method, its own or one that a callable
        raised, the connection is either clean or closed.
        """

    def cancel(self, connection: Any) -> None:
        """Ask the server to stop what `connection` runs; called from another thread."""

    def close(self, connection: Any) -> None:
        """Close the connection; never raises."""

    def translate(self, error: Exception, query: Query | None = None) -> ShardSQLError | None:
        """Return this package's error for one of the driver module's, or None if it is not one."""


@runtime_checkable
class Stage(Protocol):
    """One query on one connection, each step asked for before its answer is waited for."""

    def describe(self) -> Columns:
        """Wait for the description."""

    def request(self, columns: Columns, on_batch: OnBatch) -> None:
        """Ask for the rows as these columns; `on_batch` gets them when they are read."""

    def fileno(self) -> int:
        """Return a descriptor that can be read from once there is an answer."""

    def advance(self, *, whole: bool) -> bool:
        """Take what has come; return whether that was all.

        If `whole`, wait for all of it; else take no more than a few hundred KiB: where there is
        more, :attr:`is_large` is then true.
        """

    @property
    def is_large(self) -> bool:
        """Whether there are more rows than a few."""

    def abandon(self) -> None:
        """Leave the connection clean, or closed where it is busy; never raises."""


@runtime_checkable
class StagedDriver(Driver, Protocol):
    """A driver that can read in steps, so that one thread can ask many servers at once."""

    def script(self, connection: Any, query: Query) -> Any:
        """Return what is to be sent for a query, which is the same for all connections."""

    def stage(
        self, connection: Any, query: Query, script: Any, *, at_once: bool = False
    ) -> Stage | None:
        """Send what describes the query; None where this connection cannot do so.

        If `at_once`, the rows may be asked for with it, from what is known of the same text;
        whatever is called then raises :class:`AskAgain` where they have another form.
        """


def _undisturbed(load: Callable[[], Any]) -> Any:
    """Return what is loaded by a thread of its own.

    Ctrl-C in the middle of an import leaves modules half made, which fail from then on. It stops
    the thread that waits; the import comes to its end.
    """
    with ThreadPoolExecutor(1, "dask_shardsql-load") as threads:
        found = threads.submit(load)
        try:
            return found.result()
        except KeyboardInterrupt:
            threads.shutdown(wait=False)
            raise


@functools.cache
def driver_named(name: str) -> Driver:
    """Return the driver of that name.

    Parameters
    ----------
    name : str
        The name of an entry point in the group ``dask_shardsql.drivers``.

    Raises
    ------
    ConfigurationError
        There is none, or its module cannot be imported in this process.
    """
    found = {entry.name: entry for entry in entry_points(group=ENTRY_POINT_GROUP)}
    if name not in found:
        raise ConfigurationError(
            f"there is no driver {name!r} in this process; installed are "
            f"{', '.join(sorted(found)) or 'none'}"
        )
    try:
        driver: Driver = _undisturbed(found[name].load)()
    except ImportError as error:
        raise ConfigurationError(
            f"driver {name!r} cannot be loaded here: {error}. Install what it needs in every "
            "process that reads the shards"
        ) from error
    return driver
