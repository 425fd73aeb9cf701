"""``COPY ... TO STDOUT (FORMAT csv)`` -> Arrow record batches.

The server quotes every text that could be mistaken for NULL, so that an empty field is NULL and
a quoted empty field is an empty text (PostgreSQL manual, COPY, "CSV Format"). libpq hands over
one whole row at a time, so a batch of rows never splits a value, however long it is.
"""

from __future__ import annotations

import codecs

import pyarrow as pa
import pyarrow.csv as csv

from dask_shardsql.engine.drivers.base import Columns, OnRows
from dask_shardsql.engine.text_values import decode_text
from dask_shardsql.errors import ColumnError
from dask_shardsql.sql.types import arrow_schema

__all__ = ["CopyReader"]

_BATCH_BYTES = 8 << 20
_AS_THEY_ARE = {pa.int16(), pa.int32(), pa.int64(), pa.uint32(), pa.float32(), pa.float64()}
_AS_THEY_ARE |= {pa.bool_(), pa.string()}


class CopyReader:
    """A file that psycopg2's ``copy_expert`` writes to, and that keeps Arrow record batches.

    Parameters
    ----------
    columns : tuple of Column
        The columns, in the order of the COPY, with the Arrow types to deliver.
    unrepresentable : {"raise", "null"}
        What becomes of a value that its Arrow type cannot hold.
    on_rows : callable
        Called after every batch with the rows and bytes received so far.
    """

    def __init__(self, columns: Columns, unrepresentable: str, on_rows: OnRows) -> None:
        self._columns = columns
        self._unrepresentable = unrepresentable
        self._on_rows = on_rows
        self._schema = arrow_schema(columns)
        self._rows: list[bytes] = []
        self._pending = 0
        self._batches: list[pa.RecordBatch] = []
        self._received = [0, 0]

    def write(self, row: bytes) -> int:
        """Take the bytes of one row."""
        self._rows.append(row)
        self._pending += len(row)
        if self._pending >= _BATCH_BYTES:
            self._flush()
        return len(row)

    def table(self) -> pa.Table:
        """Return everything that was written, as one table."""
        self._flush()
        return pa.Table.from_batches(self._batches, self._schema)

    def _flush(self) -> None:
        if not self._rows:
            return
        # Arrow drops a byte order mark at the start: here it would be the first value's own
        mark = [codecs.BOM_UTF8] if self._rows[0].startswith(codecs.BOM_UTF8) else []
        data = pa.py_buffer(b"".join(mark + self._rows))
        self._rows, self._pending = [], 0
        batches = self._decode(data)
        self._batches += batches
        self._received[0] += sum(batch.num_rows for batch in batches)
        self._received[1] += data.size
        self._on_rows(*self._received)

    def _decode(self, data: pa.Buffer) -> list[pa.RecordBatch]:
        try:
            table = self._parse(data, _AS_THEY_ARE)
        except pa.ArrowInvalid:  # some value does not fit: decode one by one to name it
            table = self._parse(data, set())
        arrays = []
        for field, column in zip(table.columns, self._columns, strict=True):
            chunk = field.combine_chunks() if field.num_chunks != 1 else field.chunk(0)
            if chunk.type != column.arrow_type or not pa.types.is_primitive(chunk.type):
                chunk = decode_text(chunk, column, self._unrepresentable)
            arrays.append(chunk)
        return [pa.RecordBatch.from_arrays(arrays, schema=self._schema)]

    def _parse(self, data: pa.Buffer, as_they_are: set[pa.DataType]) -> pa.Table:
        names = [str(number) for number in range(len(self._columns))]
        types = {
            name: column.arrow_type if column.arrow_type in as_they_are else pa.string()
            for name, column in zip(names, self._columns, strict=True)
        }
        try:
            return csv.read_csv(
                pa.BufferReader(data),
                csv.ReadOptions(column_names=names, use_threads=False, block_size=data.size + 1),
                csv.ParseOptions(newlines_in_values=True, ignore_empty_lines=False),
                csv.ConvertOptions(
                    column_types=types,
                    null_values=[""],
                    true_values=["t"],
                    false_values=["f"],
                    strings_can_be_null=True,
                    quoted_strings_can_be_null=False,
                ),
            )
        except pa.ArrowInvalid as error:
            if as_they_are:
                raise
            raise ColumnError(
                f"cannot read the rows as UTF-8 text in {len(names)} columns: {error}. Is the "
                "database's encoding SQL_ASCII, with bytes in it that are not UTF-8?"
            ) from error
