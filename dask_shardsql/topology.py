"""The shards, their servers and the tables that are sharded over them: frozen value objects.

A topology opens no connection, and can be made where no database can be reached. Literal
secrets are kept apart from the other connection keywords, so that all the rest can be shown,
hashed and sent.
"""

from __future__ import annotations

import difflib
import functools
import hashlib
import json
import os
import re
import stat
import tomllib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dask_shardsql.dsn import LIBPQ_HINTS, POSTGRESQL, check_address, is_libpq_keyword, parse_dsn
from dask_shardsql.errors import TopologyError
from dask_shardsql.secret import PASSWORD_REFERENCES, PasswordReference, Secret, is_secret_keyword

__all__ = ["Server", "Shard", "ShardedTable", "Topology"]

Keyword = str | int | float | bool


@dataclass(frozen=True)
class Server:
    """One endpoint that serves a shard.

    Parameters
    ----------
    driver : str, default "postgresql"
        Name of the driver: ``postgresql``, ``sqlite``, ``duckdb``, ``dbapi``, or one that an
        installed package offers as entry point ``dask_shardsql.drivers``.
    keywords : tuple of (str, value)
        Connection keywords without any secret, sorted by name.
    secrets : tuple of (str, Secret)
        Literal secrets by keyword. Only for local use: they are never part of a task.
    password : PasswordReference, optional
        Where the process that connects finds the password.
    role : str, default "primary"
        ``primary`` or ``replica``.
    """

    driver: str = POSTGRESQL
    keywords: tuple[tuple[str, Keyword], ...] = ()
    secrets: tuple[tuple[str, Secret], ...] = ()
    password: PasswordReference | None = None
    role: str = "primary"

    @classmethod
    def from_dsn(cls, dsn: str) -> Server:
        """Make a server from a connection string.

        Parameters
        ----------
        dsn : str
            libpq keywords (``host=db2 dbname=shop``, ``service=shard1``), a URL
            (``postgresql://db3/shop``), or ``sqlite:///file``, ``duckdb:///file``. See the
            PostgreSQL manual, section 34.1.1.

        Raises
        ------
        TopologyError
            When it cannot be read. The text itself is never repeated, as it may hold a password.
        """
        return _server({"dsn": dsn}, "the connection string")

    @property
    def address(self) -> str:
        """Where the server is, for people: host and port, service or file; never a login."""
        known = dict(self.keywords)
        if "service" in known and "host" not in known and "hostaddr" not in known:
            return f"service {known['service']}"
        if self.driver == POSTGRESQL or "host" in known:
            host = known.get("host") or known.get("hostaddr") or "local socket"
            port = known.get("port", 5432 if self.driver == POSTGRESQL else None)
            return f"{host}:{port}" if port else str(host)
        return str(known.get("database", self.driver))

    def __repr__(self) -> str:
        known = " ".join(f"{key}={value}" for key, value in self.keywords)
        masked = "".join(f" {key}=***" for key, _ in self.secrets)
        reference = f" {self.password.kind}=..." if self.password else ""
        return f"<Server {self.driver} {self.role}: {known}{masked}{reference}>"


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
    """

    name: str
    key: str


@dataclass(frozen=True)
class Topology:
    """All shards, with their servers, and the tables that are sharded over them.

    Parameters
    ----------
    shards : tuple of Shard
        At least one; their names differ.
    sharded : tuple of ShardedTable, optional
        The sharded tables. Every other table is a reference table: whole on every shard.

    Raises
    ------
    TopologyError
        When there is no shard, or two have one name.

    Examples
    --------
    >>> Topology.from_dsns(["service=shard1", "host=db2 dbname=shop"], sharded={"orders": "id"})
    Topology(shards=['s1' at service shard1, 's2' at db2:5432], sharded={'orders': 'id'})
    """

    shards: tuple[Shard, ...]
    sharded: tuple[ShardedTable, ...] = ()

    def __post_init__(self) -> None:
        if not self.shards:
            raise TopologyError("a topology needs at least one shard, none is named")
        _unique("shards", [shard.name for shard in self.shards])
        _unique("sharded tables", [table.name for table in self.sharded])

    @classmethod
    def from_dsns(
        cls,
        dsns: Sequence[str] | Mapping[str, str],
        *,
        sharded: Mapping[str, str] | None = None,
        names: Sequence[str] | None = None,
    ) -> Topology:
        """Make a topology from one connection string per shard.

        Parameters
        ----------
        dsns : sequence of str, or mapping of shard name to str
            libpq keywords, URLs or service names: see :meth:`Server.from_dsn`.
        sharded : mapping of str to str, optional
            Name of each sharded table, and its shard key.
        names : sequence of str, optional
            Names of the shards, when `dsns` is a sequence; ``s1``, ``s2``, ... by default.

        Raises
        ------
        TopologyError
            No shard, two of one name, or a connection string that cannot be read.
        """
        if isinstance(dsns, str):
            raise TopologyError("dsns needs one connection string per shard in a list, not a text")
        if isinstance(dsns, Mapping):
            named = dict(dsns)
        else:
            labels = list(names) if names is not None else [f"s{i + 1}" for i in range(len(dsns))]
            if len(labels) != len(dsns):
                raise TopologyError(f"{len(labels)} names for {len(dsns)} connection strings")
            _unique("shards", labels)
            named = dict(zip(labels, dsns, strict=True))
        shards = {name: {"dsn": dsn} for name, dsn in named.items()}
        return cls.from_mapping({"shards": shards, "sharded": sharded or {}}, source="from_dsns")

    @classmethod
    def from_toml(cls, path: str | os.PathLike[str]) -> Topology:
        """Read a topology from a TOML file.

        Parameters
        ----------
        path : path
            The file: ``[[shards]]`` tables (``name``, and ``dsn`` or connection keywords), an
            optional ``[defaults]`` table for all of them, and ``[sharded]`` with ``table = "key"``.

        Raises
        ------
        TopologyError
            The file cannot be read, a key is unknown, or it holds a literal password and others
            than its owner may read it.
        """
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
        topology = cls.from_mapping(parsed, source=str(file))
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
            ``shards``, ``defaults`` and ``sharded``.
        source : str, optional
            What errors call it.

        Raises
        ------
        TopologyError
            A key is unknown or missing; the message names it, and the shard.
        """
        _known_keys(mapping, ("defaults", "sharded", "shards"), source)
        defaults = _table(mapping.get("defaults", {}), f"[defaults] of {source}")
        entries = mapping.get("shards", [])
        if isinstance(entries, Mapping):
            entries = [
                {**_table(entry, f"shard {name!r} of {source}"), "name": name}
                for name, entry in entries.items()
            ]
        shards = []
        for number, raw in enumerate(entries, start=1):
            entry = _table(raw, f"shard {number} of {source}")
            name = entry.pop("name", None)
            if not isinstance(name, str):
                raise TopologyError(f'shard {number} of {source} has no name: add name = "..."')
            server = _server(entry, f"shard {name!r} of {source}", defaults)
            shards.append(Shard(name, (server,)))
        tables = []
        for table, value in _table(mapping.get("sharded", {}), f"[sharded] of {source}").items():
            where = f"[sharded] {table!r} of {source}"
            fields = {"key": value} if isinstance(value, str) else _table(value, where)
            _known_keys(fields, ("key",), where)
            if not isinstance(fields.get("key"), str) or not fields["key"]:
                raise TopologyError(f'{where} names no shard key: write {table} = "column"')
            tables.append(ShardedTable(str(table), fields["key"]))
        return cls(tuple(shards), tuple(tables))

    @property
    def has_literal_secrets(self) -> bool:
        """Whether any server's password is written out instead of referred to."""
        return any(server.secrets for shard in self.shards for server in shard.servers)

    @functools.cached_property
    def fingerprint(self) -> str:
        """A short hash of everything but the secrets' text; tasks carry it instead of a DSN."""
        plain = [
            (
                shard.name,
                [
                    (
                        server.driver,
                        server.role,
                        server.keywords,
                        [(key, secret.digest()) for key, secret in server.secrets],
                        server.password and (server.password.kind, server.password.target),
                    )
                    for server in shard.servers
                ],
            )
            for shard in self.shards
        ]
        tables = [(table.name, table.key) for table in self.sharded]
        return hashlib.sha256(json.dumps([plain, tables]).encode()).hexdigest()[:16]

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

    def __dask_tokenize__(self) -> Any:
        return ("dask_shardsql.Topology", self.fingerprint)

    def __repr__(self) -> str:
        shown = [f"{shard.name!r} at {shard.primary.address}" for shard in self.shards[:8]]
        if len(self.shards) > 8:
            shown.append(f"... {len(self.shards)} in all")
        tables = {table.name: table.key for table in self.sharded}
        return f"Topology(shards=[{', '.join(shown)}], sharded={tables})"


