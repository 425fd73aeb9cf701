"""Tasks that end with the computation they are part of.

When a computation fails, or Ctrl-C ends it, Dask leaves the tasks that it has given to threads to
themselves. What they run for it is then cancelled: another computation of the same query goes on.
On threads of this process a callback tells of the end, on a worker its plugin (`worker_plugin.py`).
"""

from __future__ import annotations

import contextvars
import functools
import multiprocessing
import threading
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

from dask._task_spec import Task
from dask.callbacks import Callback

from dask_shardsql.engine.cancel import cancel_query, is_cancelled
from dask_shardsql.engine.drivers.base import Query
from dask_shardsql.engine.fetch import Answer
from dask_shardsql.engine.registry import TopologyRef
from dask_shardsql.engine.snapshots import Snapshot, end_snapshots
from dask_shardsql.errors import ShardSQLError
from dask_shardsql.progress import current_worker

__all__ = ["ENDS_TASKS", "Stoppable", "end_after_errors", "in_thread", "stop"]


class Stoppable:
    """What a task calls: a function that asks a shard, whose every call can be cancelled by itself.

    Parameters
    ----------
    function : callable
        Takes the topology's reference, a shard's name, what to ask it for, and maybe more.
    """

    __slots__ = ("_function", "_has_begun", "_lock", "_next", "_runs")

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self._lock = threading.Lock()
        self._runs: set[str] = set()
        self._next, self._has_begun = uuid.uuid4().hex, False

    def __call__(self, ref: TopologyRef, shard: str, request: Query | Answer, *more: Any) -> Any:
        """Call the function."""
        with self._lock:
            run, self._next, self._has_begun = self._next, uuid.uuid4().hex, True
            self._runs.add(run)
        call = functools.partial(self._run, run, ref, shard, _run_as(run, request), *more)
        # drivers wait in C, where Ctrl-C does not reach the main thread
        return in_thread(call).result() if _is_for_ctrl_c() else call()

    def stop(self) -> None:
        """Cancel what is running, or the first call, where it is still to come."""
        with self._lock:
            runs = tuple(self._runs) if self._has_begun else (self._next,)
        for run in runs:
            cancel_query(run)

    def _run(self, run: str, *args: Any) -> Any:
        try:
            return self._function(*args)
        except ShardSQLError:
            if is_cancelled(run) and current_worker() is not None:
                from distributed import Reschedule

                for snapshot in args:
                    if isinstance(snapshot, Snapshot):
                        snapshot.let_go()
                raise Reschedule from None  # if it is wanted again by now
            raise
        finally:
            self._runs.discard(run)

    def __reduce__(self) -> Any:
        return (Stoppable, (self._function,))


def in_thread(function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
    """Call it in a thread of its own, which does not keep the process from ending."""
    future: Future[Any] = Future()
    context = contextvars.copy_context()  # as dask's pools do

    def run() -> None:
        try:
            future.set_result(context.run(function, *args, **kwargs))
        except BaseException as error:  # noqa: BLE001 - raised by who waits for it
            future.set_exception(error)

    threading.Thread(target=run, name="dask_shardsql-task", daemon=True).start()
    return future


def stop(task: Any) -> None:
    """Stop what can be stopped of a task of whatever graph."""
    for stoppable in _inside(task):
        stoppable.stop()


def end_after_errors() -> None:
    """Make sure that, if what is computed next on threads of this process fails, all of it ends."""
    Callback.active.add(ENDS_TASKS)


def _is_for_ctrl_c() -> bool:
    """Whether Ctrl-C would be raised here: a pool's process is not what the user works with."""
    in_main = threading.current_thread() is threading.main_thread()
    return in_main and multiprocessing.parent_process() is None


def _run_as(run: str, request: Query | Answer) -> Query | Answer:
    if isinstance(request, Answer):
        return replace(request, query=replace(request.query, run=run))
    return replace(request, run=run)


def _end_tasks(graph: Any, state: Any, errored: bool) -> None:
    """Called by Dask when a computation on this process's threads has ended."""
    if not errored:
        return
    for key in state.get("running", ()):
        stop(graph.get(key))
    end_snapshots(state)


def _inside(task: Any) -> Iterator[Stoppable]:
    """Give what can be stopped of a task, which may be several that were fused."""
    if not isinstance(task, Task):
        return
    if isinstance(task.func, Stoppable):
        yield task.func
    elif task.has_subgraph():
        for inner in task.args[0].values():
            yield from _inside(inner)


ENDS_TASKS = Callback(finish=_end_tasks)._callback
"""How Dask knows what ends tasks after errors: nobody else watches through it."""
