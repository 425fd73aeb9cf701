"""``dask-shardsql query``: one answer to stdout or to a file."""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import dask
import pyarrow as pa
import typer
from rich.console import Console
from rich.text import Text

from dask_shardsql.cli.outcome import (
    InputError,
    Stopped,
    exit_status,
    flush_and_end,
    say,
    silence_stdout,
    stop_on_signals,
)
from dask_shardsql.cli.output import (
    destination,
    form_of,
    write_arrow,
    write_csv,
    write_parquet,
)
from dask_shardsql.cli.progress import ShardProgress, drawn
from dask_shardsql.cli.table import MOST_ROWS, count_line, table_lines
from dask_shardsql.config import default_topology
from dask_shardsql.eager import collect
from dask_shardsql.errors import ShardSQLError, UnionSemanticsWarning
from dask_shardsql.topology import Topology

__all__ = ["run_query"]

_CONNECT_SECONDS = 10
_CANCEL_SECONDS = 3.0
_BINARY = ("arrow", "parquet")


def run_query(
    sql: str,
    *,
    topology: Path | None,
    params: Sequence[str],
    form: str | None,
    output_file: Path | None,
    scheduler: str | None,
    shard_column: str | None,
    merge: str,
) -> None:
    """Run one query and write its answer.

    Parameters
    ----------
    sql : str
        The text.
    topology : path, optional
        The TOML file; by default what dask's configuration names.
    params : sequence of str
        ``name=value`` for each parameter.
    form : {"table", "csv", "parquet", "arrow"}, optional
        How to write the answer; by default what the ending of `output_file` says, else a table.
    output_file : path, optional
        Where to write it; stdout by default.
    scheduler : str, optional
        The address of a Dask scheduler; by default threads of this process do the work.
    shard_column : str, optional
        Name of an extra column with each row's shard.
    merge : {"union", "global"}
        What is answered, as in :func:`dask_shardsql.collect`.

    Raises
    ------
    InputError
        The options do not fit each other, or name something that is not there.
    ShardSQLError
        Whatever :func:`dask_shardsql.collect` raises.
    OSError
        The scheduler cannot be reached, or the answer cannot be written.
    """
    chosen = form_of(output_file, form)
    _check_destination(chosen, output_file)
    values = _parse_params(params, sql)
    shards = _topology(topology)
    console = Console(stderr=True, highlight=False)
    progress = ShardProgress([shard.name for shard in shards.shards])
    started = time.monotonic()
    try:
        with (
            stop_on_signals(),
            _connected(scheduler) as client,
            warnings.catch_warnings(record=True) as caught,
            drawn(progress, console, erase=True),
        ):
            warnings.simplefilter("always", UnionSemanticsWarning)
            options = {"shard_column": shard_column, "merge": merge, "scheduler": client}
            try:
                table = collect(sql, shards, values, **options)
            except Stopped:
                _wait_for_end(progress)
                raise
            finally:
                _leave_nothing_on(client, shards)
        seconds = time.monotonic() - started
        for warning in caught:
            say(f"note: {warning.message}")
        _write(table, chosen, output_file)
    except KeyboardInterrupt as stopped:
        say("stopped")
        flush_and_end(exit_status(stopped))
    except BrokenPipeError as error:  # the reader has had enough: not worth a word
        silence_stdout()
        raise typer.Exit(exit_status(error)) from None
    except OSError:  # what is still buffered would fail again at exit
        silence_stdout()
        raise
    if console.is_terminal:
        place = f" to {output_file}" if output_file else ""
        say(f"{len(table):,} rows from {len(shards.shards)} shards{place} in {seconds:.2f} s")


def _check_destination(form: str, file: Path | None) -> None:
    if file is not None:
        if file.is_dir():
            raise InputError(f"--output-file {file} is a directory")
        if not file.parent.is_dir():
            raise InputError(f"--output-file {file}: there is no directory {file.parent}")
    elif form in _BINARY and sys.stdout is not None and sys.stdout.isatty():
        raise InputError(
            f"{form} is binary, and stdout is a terminal: redirect it (> answer.{form}), or name "
            f"a file with --output-file"
        )


def _parse_params(params: Sequence[str], sql: str) -> dict[str, str] | None:
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


def _topology(file: Path | None) -> Topology:
    if file is not None:
        return Topology.from_toml(file)
    if dask.config.get("shardsql.topology", None) is None:
        raise InputError(
            "no topology: name a file with --topology shards.toml, or set 'shardsql.topology' in "
            "dask's configuration"
        )
    return default_topology(None)


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


def _write(table: pa.Table, form: str, file: Path | None) -> None:
    with destination(file) as sink:
        if form == "table":
            _write_table(table, sink, to_file=file is not None)
        else:
            writers = {"csv": write_csv, "parquet": write_parquet, "arrow": write_arrow}
            writers[form](table, sink, say)


def _write_table(table: pa.Table, sink: IO[bytes], *, to_file: bool) -> None:
    terminal = not to_file and sys.stdout.isatty()
    console = Console(highlight=False, markup=False, emoji=False)
    heading, body = table_lines(table, console.width if terminal else None)
    lines = [*heading, *body, count_line(len(table))]
    if terminal:
        for line in heading[:1]:
            console.print(Text(line, style="bold"), no_wrap=True, overflow="ignore", crop=False)
        lines = lines[len(heading[:1]) :]
        sys.stdout.flush()
    encoding = "utf-8" if to_file else sys.stdout.encoding
    sink.write(("\n".join(lines) + "\n").encode(encoding, "backslashreplace"))
    if len(table) > MOST_ROWS:
        say(
            f"note: a table shows the first {MOST_ROWS:,} rows; csv, parquet and arrow hold all "
            f"{len(table):,} (--output)"
        )
