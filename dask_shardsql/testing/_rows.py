"""Python rows or CSV text -> what COPY reads, split by shard."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import timedelta
from typing import Any

from dask_shardsql.errors import ConfigurationError

_TEXT_ESCAPES = str.maketrans({"\\": "\\\\", "\t": "\\t", "\n": "\\n", "\r": "\\r"})


def split(
    table: str,
    rows: Iterable[Sequence[Any]] | bytes | str,
    shard_of: Callable[[Sequence[Any]], int] | None,
    n: int,
) -> tuple[list[list[str]], list[str], int]:
    """Return each shard's lines for COPY, all lines, and the number of rows."""
    records = _csv_records(rows) if isinstance(rows, bytes | str) else _text_records(rows)
    everything: list[str] = []
    parts: list[list[str]] = [[] for _ in range(n)]
    for row, line in records:
        everything.append(line)
        if shard_of is not None:
            number = shard_of(row)
            if not 0 <= number < n:
                raise ConfigurationError(
                    f"cannot load '{table}': shard_of gave {number!r} for row {len(everything)}; "
                    f"with {n} shards it must give 0 to {n - 1}"
                )
            parts[number].append(line)
    if shard_of is None:
        parts = [everything] * n
    return parts, everything, len(everything)


def _csv_records(text: bytes | str) -> Iterator[tuple[Sequence[Any], str]]:
    """Yield each record's fields and its own text, unchanged: a quoted "" is no NULL."""
    decoded = text.decode() if isinstance(text, bytes) else text
    taken: list[str] = []

    def lines() -> Iterator[str]:
        for line in io.StringIO(decoded, newline=""):
            taken.append(line)
            yield line

    for fields in csv.reader(lines()):
        record = "".join(taken)
        taken.clear()
        yield fields, record if record.endswith("\n") else record + "\n"


def _text_records(rows: Iterable[Sequence[Any]]) -> Iterator[tuple[Sequence[Any], str]]:
    for row in rows:
        fields = ("\\N" if v is None else _plain(v).translate(_TEXT_ESCAPES) for v in row)
        yield row, "\t".join(fields) + "\n"


def _plain(value: Any) -> str:
    """Return `value` as PostgreSQL's input functions read it."""
    if isinstance(value, bool):
        return "t" if value else "f"
    if isinstance(value, bytes | bytearray | memoryview):
        return "\\x" + bytes(value).hex()
    if isinstance(value, timedelta):
        return f"{value.days} days {value.seconds} seconds {value.microseconds} microseconds"
    if isinstance(value, dict):
        return json.dumps(value)
    if isinstance(value, list | tuple):
        return "{" + ",".join(map(_element, value)) + "}"
    return str(value)


def _element(value: Any) -> str:
    if value is None:
        return "NULL"
    if isinstance(value, list | tuple):
        return _plain(value)
    return '"' + _plain(value).replace("\\", "\\\\").replace('"', '\\"') + '"'


def quote_identifier(name: str) -> str:
    """Return `name` quoted as an SQL identifier."""
    return '"' + name.replace('"', '""') + '"'


class _Lines(io.RawIOBase):
    """Lines of text as a file that COPY reads piece by piece."""

    def __init__(self, lines: Iterable[str]) -> None:
        self._lines = iter(lines)
        self._rest = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        size = len(buffer)
        pieces, have = [self._rest], len(self._rest)
        while have < size and (line := next(self._lines, None)) is not None:
            pieces.append(line.encode())
            have += len(pieces[-1])
        content = b"".join(pieces)
        self._rest = content[size:]
        buffer[: len(content[:size])] = content[:size]
        return len(content[:size])


def reader(lines: Iterable[str]) -> io.BufferedReader:
    """Return `lines` as a binary file."""
    return io.BufferedReader(_Lines(lines))
