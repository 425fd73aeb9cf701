"""What a query tells about itself while it runs; nothing here draws.

Every shard's task emits events in the process it runs in. There they reach the listeners of that
process, and, from a Dask worker, the listeners of every client, through the scheduler's own
event log.
"""

from __future__ import annotations

import os
import sys
import threading
import uuid
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["TOPIC", "ShardEvent", "current_worker", "emit", "is_heard", "listen"]

#: The topic of the scheduler's event log that workers publish to.
TOPIC = "dask_shardsql"


@dataclass(frozen=True)
class ShardEvent:
    """One shard's progress with one query.

    Parameters
    ----------
    query_id : str
        The query, as in the sessions' ``application_name``.
    shard : str
        The shard's name.
    state : str
        ``started``, ``reading``, ``finished`` or ``failed``.
    rows : int
        Rows read so far.
    nbytes : int
        Their size so far, in bytes, as Arrow holds them.
    seconds : float
        Time since the shard's task started.
    slice, slices : int
        Which slice of the shard it is about, counted from 0, and of how many: each tells for
        itself. ``0`` and ``1`` where the shard is not split.
    part : {"answer", "partial"}
        Whether it is about rows of the answer, or about what one shard was sent of them by another
        (or had itself) to make the answer of; then `nbytes` is what was sent.
    """

    query_id: str
    shard: str
    state: str
    rows: int = 0
    nbytes: int = 0
    seconds: float = 0.0
    slice: int = 0
    slices: int = 1
    part: str = "answer"


Listener = Callable[[ShardEvent], None]

_listeners: list[Listener] = []
_hearing: weakref.WeakKeyDictionary[Any, list[Listener]] = weakref.WeakKeyDictionary()
_token = uuid.uuid4().hex
_lock = threading.Lock()


def emit(event: ShardEvent) -> None:
    """Tell the listeners of this process and, from a Dask worker, those of the clients."""
    with _lock:
        listeners = tuple(_listeners)
    for listener in listeners:
        listener(event)
    if (worker := current_worker()) is not None:
        worker.log_event(TOPIC, {**asdict(event), "process": _process()})


def is_heard() -> bool:
    """Whether anybody in this process listens; a Dask worker's events are heard elsewhere."""
    return bool(_listeners)


@contextmanager
def listen(listener: Listener) -> Iterator[None]:
    """Call `listener` with every :class:`ShardEvent` while the block runs.

    Parameters
    ----------
    listener : callable
        Called from whichever thread the event arose in; it must be quick and must not raise.

    Notes
    -----
    With a current ``distributed.Client`` the events of its workers arrive too, a moment later.
    """
    with _lock:
        _listeners.append(listener)
    try:
        with _listening_on_cluster(listener):
            yield
    finally:
        with _lock:
            _listeners.remove(listener)


@contextmanager
def _listening_on_cluster(listener: Listener) -> Iterator[None]:
    client = None
    if "distributed" in sys.modules:
        from distributed import default_client

        with suppress(ValueError):  # no client is current
            client = default_client()
    if client is None or client.asynchronous:
        yield
        return

    with _lock:
        hearing = _hearing.setdefault(client, [])
        hearing.append(listener)
    if len(hearing) == 1:  # a client has one handler for a topic, so it serves all listeners
        client.subscribe_topic(TOPIC, lambda logged: _hear(hearing, logged))
    try:
        yield
    finally:
        with _lock:
            hearing.remove(listener)
        if not hearing:
            client.unsubscribe_topic(TOPIC)


def _hear(listeners: list[Listener], logged: tuple[float, dict[str, Any]]) -> None:
    """Pass on an event of a worker; one in this process has told the listeners itself."""
    said = logged[1]
    if said.get("process") == _process():
        return
    # distributed adds the worker's address
    event = ShardEvent(**{k: v for k, v in said.items() if k in ShardEvent.__dataclass_fields__})
    for listener in tuple(listeners):
        listener(event)


def current_worker() -> Any:
    """Return the ``distributed.Worker`` that runs this task, or None."""
    if "distributed" in sys.modules:
        from distributed import get_worker

        with suppress(ValueError):  # not on a worker
            return get_worker()
    return None


def _process() -> str:
    return f"{_token}-{os.getpid()}"
