"""The shards, their servers and the tables that are sharded over them: frozen value objects.

A topology opens no connection, and can be made where no database can be reached.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import stat
import tomllib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dask_shardsql.errors import TopologyError
from dask_shardsql.secret import PASSWORD_REFERENCES
from dask_shardsql.server import Server, as_table, known_keys, server_from_mapping
from dask_shardsql.shard import Shard, ShardedTable
from dask_shardsql.sharding.options import function_from_options

__all__ = ["MERGING", "Server", "Shard", "ShardedTable", "Topology"]

MERGING = "merge"
"""What the database that merges is called where shards have names, if it is none of them."""


@dataclass(frozen=True)
class Topology:
    """All shards, with their servers, and the tables that are sharded over them.

    Parameters
    ----------
    shards : tuple of Shard
        At least one; their names differ.
    sharded : tuple of ShardedTable, optional
        The sharded tables.
    reference : tuple of str, optional
        Names of the reference tables, which are whole on every shard; a name without a schema
        stands for tables of any. By default all that are not sharded are; if they are named,
        ``merge="global"`` refuses queries that read others.
    merging : Server, optional
        Of a database that is no shard, and has the same schema and all reference tables: where
        ``merge="global"`` brings rows of several shards together. One of the shards by default.

    Raises
    ------
    TopologyError
        When there is no shard, two have one name, a sharding function names one that is none, or
        what merges is of another driver.

    Examples
    --------
    >>> Topology.from_dsns(["service=shard1", "host=db2 dbname=shop"], sharded={"orders": "id"})
    Topology(shards=['s1' at service shard1, 's2' at db2:5432], sharded={'orders': 'id'})
    """

    shards: tuple[Shard, ...]
    sharded: tuple[ShardedTable, ...] = ()
    reference: tuple[str, ...] | None = None
    merging: Server | None = None

    def __post_init__(self) -> None:
        for name, kind in (("shards", Shard), ("sharded", ShardedTable)):
            if not all(isinstance(entry, kind) for entry in getattr(self, name)):
                raise TopologyError(f"{name} must be a tuple of {kind.__name__} objects")
        if not self.shards:
            raise TopologyError("a topology needs at least one shard, none is named")
        _unique("shards", [shard.name for shard in self.shards])
        named = [table.name for table in self.sharded]
        _unique("sharded tables", named)
        _refuse_no_names(self.reference, "reference")
        if both := sorted({*named} & {*(self.reference or ())}):
            raise TopologyError(f"table {both[0]!r} is named as sharded, and as a reference table")
        names = {shard.name for shard in self.shards}
        if not isinstance(self.merging, Server | None):
            raise TopologyError("merging must be a Server, the one that merges")
        merging = self.merging
        if merging is not None and MERGING in names:
            raise TopologyError(
                f"a shard cannot be named {MERGING!r} beside a database that merges, which errors "
                "call so: give it another name"
            )
        for shard in self.shards:
            if merging is not None and shard.primary.driver != merging.driver:
                raise TopologyError(
                    f"the database that merges is of driver {merging.driver!r}, and shard "
                    f"{shard.name!r} of {shard.primary.driver!r}: name one of the shards' own "
                    "kind, or none"
                )
        for table in self.sharded:
            if table.function is not None and (other := table.function.shard_names - names):
                known = ", ".join(repr(shard.name) for shard in self.shards[:20])
                raise TopologyError(
                    f"the sharding function of table {table.name!r} names the shards "
                    f"{', '.join(map(repr, sorted(other)))}, which the topology does not have: "
                    f"name its own, {known}"
                )

    @classmethod
    def from_dsns(
        cls,
        dsns: Sequence[str] | Mapping[str, str],
        *,
        sharded: Mapping[str, str | Mapping[str, Any]] | None = None,
        names: Sequence[str] | None = None,
        reference: Sequence[str] | None = None,
        merge_dsn: str | None = None,
    ) -> Topology:
        """Make a topology from one connection string per shard.

        Parameters
        ----------
        dsns : sequence of str, or mapping of shard name to str
            libpq keywords, URLs or service names: see :meth:`Server.from_dsn`.
        sharded : mapping of str to (str or mapping), optional
            Name of each sharded table, and its shard key; or ``{"key": ..., "function": ...}`` and
            what the function takes: a kind (``"hash"``), a function of yours, or a
            :class:`ShardingFunction`.
        names : sequence of str, optional
            Names of the shards, when `dsns` is a sequence; ``s1``, ``s2``, ... by default.
        reference : sequence of str, optional
            Names of the reference tables; all that are not sharded by default.
        merge_dsn : str, optional
            Connection string of the database that merges; see `merging` of :class:`Topology`.

        Raises
        ------
        TopologyError
            No shard, two of one name, or a connection string that cannot be read.
        """
        if isinstance(dsns, str) or not isinstance(dsns, Sequence | Mapping):
            raise TopologyError(
                "dsns needs one connection string per shard, in a list or by name in a mapping, "
                f"not a {type(dsns).__name__}"
            )
        if isinstance(dsns, Mapping):
            named = dict(dsns)
        else:
            if isinstance(names, str) or not isinstance(names, Sequence | None):
                raise TopologyError("names must be a list of the shards' names")
            labels = list(names) if names is not None else [f"s{i + 1}" for i in range(len(dsns))]
            if len(labels) != len(dsns):
                raise TopologyError(f"{len(labels)} names for {len(dsns)} connection strings")
            _unique("shards", labels)
            named = dict(zip(labels, dsns, strict=True))
        shards = {name: {"dsn": dsn} for name, dsn in named.items()}
        mapping: dict[str, Any] = {"shards": shards, "sharded": sharded or {}}
        if reference is not None:
            mapping["reference"] = reference
        if merge_dsn is not None:
            mapping["merge"] = {"dsn": merge_dsn}
        return cls.from_mapping(mapping, source="from_dsns")

    @classmethod
    def from_toml(cls, path: str | os.PathLike[str]) -> Topology:
        """Read a topology from a TOML file.

        Parameters
        ----------
        path : path
            The file: ``[[shards]]`` tables (``name``, and ``dsn`` or connection keywords), an
            optional ``[defaults]`` table for all of them, and ``[sharded]`` with ``table = "key"``,
            or with a table that has the ``key``, a ``function``, and what that takes. The path of
            a lookup table's file starts from the directory of this one. ``[merge]`` is the database
            that merges, described like a shard, and ``reference`` a list of the reference tables;
            see `merging` and `reference` of :class:`Topology`.

        Raises
        ------
        TopologyError
            The file cannot be read, a key is unknown, or it holds a literal password and others
            than its owner may read it.
        """
        if not isinstance(path, str | os.PathLike) or "\0" in str(path):
            raise TopologyError(f"the path of a TOML file is needed, not {path!r}")
        file = Path(path)
        problem, parsed = "", {}
        try:
            with file.open("rb") as stream:
                mode = stat.S_IMODE(os.fstat(stream.fileno()).st_mode)
                parsed = tomllib.load(stream)
        except OSError as error:
            problem = f"{error.strerror}: {file}"
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            where = re.search(r"\(at .*\)$", str(error))
            problem = f"{file} is not valid TOML {where.group() if where else ''}".rstrip()
        if problem:  # raised here, so that no chained exception repeats the file's text
            raise TopologyError(f"cannot read the topology: {problem}")
        topology = cls._from_mapping(parsed, str(file), file.parent)
        if topology.has_literal_secrets and os.name == "posix" and mode & 0o077:
            raise TopologyError(
                f"{file} holds a literal password and others may read it (mode {mode:04o}). "
                f"Run 'chmod 600 {file}', or name the password by "
                f"{', '.join(PASSWORD_REFERENCES)}, service or passfile"
            )
        return topology

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any], *, source: str = "mapping") -> Topology:
        """Make a topology from nested mappings of the same shape as the TOML file.

        Parameters
        ----------
        mapping : mapping
            ``shards``, ``defaults``, ``sharded``, ``reference`` and ``merge``. The path of a lookup
            table's file starts from the current directory.
        source : str, optional
            What errors call it.

        Raises
        ------
        TopologyError
            A key is unknown or missing; the message names it, and the shard or table.
        """
        return cls._from_mapping(mapping, source, Path())

    @classmethod
    def _from_mapping(cls, mapping: Mapping[str, Any], source: str, directory: Path) -> Topology:
        mapping = as_table(mapping, source)
        known_keys(mapping, ("defaults", "merge", "reference", "sharded", "shards"), source)
        defaults = as_table(mapping.get("defaults", {}), f"[defaults] of {source}")
        if "name" in defaults:
            raise TopologyError(f"[defaults] of {source} cannot give every shard one 'name'")
        entries = mapping.get("shards", [])
        if not isinstance(entries, Mapping | list | tuple):
            raise TopologyError(f"'shards' of {source} must be a list of tables: [[shards]]")
        if isinstance(entries, Mapping):
            entries = [
                {**as_table(entry, f"shard {name!r} of {source}"), "name": name}
                for name, entry in entries.items()
            ]
        shards = []
        for number, raw in enumerate(entries, start=1):
            entry = as_table(raw, f"shard {number} of {source}")
            name = entry.pop("name", None)
            if not isinstance(name, str):
                raise TopologyError(f'shard {number} of {source} has no name: add name = "..."')
            server = server_from_mapping(entry, f"shard {name!r} of {source}", defaults)
            shards.append(Shard(name, (server,)))
        tables = []
        for table, value in as_table(mapping.get("sharded", {}), f"[sharded] of {source}").items():
            where = f"[sharded] {table!r} of {source}"
            fields = {"key": value} if isinstance(value, str) else as_table(value, where)
            key = fields.pop("key", None)
            if not fields.get("function"):
                known_keys(fields, ("key", "function"), where)
            if not isinstance(key, str) or not key:
                raise TopologyError(f'{where} names no shard key: write {table} = "column"')
            names = [shard.name for shard in shards]
            function = function_from_options(fields, where, names, directory)
            tables.append(ShardedTable(str(table), key, function))
        merging = None
        if "merge" in mapping:
            where = f"[merge] of {source}"
            merging = server_from_mapping(as_table(mapping["merge"], where), where, defaults)
        reference = mapping.get("reference")
        _refuse_no_names(reference, f"'reference' of {source}")
        named = None if reference is None else tuple(reference)
        return cls(tuple(shards), tuple(tables), named, merging)

    @property
    def _servers(self) -> list[Server]:
        servers = [server for shard in self.shards for server in shard.servers]
        return servers if self.merging is None else [*servers, self.merging]

    @property
    def has_literal_secrets(self) -> bool:
        """Whether any server's password is written out instead of referred to."""
        return any(server.secrets for server in self._servers)

    @functools.cached_property
    def fingerprint(self) -> str:
        """A short hash of everything but the secrets' text; tasks carry it instead of a DSN."""
        plain = [(shard.name, list(map(_identity, shard.servers))) for shard in self.shards]
        tables = [
            (table.name, table.key, table.function and table.function.token())
            for table in self.sharded
        ]
        more = [self.reference, self.merging and _identity(self.merging)]
        return hashlib.sha256(json.dumps([plain, tables, *more]).encode()).hexdigest()[:16]

    def shard(self, name: str) -> Shard:
        """Return the shard of that name.

        Raises
        ------
        TopologyError
            There is none; the message lists those there are.
        """
        for shard in self.shards:
            if shard.name == name:
                return shard
        known = ", ".join(repr(shard.name) for shard in self.shards[:20])
        raise TopologyError(f"no shard is named {name!r}; the topology has {known}", shard=name)

    def server_of(self, name: str) -> Server:
        """Return the primary server of a shard; or, for ``"merge"``, that of what merges.

        Raises
        ------
        TopologyError
            There is no such shard.
        """
        if name == MERGING and self.merging is not None:
            return self.merging
        return self.shard(name).primary

    def __dask_tokenize__(self) -> Any:
        return ("dask_shardsql.Topology", self.fingerprint)

    def __repr__(self) -> str:
        shown = [f"{shard.name!r} at {shard.primary.address}" for shard in self.shards[:8]]
        if len(self.shards) > 8:
            shown.append(f"... {len(self.shards)} in all")
        tables = {
            table.name: (table.key, table.function) if table.function else table.key
            for table in self.sharded
        }
        more = f", reference={list(self.reference)}" if self.reference is not None else ""
        more += f", merging at {self.merging.address}" if self.merging is not None else ""
        return f"Topology(shards=[{', '.join(shown)}], sharded={tables}{more})"


def _refuse_no_names(names: Any, what: str) -> None:
    is_list = isinstance(names, list | tuple | None)
    if not is_list or not all(isinstance(name, str) and name for name in names or ()):
        raise TopologyError(f"{what} must be a list of tables' names, not {names!r}")


def _identity(server: Server) -> tuple[Any, ...]:
    """Return all that a server is, but for the text of its secrets."""
    return (
        server.driver,
        server.role,
        server.keywords,
        [(key, secret.digest()) for key, secret in server.secrets],
        server.password and (server.password.kind, server.password.target),
    )


def _unique(what: str, names: Sequence[str]) -> None:
    twice = sorted(name for name, count in Counter(names).items() if count > 1)
    if twice:
        raise TopologyError(
            f"two {what} are named {', '.join(map(repr, twice))}; names must differ"
        )
