"""What becomes of an error: one message on stderr, and an exit status."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

import typer

from dask_shardsql.errors import (
    ColumnError,
    ConfigurationError,
    ParameterError,
    QueryError,
    ShardSQLError,
    StatementError,
    TopologyError,
)

__all__ = [
    "InputError",
    "Stopped",
    "exit_status",
    "flush_and_end",
    "in_options",
    "say",
    "silence_stdout",
    "stop_on_signals",
    "what_to_say",
]

# typer brings a click of its own or uses the installed one, depending on its version; the class
# of all its usage errors is the base of this one in both.
_USAGE_ERROR: type[Exception] = typer.BadParameter.__bases__[0]
_BAD_INPUT = (
    _USAGE_ERROR,
    ColumnError,
    ConfigurationError,
    ParameterError,
    StatementError,
    TopologyError,
)

_OPTIONS = {
    "merge='global'": "--merge global",
    "max_gather_bytes": "--max-gather-bytes",
    "shard_column": "--shard-column",
}


class InputError(ConfigurationError):
    """An option or a file that the command cannot work with."""


class Stopped(KeyboardInterrupt):
    """The user, or a signal, ended the command.

    Parameters
    ----------
    number : int, default SIGINT
        The signal.
    """

    def __init__(self, number: int = signal.SIGINT) -> None:
        super().__init__(number)
        self.number = int(number)


def exit_status(error: BaseException) -> int:
    """Return the exit status for an error: 2 for input that cannot work, 1 for a failure.

    A query that the server refuses as written (SQLSTATE class 42: syntax, names, types, rights)
    is input. Signals give 128 and their number, as in a shell.
    """
    if isinstance(error, KeyboardInterrupt):
        return 128 + getattr(error, "number", signal.SIGINT)
    if isinstance(error, BrokenPipeError):
        return 128 + signal.SIGPIPE
    if isinstance(error, _BAD_INPUT):
        return 2
    if isinstance(error, QueryError) and (error.sqlstate or "").startswith("42"):
        return 2
    return 1


def what_to_say(error: BaseException) -> str:
    """Return what stderr says of an error."""
    if isinstance(error, _USAGE_ERROR):
        context = getattr(error, "ctx", None)
        path = context.command_path if context is not None else "dask-shardsql"
        message = str(error.format_message())  # type: ignore[attr-defined]
        return f"error: {message or 'a command is missing'}\nTry '{path} --help'."
    if isinstance(error, QueryError):  # which quotes the text
        return f"error: {error}"
    if isinstance(error, ShardSQLError):
        return f"error: {in_options(str(error))}"
    if isinstance(error, OSError):
        return f"error: {error.strerror or error}" + (
            f": {error.filename}" if error.filename else ""
        )
    return f"error: {type(error).__name__}: {error}"


def in_options(text: str) -> str:
    """Return what the library says with its arguments' names replaced by the command's options."""
    for argument, option in _OPTIONS.items():
        text = text.replace(argument, option)
    return text


def say(text: str) -> None:
    """Write a line to stderr; a stderr that is closed is no reason to fail."""
    with suppress(OSError, ValueError, AttributeError):
        sys.stderr.write(text + "\n")
        sys.stderr.flush()


def silence_stdout() -> None:
    """Let what is still buffered for a closed pipe go nowhere, also at interpreter exit."""
    with suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def flush_and_end(status: int) -> None:
    """End the process now, without waiting for threads that may hang in a network call."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, AttributeError):
            stream.flush()
    os._exit(status)


@contextmanager
def stop_on_signals() -> Iterator[None]:
    """Raise :class:`Stopped` in this block at the first of SIGINT, SIGTERM and SIGHUP.

    What comes after the first one is ignored, so that it cannot interrupt the cleaning up.
    """

    stopped: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        stopped.append(number)
        for each in before:
            signal.signal(each, signal.SIG_IGN)
        raise Stopped(number)

    # One that is ignored from the start (nohup, a shell's background job) stays ignored.
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {n: signal.getsignal(n) for n in signals if signal.getsignal(n) != signal.SIG_IGN}
    for number in before:
        signal.signal(number, stop)
    try:
        yield
    finally:
        if not stopped:
            for number, handler in before.items():
                signal.signal(number, handler)
