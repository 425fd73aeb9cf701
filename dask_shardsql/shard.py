"""A shard, and a table that is split over the shards: frozen value objects."""

from __future__ import annotations

from dataclasses import dataclass

from dask_shardsql.errors import TopologyError
from dask_shardsql.server import Server
from dask_shardsql.sharding.function import ShardingFunction

__all__ = ["Shard", "ShardedTable"]


@dataclass(frozen=True)
class Shard:
    """One disjoint slice of the sharded tables, with the servers that hold it.

    Parameters
    ----------
    name : str
        Its name, unique in the topology.
    servers : tuple of Server
        Exactly one of them is the primary.
    """

    name: str
    servers: tuple[Server, ...]

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name.strip():
            raise TopologyError(f"a shard needs a name that is not empty, not {self.name!r}")
        if not all(isinstance(server, Server) for server in self.servers):
            raise TopologyError(f"the servers of shard {self.name!r} must be Server objects")
        primaries = [server for server in self.servers if server.role == "primary"]
        if len(primaries) != 1:
            raise TopologyError(
                f"shard {self.name!r} has {len(primaries)} primary servers; it needs exactly one",
                shard=self.name,
            )

    @property
    def primary(self) -> Server:
        """The server that takes the reads and writes of this shard."""
        return next(server for server in self.servers if server.role == "primary")


@dataclass(frozen=True)
class ShardedTable:
    """A table that is split over the shards by the values of one column.

    Parameters
    ----------
    name : str
        The table's name, with its schema where needed (``sales.orders``).
    key : str
        The shard key: the column whose value says on which shard a row is.
    function : ShardingFunction, optional
        On which shard a row is, by its shard key; unknown by default.

    Raises
    ------
    TopologyError
        The function is none.
    """

    name: str
    key: str
    function: ShardingFunction | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.function, ShardingFunction | None):
            raise TopologyError(
                f"the function of sharded table {self.name!r} must be a sharding function, such as "
                f"ShardByModulo or ShardByCallable(your_own), not {self.function!r}"
            )

    def is_sharded_like(self, other: ShardedTable) -> bool:
        """Whether rows of both tables with equal shard keys are on one shard.

        That is so where both have the same sharding function, or neither names one: tables
        without are taken to share one. Whether keys of different types are ever equal is another
        question.

        Parameters
        ----------
        other : ShardedTable
            The other table.
        """
        return self.function == other.function
