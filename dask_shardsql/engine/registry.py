"""Topologies by fingerprint: how a task that carries only a fingerprint finds its servers.

A task holds a :class:`TopologyRef`. The process that runs it has the topology

- because it made the query itself (threads, or a scheduler in this process), or
- because the client's plugin brought it (``distributed``; see ``worker_plugin``), or
- because it asks its parent process for it (``scheduler="processes"``): over a local socket
  that authenticates with the key ``multiprocessing`` gives to its children.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import tempfile
import threading
from contextlib import suppress
from multiprocessing.connection import (
    Client,
    Connection,
    answer_challenge,
    deliver_challenge,
)
from typing import Any

from dask_shardsql.errors import TopologyNotFoundError
from dask_shardsql.secret import PasswordReference, Secret
from dask_shardsql.topology import Server, Shard, ShardedTable, Topology

__all__ = ["TopologyRef", "bring", "forget", "pack", "register", "unpack"]

_topologies: dict[str, Topology] = {}
_brought: dict[str, list[Topology]] = {}  # once for each worker of this process that was given it
_lock = threading.Lock()
_listener_of: int | None = None


def register(topology: Topology, fingerprint: str | None = None) -> TopologyRef:
    """Make `topology` known in this process and return what tasks carry in its place."""
    ref = TopologyRef(fingerprint or topology.fingerprint)
    with _lock:
        _topologies[ref.fingerprint] = topology
    return ref


def bring(topology: Topology, fingerprint: str) -> None:
    """Make known what another process gave to a worker in this one, until it is forgotten."""
    with _lock:
        _brought.setdefault(fingerprint, []).append(topology)


def forget(fingerprint: str) -> None:
    """Undo one :func:`bring`; what this process registered itself stays known."""
    with _lock:
        left = _brought.get(fingerprint, [])[1:]
        if left:
            _brought[fingerprint] = left
        else:
            _brought.pop(fingerprint, None)


def _find(fingerprint: str) -> Topology | None:
    with _lock:
        brought = _brought.get(fingerprint)
        return _topologies.get(fingerprint) or (brought[0] if brought else None)


class TopologyRef:
    """The name of a topology, without any of its content.

    Parameters
    ----------
    fingerprint : str
        :attr:`Topology.fingerprint` where it was made.
    """

    __slots__ = ("fingerprint",)

    def __init__(self, fingerprint: str) -> None:
        self.fingerprint = fingerprint

    @property
    def is_known(self) -> bool:
        """Whether this process has the topology already."""
        return _find(self.fingerprint) is not None

    def resolve(self) -> Topology:
        """Return the topology.

        Raises
        ------
        TopologyNotFoundError
            This process was never given it.
        """
        topology = _find(self.fingerprint) or _ask_parent(self.fingerprint)
        if topology is None:
            raise TopologyNotFoundError(
                f"process {os.getpid()} was never given topology {self.fingerprint}. Create the "
                "Client before the query, or make it current (client.as_current()) while the "
                "DataFrame is built or computed: that is when workers are given the topology"
            )
        return topology

    def __reduce__(self) -> Any:
        _serve_children()  # a task that is pickled may run in a child process
        return (TopologyRef, (self.fingerprint,))

    def __repr__(self) -> str:
        return f"TopologyRef({self.fingerprint!r})"

    def __dask_tokenize__(self) -> Any:
        return ("dask_shardsql.TopologyRef", self.fingerprint)


def pack(topology: Topology) -> tuple[Any, ...]:
    """Return a topology, secrets and all, as plain values. Only for channels outside of tasks."""
    shards = [(shard.name, list(map(_packed, shard.servers))) for shard in topology.shards]
    merging = None if topology.merging is None else _packed(topology.merging)
    tables = [(table.name, table.key, table.function) for table in topology.sharded]
    return shards, tables, topology.reference, merging


def _packed(server: Server) -> tuple[Any, ...]:
    return (
        server.driver,
        server.keywords,
        [(key, secret.reveal()) for key, secret in server.secrets],
        server.password and (server.password.kind, server.password.target),
        server.role,
    )


def unpack(packed: tuple[Any, ...]) -> Topology:
    """Return the topology that :func:`pack` took apart."""
    shards, tables, reference, merging = packed
    return Topology(
        tuple(Shard(name, tuple(map(_unpacked, servers))) for name, servers in shards),
        tuple(ShardedTable(name, key, function) for name, key, function in tables),
        reference,
        None if merging is None else _unpacked(merging),
    )


def _unpacked(packed: tuple[Any, ...]) -> Server:
    driver, keywords, secrets, password, role = packed
    return Server(
        driver,
        tuple((key, value) for key, value in keywords),
        tuple((key, Secret(value)) for key, value in secrets),
        PasswordReference(*password) if password else None,
        role,
    )


def _address(pid: int) -> str:
    if os.path.exists("/proc/self"):  # Linux: a name that is no file, gone with the process
        return f"\0dask_shardsql-{pid}"
    return os.path.join(tempfile.gettempdir(), f"dask_shardsql-{pid}.sock")


def _serve_children() -> None:
    """Start, once a process, the thread that gives topologies to child processes."""
    global _listener_of
    with _lock:
        if _listener_of == os.getpid():
            return
        _listener_of = os.getpid()
        with suppress(OSError):
            listener = socket.socket(socket.AF_UNIX)
            listener.bind(_address(os.getpid()))
            listener.listen(64)
            threading.Thread(
                target=_serve, args=(listener,), name="dask_shardsql-topologies", daemon=True
            ).start()


def _serve(listener: socket.socket) -> None:
    while True:
        with suppress(OSError):
            accepted, _ = listener.accept()
            # each in a thread of its own: a stranger who says nothing keeps nobody else waiting
            threading.Thread(target=_answer, args=(accepted,), daemon=True).start()


def _answer(accepted: socket.socket) -> None:
    """Give one child the topology it asks for, once it has shown that it has the key."""
    accepted.settimeout(None)
    key = bytes(multiprocessing.current_process().authkey)
    with (
        suppress(OSError, EOFError, multiprocessing.AuthenticationError),
        Connection(accepted.detach()) as connection,
    ):
        deliver_challenge(connection, key)
        answer_challenge(connection, key)
        fingerprint = connection.recv()  # of a child's child, perhaps: then our parent may know it
        topology = _find(fingerprint) or _ask_parent(fingerprint)
        connection.send(pack(topology) if topology else None)


def _ask_parent(fingerprint: str) -> Topology | None:
    parent = multiprocessing.parent_process()
    if parent is None or parent.pid is None:
        return None
    try:
        key = bytes(multiprocessing.current_process().authkey)
        with Client(_address(parent.pid), "AF_UNIX", authkey=key) as connection:
            connection.send(fingerprint)
            packed = connection.recv()
    except (OSError, EOFError, multiprocessing.AuthenticationError):
        return None
    if packed is None:
        return None
    topology = unpack(packed)
    register(topology, fingerprint)
    return topology


def _after_fork() -> None:
    global _lock
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_after_fork)
