"""Bring a topology to the workers of a ``distributed`` cluster, outside of every task.

A worker plugin travels once per client and topology over the scheduler's own channel, also to
workers that join later. On a TLS cluster that channel is encrypted.
"""

from __future__ import annotations

import threading
import weakref
from importlib.metadata import version
from typing import Any

from distributed import Client, Worker, WorkerPlugin

from dask_shardsql.engine import registry
from dask_shardsql.engine.pools import close_all
from dask_shardsql.engine.stoppable import in_thread, stop
from dask_shardsql.errors import ConfigurationError
from dask_shardsql.topology import Topology

__all__ = ["TopologyPlugin", "give_to_workers", "take_from_workers"]

_DISTRIBUTION = "dask_shardsql"

_given: weakref.WeakKeyDictionary[Any, set[str]] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


class TopologyPlugin(WorkerPlugin):  # type: ignore[misc]
    """Makes a topology known in the worker's process.

    Parameters
    ----------
    topology : Topology
        With its literal secrets, if it has any.
    """

    def __init__(self, topology: Topology) -> None:
        self.name = f"dask_shardsql-{topology.fingerprint}"
        self._fingerprint = topology.fingerprint
        self._topology = topology

    def setup(self, worker: Worker) -> None:
        """Register the topology under the client's fingerprint."""
        self._worker = worker
        registry.bring(self._topology, self._fingerprint)

    def transition(self, key: Any, start: str, finish: str, **kwargs: Any) -> None:
        """Stop what runs for a task that nobody waits for any more."""
        if (start, finish) == ("executing", "released"):
            in_thread(stop, self._worker.state.tasks[key].run_spec)

    def teardown(self, worker: Worker) -> None:
        """Forget the topology, and close the idle connections."""
        registry.forget(self._fingerprint)
        close_all()

    def __getstate__(self) -> dict[str, Any]:
        packed = registry.pack(self._topology)
        return {"name": self.name, "_fingerprint": self._fingerprint, "_packed": packed}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.name = state["name"]
        self._fingerprint = state["_fingerprint"]
        self._topology = registry.unpack(state["_packed"])

    def __repr__(self) -> str:
        return f"<TopologyPlugin {self._fingerprint}>"


def give_to_workers(client: Client, topology: Topology) -> None:
    """Give `topology` to all workers of `client`, once.

    Raises
    ------
    ConfigurationError
        This package is not installed, or in another version, where the scheduler or a worker runs.
    """
    with _lock:
        if topology.fingerprint in _given.setdefault(client, set()):
            return
    _check_versions(client)
    client.register_plugin(TopologyPlugin(topology))
    with _lock:
        _given[client].add(topology.fingerprint)


def take_from_workers(client: Client, topology: Topology) -> None:
    """Make the workers, and the scheduler, forget a topology that :func:`give_to_workers` gave."""
    with _lock:
        given = topology.fingerprint in _given.get(client, set())
    if given:
        client.unregister_worker_plugin(TopologyPlugin(topology).name)
        with _lock:
            _given[client].discard(topology.fingerprint)


def _check_versions(client: Client) -> None:
    """Ask, by a function of the standard library, which version each process has."""
    own = version(_DISTRIBUTION)
    found = {"scheduler": _version_or_error(client)}
    found |= client.run(version, _DISTRIBUTION, on_error="return")
    for where, there in found.items():
        if there == own:
            continue
        said = there if isinstance(there, str) else "no such package"
        place = "the scheduler" if where == "scheduler" else f"worker {where}"
        raise ConfigurationError(
            f"{place} of the Dask cluster at {client.scheduler.address} has {said} where "
            f"{_DISTRIBUTION} {own} is needed, as in this process: install that version where the "
            "scheduler and the workers run"
        )


def _version_or_error(client: Client) -> Any:
    try:
        return client.run_on_scheduler(version, _DISTRIBUTION)
    except ImportError as error:
        return error
