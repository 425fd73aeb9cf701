"""Running PostgreSQL servers: one for each shard, one for reference."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import secrets
import shlex
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psycopg2
import psycopg2.extensions

from dask_shardsql.errors import ConfigurationError, QueryError
from dask_shardsql.testing import _rows, _storage
from dask_shardsql.testing._server import Server
from dask_shardsql.testing.binaries import PostgreSQLBinaries
from dask_shardsql.topology import Topology

__all__ = ["ShardServers"]

REFERENCE = "reference"


class ShardServers:
    """Running PostgreSQL servers: shards ``s1`` to ``sn`` and, unless left out, ``reference``.

    :func:`start_shards` makes it. As a context manager it stops the servers at the end of the
    block, unless they were started with ``keep=True``. It ends with the process in any case: at
    interpreter exit, and on Linux even when the process is killed.

    Attributes
    ----------
    binaries : PostgreSQLBinaries
        What the servers were started from.
    directory : pathlib.Path or None
        What holds the servers' data and logs; None when they are containers.
    sharded : dict of str to str
        Each sharded table's name and its shard key.
    keep : bool
        Whether the servers outlive this process.
    """

    def __init__(
        self,
        servers: Sequence[Server],
        *,
        binaries: PostgreSQLBinaries,
        directory: Path | None,
        sharded: Mapping[str, str] | None,
        keep: bool,
    ) -> None:
        self.binaries = binaries
        self.directory = directory
        self.sharded = dict(sharded or {})
        self.keep = keep
        self._servers = {server.name: server for server in servers}
        self._stopped = False
        self._owner = os.getpid()
        self._lock = threading.RLock()

    @property
    def dsns(self) -> dict[str, str]:
        """Each shard's name and its libpq connection string, with the literal password."""
        return {name: _dsn(server) for name, server in self._servers.items() if name != REFERENCE}

    @property
    def reference_dsn(self) -> str | None:
        """The libpq connection string of the reference server, or None without one."""
        server = self._servers.get(REFERENCE)
        return _dsn(server) if server is not None else None

    @property
    def topology(self) -> Topology:
        """The shards, with the tables that are sharded over them."""
        return Topology.from_dsns(self.dsns, sharded=self.sharded)

    @property
    def reference(self) -> Topology | None:
        """A topology of one shard named ``"reference"``, which holds all rows; None without it."""
        dsn = self.reference_dsn
        return Topology.from_dsns({REFERENCE: dsn}) if dsn is not None else None

    @property
    def pids(self) -> dict[str, int]:
        """The postmaster's process id of each server that runs."""
        found = {name: server.pid for name, server in self._servers.items()}
        return {name: pid for name, pid in found.items() if pid is not None}

    @property
    def stop_command(self) -> str | None:
        """The shell command that stops kept servers and removes their data; else None."""
        if not self.keep or self.directory is None:
            return None
        return f"sh {shlex.quote(str(self.directory / 'stop.sh'))}"

    def log(self, name: str, lines: int = 20) -> str:
        """Return the last lines that server `name` logged since its last start."""
        return self._server(name).tail(lines)

    def connect(self, name: str, **options: Any) -> psycopg2.extensions.connection:
        """Open a psycopg2 connection to a server.

        Parameters
        ----------
        name : str
            A shard's name, or ``"reference"``.
        **options
            Further keywords of :func:`psycopg2.connect`, such as ``dbname``.

        Returns
        -------
        psycopg2.extensions.connection

        Raises
        ------
        ConfigurationError
            No server has that name.
        """
        connection: psycopg2.extensions.connection
        connection = psycopg2.connect(_dsn(self._server(name)), **options)
        return connection

    @contextlib.contextmanager
    def session(
        self, name: str, *, autocommit: bool = False
    ) -> Iterator[psycopg2.extensions.cursor]:
        """Give a cursor on a server for one block, and commit at the block's end.

        Parameters
        ----------
        name : str
            A shard's name, or ``"reference"``.
        autocommit : bool, default False
            Commit every statement by itself instead.

        Yields
        ------
        psycopg2.extensions.cursor

        Raises
        ------
        QueryError
            The server refused something; the error names the server.
        """
        try:
            with contextlib.closing(self.connect(name)) as connection:
                connection.autocommit = autocommit
                with connection.cursor() as cursor:
                    yield cursor
                if not autocommit:
                    connection.commit()
        except psycopg2.Error as error:
            message = error.diag.message_primary or str(error).strip()
            detail = error.diag.message_detail
            raise QueryError(message, shard=name, sqlstate=error.pgcode, detail=detail) from error

    def for_each(self, call: Callable[[str], None]) -> None:
        """Call `call` with the name of every server, side by side in threads.

        The first exception is raised when all calls have ended.
        """
        with ThreadPoolExecutor(len(self._servers), "dask-shardsql-testing") as threads:
            for _ in threads.map(call, self._servers):
                pass

    def execute(self, statement: str, params: Any = None) -> None:
        """Run a statement on every shard and on the reference, side by side, in autocommit.

        Parameters
        ----------
        statement : str
            SQL, such as ``CREATE TABLE``; several statements may be separated by semicolons.
        params : sequence or mapping, optional
            Values for ``%s`` or ``%(name)s``.

        Raises
        ------
        QueryError
            A server refused it; the error names the server.
        """

        def on(name: str) -> None:
            with self.session(name, autocommit=True) as cursor:
                cursor.execute(statement, params)

        self.for_each(on)

    def load(
        self,
        table: str,
        rows: Iterable[Sequence[Any]] | bytes | str,
        *,
        shard_of: Callable[[Sequence[Any]], int] | None = None,
        columns: Sequence[str] | None = None,
    ) -> int:
        """Copy rows to the shards they belong to, and all of them to the reference.

        Parameters
        ----------
        table : str
            The table, as it is written in SQL. It must exist: see :meth:`execute`.
        rows : iterable of sequences, or bytes or str
            Rows of Python values; or CSV without a header, where an unquoted empty field is NULL.
        shard_of : callable, optional
            Gets a row (for CSV, a list of str) and returns the number of its shard, from 0.
            Without it every shard gets all rows, as a reference table needs.
        columns : sequence of str, optional
            The columns that the rows hold; all, in the table's order, by default.

        Returns
        -------
        int
            The number of rows.

        Raises
        ------
        QueryError
            A server refused the rows; the error names the server.
        ConfigurationError
            `shard_of` returned a number that no shard has.
        """
        shards = list(self.dsns)
        parts, everything, count = _rows.split(table, rows, shard_of, len(shards))
        contents = dict(zip(shards, parts, strict=True))
        names = f" ({', '.join(map(_rows.quote_identifier, columns))})" if columns else ""
        form = "csv" if isinstance(rows, bytes | str) else "text"
        statement = f"COPY {table}{names} FROM STDIN (FORMAT {form})"

        def on(name: str) -> None:
            with self.session(name) as cursor:
                cursor.copy_expert(statement, _rows.reader(contents.get(name, everything)))

        self.for_each(on)
        return count

    def write_toml(self, path: str | os.PathLike[str]) -> Path:
        """Write a file that :meth:`dask_shardsql.Topology.from_toml` reads, for its owner only.

        Parameters
        ----------
        path : path
            The file; one that exists is replaced.

        Returns
        -------
        pathlib.Path
            `path`, with mode 0600, as it holds the password.
        """
        target = Path(path)
        blocks = []
        for name in self.dsns:
            server = self._servers[name]
            fields: dict[str, str | int] = {
                "name": name,
                "host": server.host,
                "port": server.port,
                "dbname": "postgres",
                "user": server.user,
                "password": server.password,
            }
            lines = [f"{key} = {_toml(value)}" for key, value in fields.items()]
            blocks.append("\n".join(["[[shards]]", *lines]))
        if self.sharded:
            lines = [f"{_toml(table)} = {_toml(key)}" for table, key in self.sharded.items()]
            blocks.append("\n".join(["[sharded]", *lines]))
        # Replaced in one step: an older file's wider mode never covers the password.
        draft = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(descriptor, "w", encoding="utf-8") as handle:
            handle.write("\n\n".join(blocks) + "\n")
        draft.replace(target)
        return target

    def stop_server(self, name: str) -> None:
        """Stop one server by a fast shutdown; its port and its data stay for a later start."""
        server = self._server(name)
        server.begin_stop()
        server.finish_stop()

    def start_server(self, name: str) -> None:
        """Start a stopped server again, on the same port and data.

        Raises
        ------
        ConnectionFailedError
            It does not come up; the error shows the end of its log.
        """
        with self._lock:
            if self._stopped:
                raise ConfigurationError(
                    f"cannot start server '{name}': the servers were stopped for good and their "
                    "data removed. Start new ones with start_shards"
                )
            server = self._server(name)
            server.launch()
            server.wait_ready(may_move=False)

    def stop(self) -> None:
        """Stop all servers and remove their data; a second call does nothing."""
        with self._lock:
            if self._stopped or self._owner != os.getpid():  # a forked child does not own them
                return
            servers = list(self._servers.values())
            for server in servers:
                server.begin_stop()
            for server in servers:
                server.finish_stop()
            for server in servers:
                server.dispose()
            if self.directory is not None:
                _storage.remove_directory(self.directory)
            self._stopped = True
            exit_work.forget(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if not self.keep:
            self.stop()

    def __repr__(self) -> str:
        places = ", ".join(f"{s.name} at {s.host}:{s.port}" for s in self._servers.values())
        found = f"PostgreSQL {self.binaries.version} ({self.binaries.source})"
        return f"<ShardServers {found}: {'stopped' if self._stopped else places}>"

    def _server(self, name: str) -> Server:
        if name not in self._servers:
            known = ", ".join(f"'{known}'" for known in self._servers)
            raise ConfigurationError(f"no server is named '{name}'; there are {known}")
        return self._servers[name]


class _ExitWork:
    """Stops the servers that are left when the interpreter exits."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._live: set[ShardServers] = set()
        self._pid = 0

    def arm(self) -> None:
        with self._lock:
            if self._pid != os.getpid():  # a forked child's parent owns what the child inherits
                self._live, self._pid = set(), os.getpid()
                atexit.register(self.run)

    def remember(self, servers: ShardServers) -> None:
        self._live.add(servers)

    def forget(self, servers: ShardServers) -> None:
        self._live.discard(servers)

    def run(self) -> None:
        if self._pid != os.getpid():
            return
        for servers in list(self._live):
            with contextlib.suppress(Exception):
                servers.stop()
        _storage.CACHE.remove()


exit_work = _ExitWork()


def _dsn(server: Server) -> str:
    return psycopg2.extensions.make_dsn(
        host=server.host,
        port=server.port,
        dbname="postgres",
        user=server.user,
        password=server.password,
    )


def _toml(value: str | int) -> str:
    return json.dumps(value, ensure_ascii=False)  # a JSON string or number is the same in TOML
