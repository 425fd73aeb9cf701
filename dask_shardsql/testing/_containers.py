"""PostgreSQL servers as containers, for machines with a Docker engine and no PostgreSQL."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Mapping
from typing import Any

from dask_shardsql.errors import ConnectionFailedError
from dask_shardsql.testing._local import free_port, probe

IMAGE_VARIABLE = "DASK_SHARDSQL_POSTGRES_IMAGE"
_DEFAULT_IMAGE = "postgres:18"


def container_image() -> str | None:
    """Return the image to start servers from when a Docker engine answers, else None."""
    try:
        from testcontainers.core.docker_client import DockerClient

        client = DockerClient(timeout=3).client
        try:
            client.ping()
        finally:
            client.close()
    except Exception:  # noqa: BLE001 - no package, no engine, no permission: a class each
        return None
    return os.environ.get(IMAGE_VARIABLE, _DEFAULT_IMAGE)


class ContainerServer:
    """A PostgreSQL container that publishes its port; the same methods as ``LocalServer``."""

    def __init__(
        self,
        name: str,
        *,
        user: str,
        password: str,
        settings: Mapping[str, str],
        locale: str,
        timeout: float,
    ) -> None:
        from testcontainers.core.container import DockerContainer

        self.name = name
        self.host = ""
        self.port = free_port()
        self.user = user
        self.password = password
        self._timeout = timeout
        self._created = False
        options = [word for pair in settings.items() for word in ("-c", "=".join(pair))]
        self._container: Any = (
            DockerContainer(os.environ.get(IMAGE_VARIABLE, _DEFAULT_IMAGE))
            .with_envs(
                POSTGRES_USER=user,
                POSTGRES_PASSWORD=password,
                POSTGRES_DB="postgres",
                POSTGRES_INITDB_ARGS=f"--encoding=UTF8 --locale={locale} --no-sync",
            )
            .with_bind_ports(5432, self.port)  # a fixed port stays the same over a restart
            .with_command(["postgres", *options])
        )

    @property
    def pid(self) -> int | None:
        """The process id on the engine's host, or None while the container does not run."""
        if not self._created:
            return None
        wrapped = self._container.get_wrapped_container()
        wrapped.reload()
        return int(wrapped.attrs["State"]["Pid"]) or None

    def launch(self) -> None:
        """Start the container without waiting for the server in it."""
        if self._created:
            self._container.get_wrapped_container().start()
        else:
            try:
                self._container.start()
            except BaseException:
                with contextlib.suppress(Exception):  # half a start leaves something to remove
                    self._container.stop()
                raise
            self._created = True
            self.host = self._container.get_container_host_ip()

    def wait_ready(self, *, may_move: bool) -> None:
        """Return when the server accepts connections."""
        deadline = time.monotonic() + self._timeout
        while (problem := probe(self.host, self.port, self.user, self.password)) is not None:
            if time.monotonic() > deadline or self.pid is None:
                raise ConnectionFailedError(
                    f"cannot start PostgreSQL container '{self.name}' on {self.host}:{self.port} "
                    f"within {self._timeout:g} s: {problem}. The end of its log:\n{self.tail()}",
                    shard=self.name,
                    server=f"{self.host}:{self.port}",
                )
            time.sleep(0.1)

    def tail(self, lines: int = 20) -> str:
        """Return the last `lines` lines of the container's log."""
        if not self._created:
            return ""
        text = b"".join(self._container.get_logs()).decode(errors="replace")
        return "\n".join(text.splitlines()[-lines:])

    def begin_stop(self) -> None:
        """Do nothing: a container is stopped in one step."""

    def finish_stop(self) -> None:
        """Stop the container; its data stays for a later start."""
        if self._created:
            self._container.get_wrapped_container().stop(timeout=20)

    def dispose(self) -> None:
        """Remove the container and its data."""
        if self._created:
            with contextlib.suppress(Exception):  # testcontainers' reaper removes what is left
                self._container.stop()
            self._created = False
