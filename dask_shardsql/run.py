"""Where a query's tasks run, and how they are stopped: threads, or a Dask cluster's workers."""

from __future__ import annotations

import sys
import threading
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from contextlib import suppress
from typing import Any

import dask
from dask import threaded
from dask._task_spec import Task
from dask.base import get_scheduler
from dask.callbacks import Callback

from dask_shardsql.engine import registry
from dask_shardsql.engine.cancel import cancel_query
from dask_shardsql.engine.drivers.base import Query
from dask_shardsql.engine.fetch import Answer
from dask_shardsql.engine.stoppable import ENDS_TASKS, in_thread
from dask_shardsql.errors import ConfigurationError
from dask_shardsql.topology import Topology

__all__ = [
    "cancel_everywhere",
    "client_of",
    "run_graph",
    "run_tasks",
    "runs_here",
    "schedule_of",
    "share_topology",
]

_MAX_THREADS = 32


def share_topology(topology: Topology, schedule: Any = None) -> registry.TopologyRef:
    """Make the topology known here and on the workers that `schedule` would use.

    Parameters
    ----------
    topology : Topology
        What tasks are to find by the reference that comes back.
    schedule : callable, optional
        What ``dask.base.get_scheduler`` gives; by default what it gives now.
    """
    ref = registry.register(topology)
    if schedule is None:
        with suppress(RuntimeError, ValueError):  # asynchronous clients
            schedule = get_scheduler()
    client = client_of(schedule)
    if client is not None:
        from dask_shardsql.engine.worker_plugin import give_to_workers

        give_to_workers(client, topology)
    return ref


def schedule_of(scheduler: Any) -> Callable[..., Any]:
    """Return what runs a graph: what ``dask.compute(scheduler=scheduler)`` would use, or threads.

    Raises
    ------
    ConfigurationError
        Dask cannot tell, or the client is asynchronous.
    """
    try:
        schedule: Callable[..., Any] = get_scheduler(scheduler=scheduler) or threaded.get
    except (RuntimeError, ValueError) as error:  # asynchronous clients, unknown names
        raise ConfigurationError(
            f"dask cannot run the query here: {error}. Pass scheduler='threads', or a client that "
            "is not asynchronous"
        ) from error
    return schedule


def runs_here(scheduler: Any) -> bool:
    """Whether Dask would use threads of this process, and nobody watches or limits its tasks."""
    if Callback.active - {ENDS_TASKS}:
        return False
    if _are_threads_chosen():
        return False
    return schedule_of(scheduler) is threaded.get


def run_tasks(
    function: Callable[..., Any],
    topology: Topology,
    shards: Sequence[str],
    request: Query | Answer,
    name: str,
    scheduler: Any,
    *more: Any,
    **options: Any,
) -> list[Any]:
    """Run `function` for each shard as a Dask task, wherever Dask is to run, and wait.

    Parameters
    ----------
    function : callable
        Called with the topology's reference, the shard's name, `request` and `more`.
    topology : Topology
        Where it runs.
    shards : sequence of str
        Names of the shards.
    request : Query or Answer
        What to ask them for.
    name : str
        How the tasks' keys begin.
    scheduler : str, callable or Client, optional
        As in ``dask.compute``.
    *more
        Further arguments.
    **options
        What whoever runs the tasks takes besides.
    """
    schedule = schedule_of(scheduler)
    ref = share_topology(topology, schedule)
    token = uuid.uuid4().hex
    keys = [(f"{name}-{token}", number) for number in range(len(shards))]
    graph = {
        key: Task(key, function, ref, shard, request, *more)
        for key, shard in zip(keys, shards, strict=True)
    }
    query_id = (request.query if isinstance(request, Answer) else request).query_id
    return run_graph(graph, keys, query_id, schedule, **options)


def run_graph(
    graph: dict[Any, Task],
    keys: list[Any],
    query_id: str,
    schedule: Callable[..., Any],
    **options: Any,
) -> list[Any]:
    """Run a query's tasks, and return what those of `keys` do; stop them all if one fails."""
    if schedule is threaded.get and not _are_threads_chosen():
        # a thread for each shard, as they mostly wait
        options.setdefault("pool", _Daemons(max(1, min(len(keys), _MAX_THREADS))))
    try:
        results = schedule(graph, keys, **options)
    except BaseException:
        cancel_everywhere(schedule, query_id)
        raise
    return list(results)


def cancel_everywhere(schedule: Any, query_id: str) -> None:
    """Stop the query's backends, whether this process or a cluster's workers hold them."""
    cancel_query(query_id)
    client = client_of(schedule)
    if client is not None:

        def tell_workers() -> None:
            with suppress(Exception):  # the error that brought us here is the one to report
                client.run(cancel_query, query_id)

        # in a thread, as a worker that hangs must not keep the user waiting
        thread = threading.Thread(target=tell_workers, daemon=True)
        thread.start()
        thread.join(1.0)


def _are_threads_chosen() -> bool:
    """Whether the user says how many threads there are to be."""
    return bool(dask.config.get("num_workers", None) or dask.config.get("pool", None))


class _Daemons(Executor):
    """Runs each task in a thread of its own, which does not keep the process from ending.

    Those of dask's own pools do, until a server that hangs has answered.
    """

    def __init__(self, most: int) -> None:
        self._max_workers = most  # dask submits no more at a time

    def submit(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Start a task."""
        return in_thread(function, *args, **kwargs)


def client_of(schedule: Any) -> Any:
    """Return the ``distributed.Client`` whose method `schedule` is, or None."""
    client = getattr(schedule, "__self__", None)
    if "distributed" not in sys.modules or client is None:
        return None
    from distributed import Client

    return client if isinstance(client, Client) and not client.asynchronous else None