def _server(
    entry: Mapping[str, Any], where: str, defaults: Mapping[str, Any] | None = None
) -> Server:
    """Make a server from the keys of a shard's table over those of ``[defaults]``."""
    merged = {**(defaults or {}), **entry}
    keywords: dict[str, Any] = {}
    driver = str(merged.pop("driver", ""))
    if (dsn := merged.pop("dsn", None)) is not None:
        found, keywords = parse_dsn(dsn, where)
        if driver and driver != found:
            raise TopologyError(f"{where}: driver is {driver!r}, but its dsn is for {found!r}")
        driver = found
    driver = driver or POSTGRESQL
    references = {key: merged.pop(key) for key in PASSWORD_REFERENCES if key in merged}
    own = [key for key in references if key in entry]
    if own:  # what a shard says itself replaces what [defaults] says
        references = {key: references[key] for key in own}
        if "password" not in entry:
            merged.pop("password", None)
    elif "password" in entry or "password" in keywords:
        references = {}
    keywords = {**{k: v for k, v in merged.items() if k not in entry}, **keywords}
    keywords.update({k: v for k, v in merged.items() if k in entry})
    for key, value in keywords.items():
        if not isinstance(value, str | int | float | bool):
            raise TopologyError(f"{where}: the value of {key!r} must be a text or a number")
        if driver == POSTGRESQL and not is_libpq_keyword(key):
            raise TopologyError(
                f"{where}: unknown key {key!r}{_did_you_mean(key, (*LIBPQ_HINTS, *PASSWORD_REFERENCES))}"
            )
    if driver == POSTGRESQL:
        check_address(keywords, where)
    secrets = {k: Secret(str(v)) for k, v in keywords.items() if is_secret_keyword(k)}
    if len(references) > 1 or (references and "password" in secrets):
        both = ", ".join([*references, *(["password"] if "password" in secrets else [])])
        raise TopologyError(f"{where}: only one of {both} can say what the password is")
    password = None
    for kind, target in references.items():
        password = PasswordReference(kind, _reference_target(kind, target, where))
    plain = sorted((k, v) for k, v in keywords.items() if k not in secrets)
    return Server(driver, tuple(plain), tuple(sorted(secrets.items())), password)


