"""Asking shards from the shell: what is asked of which, from where, and how that may end."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import dask
import typer
from rich.console import Console

from dask_shardsql.cli.outcome import (
    InputError,
    Stopped,
    exit_status,
    flush_and_end,
    say,
    silence_stdout,
    stop_on_signals,
)
from dask_shardsql.cli.progress import ShardProgress, drawn
from dask_shardsql.config import default_topology
from dask_shardsql.errors import ShardSQLError
from dask_shardsql.topology import Topology

__all__ = ["asking", "ending", "named_topology", "parse_params"]

_CONNECT_SECONDS = 10
_CANCEL_SECONDS = 3.0


def parse_params(params: Sequence[str], sql: str) -> dict[str, str] | None:
    """Return the parameters by name; None without any, so that a ``%`` in the text is itself."""
    values: dict[str, str] = {}
    for given in params:
        name, equals, value = given.partition("=")
        if not equals or not name:
            raise InputError(f"--param {given!r} is not NAME=VALUE")
        if name in values:
            raise InputError(f"--param {name} is given twice")
        if f"%({name})s" not in sql:
            raise InputError(f"--param {name}: the query has no %({name})s")
        values[name] = value
    return values or None


def named_topology(file: Path | None) -> Topology:
    """Return the topology of that file, or the one that dask's configuration names."""
    if file is not None:
        return Topology.from_toml(file)
    if dask.config.get("shardsql.topology", None) is None:
        raise InputError(
            "no topology: name a file with --topology shards.toml, or set 'shardsql.topology' in "
            "dask's configuration"
        )
    return default_topology(None)


@contextmanager
def asking(topology: Topology, scheduler: str | None, console: Console | None) -> Iterator[Any]:
    """Ask shards while the block runs, which a signal ends, and give the client of a scheduler.

    Parameters
    ----------
    topology : Topology
        The shards.
    scheduler : str, optional
        The address of a Dask scheduler.
    console : rich.console.Console, optional
        Where to draw what the shards do.
    """
    progress = ShardProgress([shard.name for shard in topology.shards])
    with ExitStack() as stack:
        stack.enter_context(stop_on_signals())
        client = stack.enter_context(_connected(scheduler))
        if console is not None:
            stack.enter_context(drawn(progress, console, erase=True))
        try:
            yield client
        except Stopped:
            _wait_for_end(progress)
            raise
        finally:
            _leave_nothing_on(client, topology)


@contextmanager
def ending() -> Iterator[None]:
    """End the command where Ctrl-C, a reader that has had enough, or a full disk ends the block."""
    try:
        yield
    except KeyboardInterrupt as stopped:
        say("stopped")
        flush_and_end(exit_status(stopped))
    except BrokenPipeError as error:  # the reader has had enough: not worth a word
        silence_stdout()
        raise typer.Exit(exit_status(error)) from None
    except OSError:  # what is still buffered would fail again at exit
        silence_stdout()
        raise


@contextmanager
def _connected(address: str | None) -> Iterator[Any]:
    """Make a client of the scheduler at `address` current while the block runs."""
    if address is None:
        yield None
        return
    import logging

    from distributed import Client
    from distributed.utils import silence_logging_cmgr

    # What asyncio says of tasks that a Ctrl-C left behind helps nobody.
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    problem = ""
    with silence_logging_cmgr(logging.CRITICAL):
        try:
            # not as default: a client that cannot connect would stay in dask's configuration
            client = Client(address, timeout=_CONNECT_SECONDS, set_as_default=False)
        except (ValueError, TypeError) as error:
            raise InputError(f"--scheduler {address!r} is no address: {error}") from error
        except OSError as error:
            problem = str(error)
        if problem:
            raise ShardSQLError(
                f"cannot reach the Dask scheduler at {address}: {problem}. Check the address, and "
                "that 'dask scheduler' runs there"
            )
        with client, client.as_current():
            if not client.scheduler_info()["workers"]:
                say(f"note: the scheduler at {address} has no workers yet; waiting for one")
            yield client


def _leave_nothing_on(client: Any, topology: Topology) -> None:
    """Take the topology from the workers again: the next command brings its own."""
    if client is not None:
        from dask_shardsql.engine.worker_plugin import take_from_workers

        with suppress(Exception):  # nothing that the user asked for depends on it
            take_from_workers(client, topology)


def _wait_for_end(progress: ShardProgress) -> None:
    """Wait until every shard has said that it ended: ``collect`` has cancelled the query."""
    deadline = time.monotonic() + _CANCEL_SECONDS
    while progress.running and time.monotonic() < deadline and not progress.wait(0.2):
        pass
