"""One PostgreSQL server that is a child of this process."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Mapping
from pathlib import Path

import psycopg2

from dask_shardsql.errors import ConnectionFailedError
from dask_shardsql.testing._process import Account, settle_spawner, spawn_server

HOST = "127.0.0.1"
_PORT_ATTEMPTS = 10
_random = random.SystemRandom()
_ports_lock = threading.Lock()
_ports_given: set[int] = set()


def free_port() -> int:
    """Return a loopback port that is free now and that this process has not given out before.

    It lies below the range that outgoing connections take theirs from: otherwise a client that
    calls a stopped server could be given the server's own port, and hear itself answer.
    """
    try:
        limit = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    except (OSError, ValueError, IndexError):
        limit = 32768
    with _ports_lock:
        for _ in range(200):
            port = _random.randrange(15000, limit) if limit > 20000 else 0
            with contextlib.suppress(OSError), socket.socket() as probe:
                probe.bind((HOST, port))
                port = int(probe.getsockname()[1])
                if port not in _ports_given:
                    _ports_given.add(port)
                    return port
    raise ConnectionFailedError(
        f"cannot start a server: no free port on {HOST} in 200 attempts. Stop other servers"
    )


def probe(host: str, port: int, user: str, password: str) -> str | None:
    """Return why a server does not answer, or None."""
    try:
        psycopg2.connect(
            host=host,
            port=port,
            user=user,
            password=password,
            dbname="postgres",
            connect_timeout=5,
        ).close()
    except psycopg2.OperationalError as error:
        return str(error).strip()
    return None


class LocalServer:
    """A postmaster on a data directory of its own, on loopback TCP."""

    def __init__(
        self,
        name: str,
        bin_path: Path,
        data: Path,
        account: Account | None,
        *,
        user: str,
        password: str,
        settings: Mapping[str, str],
        keep: bool,
        timeout: float,
    ) -> None:
        self.name = name
        self.host = HOST
        self.port = 0
        self.user = user
        self.password = password
        self.data = data
        self.log = data / "server.log"
        self._program = bin_path / "postgres"
        self._account = account
        self._keep = keep
        self._timeout = timeout
        self._process: subprocess.Popen[bytes] | None = None
        self._log_start = 0
        with open(data / "postgresql.conf", "a") as handle:
            handle.writelines(f"{key} = '{_quote(value)}'\n" for key, value in settings.items())

    @property
    def pid(self) -> int | None:
        """The postmaster's process id, or None while it does not run."""
        process = self._process
        return process.pid if process is not None and process.poll() is None else None

    def launch(self) -> None:
        """Start the postmaster without waiting for it; on its old port if it has one."""
        if self.pid is not None:
            return
        if self.port == 0:
            self.port = free_port()
        with open(self.log, "ab") as log:
            if self._account is not None:
                os.fchown(log.fileno(), self._account.uid, self._account.gid)
            self._log_start = log.tell()
            spawn_server(
                [self._program, "-D", self.data, "-p", str(self.port)],
                account=self._account,
                cwd=self.data,
                log=log,
                outlive=self._keep,
                register=self._register,
            )

    def _register(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process

    def wait_ready(self, *, may_move: bool) -> None:
        """Return when the server accepts connections.

        Somebody else may take the port between the choice and the start: with `may_move` another
        port is tried, without it the same one is tried again.
        """
        deadline = time.monotonic() + self._timeout
        attempts = 1
        while True:
            problem = self._probe()
            if problem is None:
                return
            if self.pid is None:
                if "could not bind" not in self.tail() or attempts >= _PORT_ATTEMPTS:
                    raise self._failure(f"ended with exit code {self._exit_code()}")
                attempts += 1
                if may_move:
                    self.port = 0
                else:
                    time.sleep(0.2)
                self.launch()
            elif time.monotonic() > deadline:
                raise self._failure(f"did not answer within {self._timeout:g} s ({problem})")
            else:
                time.sleep(0.02)

    def _probe(self) -> str | None:
        """Return why the server cannot be used yet, or None."""
        # The postmaster's own word comes first: whoever else has the port may never answer.
        try:
            lines = (self.data / "postmaster.pid").read_text().splitlines()
        except OSError:
            lines = []
        if lines[:1] != [str(self.pid)] or "".join(lines[7:8]).strip() != "ready":
            return "not ready yet"
        return probe(self.host, self.port, self.user, self.password)

    def _exit_code(self) -> int | None:
        return self._process.poll() if self._process is not None else None

    def _failure(self, what: str) -> ConnectionFailedError:
        tail = "\n".join(f"  {line}" for line in self.tail().splitlines()) or "  (empty)"
        return ConnectionFailedError(
            f"cannot start PostgreSQL server '{self.name}' on {self.host}:{self.port}: it {what}. "
            f"The end of its log '{self.log}':\n{tail}",
            shard=self.name,
            server=f"{self.host}:{self.port}",
        )

    def tail(self, lines: int = 20) -> str:
        """Return the last `lines` lines that the server logged since its last start."""
        try:
            with open(self.log, "rb") as handle:
                handle.seek(self._log_start)
                text = handle.read().decode(errors="replace")
        except OSError:
            return ""
        return "\n".join(text.splitlines()[-lines:])

    def begin_stop(self) -> None:
        """Ask for a fast shutdown: open transactions are rolled back, clients disconnected."""
        settle_spawner()
        self._signal(signal.SIGINT)

    def finish_stop(self) -> None:
        """Return when the server has ended; harsher signals help one that does not."""
        process = self._process
        if process is None:
            return
        for patience, harsher in ((20, signal.SIGQUIT), (10, signal.SIGKILL), (10, None)):
            try:
                process.wait(patience)
                return
            except subprocess.TimeoutExpired:
                if harsher is not None:
                    self._signal(harsher)
        raise ConnectionFailedError(
            f"cannot stop PostgreSQL server '{self.name}': process {process.pid} does not end",
            shard=self.name,
            server=f"{self.host}:{self.port}",
        )

    def _signal(self, number: signal.Signals) -> None:
        if self._process is not None:
            self._process.send_signal(number)  # does nothing to a process that has ended

    def dispose(self) -> None:
        """Let go of what only this server uses; its directory goes with the others'."""


def _quote(value: str) -> str:
    return value.replace("\\", "\\\\").replace("'", "''")