def _reference_target(kind: str, target: Any, where: str) -> str | tuple[str, ...]:
    words = kind == "password_command" and isinstance(target, list | tuple) and target
    if words and all(isinstance(word, str) for word in target):
        return tuple(target)
    if not isinstance(target, str) or not target:
        raise TopologyError(f"{where}: {kind} must be {PASSWORD_REFERENCES[kind]}")
    if kind == "password_callable" and not re.fullmatch(r"[\w.]+:[\w.]+", target):
        raise TopologyError(f"{where}: {kind} must be {PASSWORD_REFERENCES[kind]}, not {target!r}")
    return target


def _known_keys(mapping: Mapping[str, Any], known: Iterable[str], where: str) -> None:
    known = tuple(known)
    for key in mapping:
        if key not in known:
            raise TopologyError(
                f"unknown key {key!r} in {where}{_did_you_mean(str(key), known)} "
                f"(known: {', '.join(known)})"
            )


def _did_you_mean(key: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(key, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _table(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise TopologyError(f"{where} must be a table of keys and values")
    return dict(value)


def _unique(what: str, names: Sequence[str]) -> None:
    twice = sorted(name for name, count in Counter(names).items() if count > 1)
    if twice:
        raise TopologyError(
            f"two {what} are named {', '.join(map(repr, twice))}; names must differ"
        )
