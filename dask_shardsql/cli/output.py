"""An answer as CSV, Parquet or an Arrow stream, and where its bytes go."""

from __future__ import annotations

import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.compute as pc

from dask_shardsql.cli.outcome import InputError
from dask_shardsql.cli.text import as_text, join

__all__ = ["FORMS", "destination", "form_of", "write_arrow", "write_csv", "write_parquet"]

#: The forms of an answer, and the file name endings that stand for them.
FORMS = {
    "table": (".txt",),
    "csv": (".csv",),
    "parquet": (".parquet", ".pq"),
    "arrow": (".arrow", ".arrows"),
}
_ROWS_AT_A_TIME = 1 << 16
_CSV_QUOTED = r'[",\r\n]|^$|^\\\.$'


def write_csv(table: pa.Table, sink: IO[bytes], note: Callable[[str], None]) -> None:
    """Write a header and the rows as the server's own ``COPY ... (FORMAT csv, HEADER)`` would.

    NULL is an empty field, an empty text is ``""``; what needs quotes is quoted. Every value is
    in PostgreSQL's text form, so that COPY reads the file back; booleans are ``true``, ``false``.
    """
    header = _csv_fields(pa.array(table.column_names, pa.large_string())).to_pylist()
    sink.write((",".join(header) + "\n").encode())
    for batch in table.to_batches(max_chunksize=_ROWS_AT_A_TIME):
        fields = [_csv_fields(as_text(column)) for column in batch.columns]
        rows = join(fields, ",").to_pylist()
        sink.write(("\n".join(rows) + "\n").encode() if rows else b"")


def _csv_fields(texts: pa.Array) -> pa.Array:
    escaped = pc.replace_substring(texts, '"', '""')
    quote = pa.scalar('"', pa.large_string())
    quoted = join([quote, escaped, quote], "")
    fields = pc.if_else(pc.match_substring_regex(texts, _CSV_QUOTED), quoted, texts)
    return pc.fill_null(fields, "")


def write_parquet(table: pa.Table, sink: IO[bytes], note: Callable[[str], None]) -> None:
    """Write a Parquet file; a type that Parquet lacks is written as text, with a note."""
    import pyarrow.parquet as pq

    for number, field in enumerate(table.schema):
        if not _has_parquet_type(field):
            chunks = [as_text(chunk).cast(pa.string()) for chunk in table.column(number).chunks]
            text = pa.field(field.name, pa.string(), field.nullable)
            table = table.set_column(number, text, pa.chunked_array(chunks, pa.string()))
            note(f"note: column {field.name!r} is written as text: Parquet has no {field.type}")
    pq.write_table(table, _Forward(sink))


def _has_parquet_type(field: pa.Field) -> bool:
    import pyarrow.parquet as pq

    try:
        pq.write_table(pa.schema([field]).empty_table(), pa.BufferOutputStream())
    except (pa.ArrowNotImplementedError, pa.ArrowInvalid):
        return False
    return True


def write_arrow(table: pa.Table, sink: IO[bytes], note: Callable[[str], None]) -> None:
    """Write an Arrow IPC stream, which holds every type."""
    with pa.ipc.new_stream(_Forward(sink), table.schema) as writer:
        writer.write_table(table, max_chunksize=_ROWS_AT_A_TIME)


class _Forward:
    """A file that Arrow can write to in one direction: it counts, as a pipe has no position.

    Arrow closes what it writes to, and reports a failure as its own; here the sink stays open,
    and the first failure is kept for :func:`destination` to raise.
    """

    def __init__(self, sink: Any) -> None:
        self._sink = sink
        self._position = 0
        self.closed = False
        self.mode = "wb"

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B") if not isinstance(data, bytes) else data
        self._sink.write(view)
        self._position += len(view)
        return len(view)

    def tell(self) -> int:
        return self._position

    def flush(self) -> None:
        self._sink.flush()

    def close(self) -> None:
        self.closed = True

    def writable(self) -> bool:
        return True

    def readable(self) -> bool:
        return False

    def seekable(self) -> bool:
        return False


@contextmanager
def destination(file: Path | None) -> Iterator[IO[bytes]]:
    """Give what to write an answer to: stdout, or a file that appears when it is whole.

    Raises
    ------
    BrokenPipeError
        Whoever reads stdout has stopped.
    OSError
        The bytes cannot be written.
    """
    if file is None:
        if sys.stdout is None:
            raise InputError("stdout is closed")
        sys.stdout.flush()
        yield sys.stdout.buffer
        sys.stdout.buffer.flush()
        return
    if file.exists() and not file.is_file():  # a device or a pipe must not be replaced
        with file.open("wb") as sink:
            yield sink
        return
    target = file.resolve()  # through a link, to what it stands for
    umask = os.umask(0)
    os.umask(umask)
    descriptor, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    draft = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as sink:
            yield sink
        draft.chmod(target.stat().st_mode & 0o777 if target.exists() else 0o666 & ~umask)
        draft.replace(target)
    except BaseException:
        with suppress(FileNotFoundError):
            draft.unlink()
        raise


def form_of(file: Path | None, wanted: str | None) -> str:
    """Return the form to write: the one that is asked for, else the one the file's name says."""
    if wanted is not None:
        return wanted
    if file is None:
        return "table"
    for form, endings in FORMS.items():
        if re.fullmatch(r".*(" + "|".join(map(re.escape, endings)) + ")", file.name.lower()):
            return form
    raise InputError(
        f"the name {file.name!r} does not say how to write the answer: add --output with one of "
        f"{', '.join(FORMS)}"
    )
