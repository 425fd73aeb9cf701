"""What a server must be able to do, whether it is a process or a container."""

from __future__ import annotations

from typing import Protocol


class Server(Protocol):
    """What ``LocalServer`` and ``ContainerServer`` have in common."""

    name: str
    host: str
    port: int
    user: str
    password: str

    @property
    def pid(self) -> int | None: ...
    def launch(self) -> None: ...
    def wait_ready(self, *, may_move: bool) -> None: ...
    def tail(self, lines: int = 20) -> str: ...
    def begin_stop(self) -> None: ...
    def finish_stop(self) -> None: ...
    def dispose(self) -> None: ...
