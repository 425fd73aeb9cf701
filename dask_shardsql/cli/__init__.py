"""The command ``dask-shardsql``; nothing else in the library draws, or needs typer and rich."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from dask_shardsql.cli.outcome import Stopped, exit_status, say, silence_stdout, what_to_say

__all__ = ["app", "main"]

app = typer.Typer(
    name="dask-shardsql",
    help="One SQL text over many PostgreSQL shards.",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


class Merge(StrEnum):
    """What is answered."""

    UNION = "union"
    GLOBAL = "global"


class Form(StrEnum):
    """How an answer is written."""

    TABLE = "table"
    CSV = "csv"
    PARQUET = "parquet"
    ARROW = "arrow"


Text = Annotated[
    str,
    typer.Argument(
        metavar="SQL",
        help="One query: SELECT, VALUES, TABLE or WITH. With --param, %(name)s stands for a "
        "parameter and %% for a percent sign; without, % is itself.",
        show_default=False,
    ),
]
TopologyFile = Annotated[
    Path | None,
    typer.Option(
        "--topology",
        "-t",
        metavar="FILE",
        help="The shards: a TOML file. By default what 'shardsql.topology' in dask's "
        "configuration names (DASK_SHARDSQL__TOPOLOGY).",
        show_default=False,
    ),
]
Params = Annotated[
    list[str] | None,
    typer.Option(
        "--param",
        "-p",
        metavar="NAME=VALUE",
        help="A parameter for %(NAME)s; may be repeated. The value is sent as text, and "
        "PostgreSQL gives it the type that its place in the query needs.",
        show_default=False,
    ),
]
Scheduler = Annotated[
    str | None,
    typer.Option(
        "--scheduler",
        metavar="ADDRESS",
        help="Run on this Dask scheduler's workers, such as tcp://host:8786, instead of "
        "threads of this process.",
        show_default=False,
    ),
]
Merging = Annotated[
    Merge,
    typer.Option(
        "--merge",
        help="union: the rows of the shards, one after the other. global: what one database "
        "with the rows of all shards would answer; the topology must name the sharded tables.",
    ),
]
MaxGatherBytes = Annotated[
    str | None,
    typer.Option(
        "--max-gather-bytes",
        metavar="SIZE",
        help="With --merge global: how much may be brought together on one shard, such as 256MiB. "
        "By default what 'shardsql.max-gather-bytes' in dask's configuration says: 1 GiB.",
        show_default=False,
    ),
]


def _version(wanted: bool) -> None:
    if wanted:
        from dask_shardsql import __version__

        typer.echo(f"dask-shardsql {__version__}")
        raise typer.Exit


@app.callback()
def _app(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    """One SQL text over many PostgreSQL shards.

    Exit status: 0 when all went well, 1 for a failure (a shard or a scheduler that cannot be
    reached, a value that cannot be read), 2 for input that cannot work (options, the topology,
    the query's text), 130 after Ctrl-C.
    """


@app.command()
def query(
    sql: Text,
    topology: TopologyFile = None,
    param: Params = None,
    output: Annotated[
        Form | None,
        typer.Option(
            "--output",
            "-f",
            help="table: aligned text for people, the first 1,000 rows. csv: a header, then every "
            "value as PostgreSQL writes it; NULL is an empty field, an empty text is "
            '"". parquet: a Parquet file. arrow: an Arrow IPC stream. By default what the '
            "ending of --output-file says, else table.",
            show_default=False,
        ),
    ] = None,
    output_file: Annotated[
        Path | None,
        typer.Option(
            "--output-file",
            "-o",
            metavar="FILE",
            help="Write to this file instead of stdout, once the answer is whole.",
            show_default=False,
        ),
    ] = None,
    scheduler: Scheduler = None,
    shard_column: Annotated[
        str | None,
        typer.Option(
            "--shard-column",
            metavar="NAME",
            help="Add a last column of this name that says which shard each row came from.",
            show_default=False,
        ),
    ] = None,
    merge: Merging = Merge.UNION,
    max_gather_bytes: MaxGatherBytes = None,
) -> None:
    """Run one query on every shard and write the answer to stdout.

    By default the rows are those of the shards one after the other: an aggregate, ORDER BY, LIMIT
    or DISTINCT holds within each shard, not over all of them, and a note says so; --merge global
    gives one answer over all rows. Only the answer goes to stdout; all else, such as the progress
    of each shard on a terminal, goes to stderr.

    Example: dask-shardsql query "SELECT * FROM orders WHERE o_totalprice > %(least)s" -t
    shards.toml -p least=1000 --output csv > orders.csv
    """
    from dask_shardsql.cli.query import run_query

    run_query(
        sql,
        topology=topology,
        params=param or [],
        form=output.value if output else None,
        output_file=output_file,
        scheduler=scheduler,
        shard_column=shard_column,
        merge=merge.value,
        max_gather_bytes=max_gather_bytes,
    )


@app.command()
def explain(
    sql: Text,
    topology: TopologyFile = None,
    param: Params = None,
    scheduler: Scheduler = None,
    merge: Merging = Merge.UNION,
    max_gather_bytes: MaxGatherBytes = None,
    analyze: Annotated[
        bool,
        typer.Option(
            "--analyze", help="Run it as well, and measure rows, bytes and time for each shard."
        ),
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Write one JSON object instead of text for people.")
    ] = False,
) -> None:
    """Write how a query would be answered: on which shards, by what SQL, how much is moved.

    Nothing of it is run without --analyze. With --merge global a query that cannot be answered so
    is explained too: its strategy is "refuse", and the exit status is 0.

    Example: dask-shardsql explain "SELECT count(*) FROM orders" -t shards.toml --merge global
    """
    from dask_shardsql.cli.explain import run_explain

    run_explain(
        sql,
        topology=topology,
        params=param or [],
        scheduler=scheduler,
        merge=merge.value,
        max_gather_bytes=max_gather_bytes,
        analyze=analyze,
        as_json=as_json,
    )


@app.command()
def demo(
    shards: Annotated[int, typer.Option("--shards", min=1, max=32, help="Number of shards.")] = 4,
    scale: Annotated[
        float,
        typer.Option(
            "--scale",
            help="TPC-H's scale factor, above 0 and up to 10: 0.01 is 60,000 line items, 1 is "
            "6 million, which takes some minutes and 4 GB in the temp directory.",
        ),
    ] = 0.01,
    keep: Annotated[
        bool,
        typer.Option("--keep", help="Leave the shards running, and write a topology for them."),
    ] = False,
    topology: Annotated[
        Path,
        typer.Option(
            "--topology",
            "-t",
            metavar="FILE",
            help="Where --keep writes the topology: a new file, for its owner only, as it holds "
            "a password.",
        ),
    ] = Path("shards.toml"),
) -> None:
    """Start PostgreSQL shards on this machine, fill them with TPC-H data and query them.

    Two workers of a local Dask cluster read a sharded table, a JOIN with a reference table and a
    single row. One answer is compared with that of a server that holds all the rows. Takes about
    15 seconds and leaves nothing behind, unless --keep is given. Needs the package's extra "demo".
    """
    from dask_shardsql.cli.demo import run_demo

    run_demo(shards, scale, topology if keep else None)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Parameters
    ----------
    arguments : sequence of str, optional
        By default those of this process.

    Returns
    -------
    int
        The exit status: 0, 1 for a failure, 2 for input that cannot work, 130 after Ctrl-C.
    """
    warnings.showwarning = _show_warning
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a character the terminal lacks is no failure
            stream.reconfigure(errors="backslashreplace")
    try:
        status = app(
            list(arguments) if arguments is not None else None,
            prog_name="dask-shardsql",
            standalone_mode=False,
        )
        if sys.stdout is not None:
            sys.stdout.flush()
    except (KeyboardInterrupt, typer.Abort):
        return exit_status(Stopped())
    except BrokenPipeError as error:  # the reader has had enough: not worth a word
        silence_stdout()
        return exit_status(error)
    except Exception as error:  # noqa: BLE001 - whatever it is, people get a line and a status
        say(what_to_say(error))
        return exit_status(error)
    return int(status or 0)  # a typer.Exit comes back as its status


def _show_warning(message: Any, category: Any, *place: Any, **more: Any) -> None:
    say(f"warning: {message}")
