"""Draw what a query tells about itself: a line for each shard."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace

from rich.console import Console, RenderableType
from rich.live import Live
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from dask_shardsql.progress import ShardEvent, listen

__all__ = ["ShardProgress", "drawn", "size"]

_MOST_LINES = 12
_ENDED = ("finished", "failed")


class ShardProgress:
    """What is known of each shard of one query; rich can print it at any moment.

    Parameters
    ----------
    shards : sequence of str
        The shards' names.
    """

    def __init__(self, shards: Sequence[str]) -> None:
        self._lock = threading.Lock()
        self._latest: dict[str, ShardEvent | None] = dict.fromkeys(shards)
        self._heard: dict[str, float] = {}
        self._slices: dict[str, dict[int, ShardEvent]] = {}
        self._spinner = Spinner("dots", style="cyan")
        self._all_ended = threading.Event()

    def hear(self, event: ShardEvent) -> None:
        """Take note of an event; from any thread."""
        if event.part != "answer":
            return
        with self._lock:
            event = self._of_all_slices(event)
            self._latest[event.shard] = event
            self._heard[event.shard] = time.monotonic() - event.seconds
            if all(e is not None and e.state in _ENDED for e in self._latest.values()):
                self._all_ended.set()
            else:
                self._all_ended.clear()

    def _of_all_slices(self, event: ShardEvent) -> ShardEvent:
        """Return what is known of the whole shard, of which each slice tells for itself."""
        if event.slices == 1:
            return event
        known = self._slices.setdefault(event.shard, {})
        known[event.slice] = event
        states = {each.state for each in known.values()}
        state = "failed" if "failed" in states else "reading"
        if len(known) == event.slices and states == {"finished"}:
            state = "finished"
        return replace(
            event,
            state=state,
            rows=sum(each.rows for each in known.values()),
            nbytes=sum(each.nbytes for each in known.values()),
            seconds=max(
                event.seconds, time.monotonic() - self._heard.get(event.shard, time.monotonic())
            ),
        )

    def wait(self, seconds: float) -> bool:
        """Wait until every shard has ended: events of a cluster's workers come a moment later."""
        return self._all_ended.wait(seconds)

    @property
    def running(self) -> set[str]:
        """The ids of the queries that some shard has started and not ended."""
        with self._lock:
            known = [event for event in self._latest.values() if event is not None]
        return {event.query_id for event in known if event.state not in _ENDED}

    @property
    def rows(self) -> int:
        """The rows read so far."""
        with self._lock:
            return sum(event.rows for event in self._latest.values() if event is not None)

    def __rich__(self) -> RenderableType:
        with self._lock:
            latest = dict(self._latest)
        # What still runs is worth a line first; the order of the topology otherwise.
        names = list(latest)
        if len(names) > _MOST_LINES:
            names.sort(key=lambda name: _ended(latest[name]))
            names = names[: _MOST_LINES - 1]
        table = Table.grid(padding=(0, 2, 0, 0), pad_edge=False)
        table.add_column(width=1)
        table.add_column()
        for _ in range(3):
            table.add_column(justify="right", no_wrap=True)
        for name in names:
            table.add_row(*self._line(name, latest[name]))
        if len(names) < len(latest):
            left = [event for name, event in latest.items() if name not in names]
            rows = sum(event.rows for event in left if event is not None)
            more = Text(f"{len(left)} more")
            table.add_row("", more, _rows(rows), size(_bytes(left)), "")
        return table

    def _line(self, name: str, event: ShardEvent | None) -> list[RenderableType]:
        if event is None:
            return [Text("·", style="dim"), Text(name), Text("waiting", style="dim"), "", ""]
        seconds = event.seconds
        if event.state not in _ENDED:
            seconds = time.monotonic() - self._heard[name]
        mark: RenderableType = self._spinner
        if event.state == "finished":
            mark = Text("✓", style="green")
        elif event.state == "failed":
            mark = Text("✗", style="red")
        return [mark, Text(name), _rows(event.rows), size(event.nbytes), f"{seconds:.2f} s"]


def _ended(event: ShardEvent | None) -> bool:
    return event is not None and event.state in _ENDED


def _rows(rows: int) -> str:
    return f"{rows:,} row{' ' if rows == 1 else 's'}"


def _bytes(events: Sequence[ShardEvent | None]) -> int:
    return sum(event.nbytes for event in events if event is not None)


def size(nbytes: float) -> str:
    """Write a number of bytes for people."""
    for unit in ("B", "kB", "MB"):
        if nbytes < 999.5 or (unit == "B" and nbytes < 1000):
            return (
                f"{nbytes:.0f} {unit}" if unit == "B" or nbytes >= 100 else f"{nbytes:.1f} {unit}"
            )
        nbytes /= 1000
    return f"{nbytes:.1f} GB"


@contextmanager
def drawn(progress: ShardProgress, console: Console, *, erase: bool) -> Iterator[None]:
    """Listen to what runs in this block, and draw it when `console` is a terminal.

    Parameters
    ----------
    progress : ShardProgress
        What hears the events.
    console : rich.console.Console
        Where to draw.
    erase : bool
        Whether nothing of it stays on the screen.
    """
    with ExitStack() as stack:
        if console.is_terminal:
            stack.enter_context(
                Live(progress, console=console, transient=erase, refresh_per_second=10)
            )
        stack.enter_context(listen(progress.hear))
        yield
