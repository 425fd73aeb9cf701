"""Less of a query's answer: what a driver needs to leave rows and columns on the server."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import pyarrow as pa

from dask_shardsql.engine.drivers.base import Driver, Query
from dask_shardsql.sql.predicates import Field, Node, Term

__all__ = ["Aggregate", "Computed", "Narrowing", "NarrowingDriver"]


@dataclass(frozen=True)
class Aggregate:
    """One value made of those of many rows.

    Parameters
    ----------
    function : {"sum", "count", "min", "max"}
        How; texts are ordered by their code points.
    of : Field, Arithmetic or value
        Of what; rows are counted by a value that is no NULL.
    name : str
        The value's own.
    type_name : str
        Its type.
    """

    function: str
    of: Term
    name: str
    type_name: str


@dataclass(frozen=True)
class Computed:
    """A column that is computed of others.

    Parameters
    ----------
    name : str
        Its name.
    of : Field, Arithmetic or value
        What is computed.
    type_name : str
        The type that it is given.
    arrow_type : pyarrow.DataType
        The same in Arrow.
    """

    name: str
    of: Term
    type_name: str
    arrow_type: pa.DataType


@dataclass(frozen=True)
class Narrowing:
    """What is read of a query's answer.

    Parameters
    ----------
    columns : tuple of str
        Names of the columns, at least one.
    where : tuple of Node
        Conditions that all rows meet.
    limit : int, optional
        How many rows at the most, whichever.
    is_counted : bool, default False
        Whether only the number of these rows is wanted, in a column ``count``.
    aggregates : tuple of Aggregate
        What is wanted of these rows, instead of them.
    groups : tuple of Field
        Columns by which they are grouped for that; the first is then called ``key_0``.
    computed : tuple of Computed
        Columns that there are besides those of the query, each also for those behind it.
    """

    columns: tuple[str, ...]
    where: tuple[Node, ...] = ()
    limit: int | None = None
    is_counted: bool = False
    aggregates: tuple[Aggregate, ...] = ()
    groups: tuple[Field, ...] = ()
    computed: tuple[Computed, ...] = ()


@runtime_checkable
class NarrowingDriver(Driver, Protocol):
    """A driver whose databases can do that, exactly as pandas would with Arrow's types."""

    def narrow(self, query: Query, narrowing: Narrowing) -> Query:
        """Return the query for less of its answer; its columns keep their types."""
