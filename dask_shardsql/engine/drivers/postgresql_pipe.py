"""One session's COPY into another one's, in the servers' own form."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import psycopg2

from dask_shardsql.engine.drivers.gathering import TargetFailedError

__all__ = ["pipe_copy"]

_PIPE_BYTES = 1 << 16


class _Reader:
    """The reading end of a pipe; what goes wrong on the way is kept, as psycopg2 would lose it."""

    def __init__(self, end: int, count: Callable[[int], None], check: Callable[[], None]) -> None:
        self._file = os.fdopen(end, "rb", 0)
        self._count, self._check = count, check
        self.failure: BaseException | None = None

    def read(self, size: int = _PIPE_BYTES) -> bytes:
        """Return some bytes; none at the end of what the writer wrote without an error."""
        try:
            data = self._file.read(size)
            self._count(len(data))
            if not data:
                self._check()
        except BaseException as error:
            self.failure = error
            raise
        return data

    def readline(self) -> bytes:
        """Raise: psycopg2 asks whether it is there, and never calls it."""
        raise NotImplementedError

    def close(self) -> None:
        """Close it; the writer then meets an error."""
        self._file.close()


def pipe_copy(
    source: Any, copy_out: str, target: Any, copy_in: str, count: Callable[[int], None]
) -> None:
    """Let one session's COPY be another one's; nobody else uses either meanwhile."""
    read_end, write_end = os.pipe()
    failures: list[BaseException] = []

    def send() -> None:
        try:
            with os.fdopen(write_end, "wb", _PIPE_BYTES) as file:
                source.copy_expert(copy_out, file)
        except BaseException as error:  # noqa: BLE001 - raised by who reads
            failures.append(error)

    def check() -> None:
        thread.join()
        if failures:
            raise failures[0]

    thread = threading.Thread(target=send, name="dask_shardsql-gather", daemon=True)
    reader = _Reader(read_end, count, check)
    thread.start()
    try:
        target.copy_expert(copy_in, reader, _PIPE_BYTES)
    except BaseException as error:
        for cursor in (source, target):
            cursor.connection.request_cancel()
        reader.close()
        thread.join(1.0)
        for cursor in (source, target):
            with suppress(psycopg2.Error):
                cursor.connection.close()
        if reader.failure is not None:
            raise reader.failure from None
        if isinstance(error, psycopg2.Error):
            raise TargetFailedError(error) from None
        raise
    reader.close()
