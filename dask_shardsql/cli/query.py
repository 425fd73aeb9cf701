"""``dask-shardsql query``: one answer to stdout or to a file."""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import pyarrow as pa
from rich.console import Console
from rich.text import Text

from dask_shardsql.cli.asking import asking, ending, named_topology, parse_params
from dask_shardsql.cli.outcome import InputError, in_options, say
from dask_shardsql.cli.output import (
    destination,
    form_of,
    write_arrow,
    write_csv,
    write_parquet,
)
from dask_shardsql.cli.table import MOST_ROWS, count_line, table_lines
from dask_shardsql.eager import collect
from dask_shardsql.errors import UnionSemanticsWarning

__all__ = ["run_query"]

_BINARY = ("arrow", "parquet")
_IN_PYTHON = "; filter this warning if the union is meant"


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
    max_gather_bytes: str | None,
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
    max_gather_bytes : str, optional
        How much may be brought together for that, as there.

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
    values = parse_params(params, sql)
    shards = named_topology(topology)
    console = Console(stderr=True, highlight=False)
    started = time.monotonic()
    with ending():
        with (
            asking(shards, scheduler, console) as client,
            warnings.catch_warnings(record=True) as caught,
        ):
            warnings.simplefilter("always", UnionSemanticsWarning)
            table = collect(
                sql,
                shards,
                values,
                shard_column=shard_column,
                merge=merge,
                max_gather_bytes=max_gather_bytes,
                scheduler=client,
            )
        seconds = time.monotonic() - started
        for warning in caught:
            say(f"note: {in_options(str(warning.message).removesuffix(_IN_PYTHON))}")
        _write(table, chosen, output_file)
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
