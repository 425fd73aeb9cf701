"""PostgreSQL as the database that merges: the answers to partial queries, and the final query.

The partial queries' answers come by COPY into temporary tables, whose columns are what the server
makes of the partial queries themselves. Only statements of ours run while the transaction may
write; temporary tables can be filled in one that is read-only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, BinaryIO

import psycopg2

from dask_shardsql.engine.drivers.base import Columns, OnBatch, Query
from dask_shardsql.engine.drivers.gathering import Extract, Split, Survey
from dask_shardsql.engine.drivers.postgresql_catalog import JIT, NO_JIT
from dask_shardsql.engine.drivers.postgresql_columns import asking, compare_tables
from dask_shardsql.engine.drivers.postgresql_copy import describing, end_transaction, runner
from dask_shardsql.engine.drivers.postgresql_params import read_strings_as_standard
from dask_shardsql.engine.drivers.postgresql_script import Script, pins
from dask_shardsql.engine.drivers.postgresql_types import columns_of, fields_of_cursor
from dask_shardsql.errors import MergeRefusedError, SchemaMismatchError
from dask_shardsql.sql.instants import SETTING

__all__ = ["BEGIN", "WAITING", "PostgreSQLMerging", "PostgreSQLReceiving"]

BEGIN = "BEGIN ISOLATION LEVEL REPEATABLE READ READ"
WAITING = "SET LOCAL idle_in_transaction_session_timeout = 0"
"""A session that gathers waits for others, however long they take."""
_BUFFER_BYTES = 1 << 16


class PostgreSQLReceiving:
    """A session that takes what others send, and how they send it.

    See :class:`dask_shardsql.engine.drivers.gathering.Sending`.

    Parameters
    ----------
    connection : Session
        Idle; nobody else uses it before the end.
    query : Query
        The query.

    Attributes
    ----------
    extracts : sequence of Extract
        What is sent.
    settings : sequence of str
        Statements that a session needs for that.
    tables : sequence of Extract
        Tables whose columns must have the types that they have here.
    """

    def __init__(self, connection: Any, query: Query) -> None:
        self._connection, self._query = connection, query
        self._cursor = connection.cursor()
        self._rows = asking(self._cursor)
        self.extracts: Sequence[Extract] = ()
        self.settings: Sequence[str] = ()
        self.tables: Sequence[Extract] = ()

    def begin(self, source: Any, extracts: Sequence[Extract]) -> None:
        """Begin a transaction with one snapshot, and compare the types."""
        read_strings_as_standard(source)
        with source.cursor() as cursor:
            cursor.execute("; ".join((BEGIN + " ONLY", NO_JIT, *pins(self._query), *self.settings)))
            compare_tables(asking(cursor), self.tables)
            for extract in extracts:
                if extract.described:
                    _compare(cursor, extract)
            cursor.execute(JIT)

    def send(self, source: Any, extract: Extract, file: BinaryIO) -> None:
        """Write the rows."""
        with source.cursor() as cursor:
            cursor.copy_expert(f"COPY ({extract.select}\n) TO STDOUT ({_form(extract)})", file)

    def end(self, source: Any) -> None:
        """End the transaction; nothing was written."""
        end_transaction(source, "ROLLBACK")

    def cancel(self, source: Any) -> None:
        """Ask the server to stop."""
        source.request_cancel()

    def receive(self, extract: Extract, stream: Any) -> int:
        """Put another shard's rows into this session's table; return how many."""
        copy = f"COPY pg_temp.{extract.into} FROM STDIN ({_form(extract)})"
        with _fitting():
            self._cursor.copy_expert(copy, stream, _BUFFER_BYTES)
        return int(self._cursor.rowcount)

    def abandon(self) -> None:
        """End the transaction, or close the connection."""
        end_transaction(self._connection, "ROLLBACK")


class PostgreSQLMerging(PostgreSQLReceiving):
    """See :class:`dask_shardsql.engine.drivers.gathering.Gathering`.

    Parameters
    ----------
    connection : Session
        Idle; nobody else uses it before the end.
    query : Query
        The query.
    split : Split
        How it is split.
    shard : str
        Name of the shard.
    read : callable
        Reads the rows of a script, in the transaction that is open.
    """

    def __init__(
        self,
        connection: Any,
        query: Query,
        split: Split,
        shard: str,
        read: Callable[[Script, Callable[[Columns], Columns], OnBatch], None],
    ) -> None:
        super().__init__(connection, query)
        self._split, self._shard, self._read = split, shard, read
        self.settings, self.tables = split.settings, split.tables

    def survey(self) -> Survey:
        """Begin, make the temporary tables, and let nothing else be written from then on."""
        read_strings_as_standard(self._connection)
        begin = (BEGIN + " WRITE", WAITING, NO_JIT, *pins(self._query), *self.settings)
        tables = (
            f"CREATE TEMPORARY TABLE {part.into} ON COMMIT DROP AS\n{part.select}\nWITH NO DATA"
            for part in self._split.extracts
        )
        self._cursor.execute("; ".join((*begin, *tables, "SET TRANSACTION READ ONLY")))
        compare_tables(self._rows, self.tables)
        if any(SETTING in one for one in self.settings):  # the others are told this one's
            ((instant,),) = self._rows(f"SELECT pg_catalog.current_setting('{SETTING}')")
            self.settings = (*self.settings, f"SET LOCAL {SETTING} = '{instant}'")
        described = []
        for part in self._split.extracts:
            self._cursor.execute(describing(f"TABLE pg_temp.{part.into}"))
            fields = fields_of_cursor(self._cursor.description)
            columns = columns_of(fields, runner(self._cursor), find_not_null=False).columns
            described.append(part.describe(columns))
        self.extracts = tuple(described)
        self._cursor.execute(JIT)
        return Survey("", self.extracts)

    def prepare(self) -> None:
        """Do nothing: the survey has made the tables."""

    def add_own(self) -> int:
        """Put this shard's own answers into the tables; return how many."""
        rows = 0
        for part in filter(lambda one: one.is_on(self._shard), self._split.extracts):
            with _fitting():
                self._cursor.execute(f"INSERT INTO pg_temp.{part.into}\n{part.select}")
            rows += self._cursor.rowcount
        return rows

    def read(self, resolve: Callable[[Columns], Columns], on_batch: OnBatch) -> None:
        """Run the final query; the transaction then ends."""
        self._read(Script((), self._split.final), resolve, on_batch)


@contextmanager
def _fitting() -> Iterator[None]:
    """Refuse rows that no page of a table can hold."""
    try:
        yield
        return
    except psycopg2.errors.ProgramLimitExceeded as error:
        if error.diag.source_function != "RelationGetBufferForTuple":
            raise
        said = error.diag.message_primary
    raise MergeRefusedError(
        "too-many-columns",
        f"its shards' rows are brought together in a table, of which the server says: {said}. "
        "Select fewer columns, or some in each of several queries",
    )


def _form(extract: Extract) -> str:
    """Return the option of COPY that says how the rows travel."""
    return f"FORMAT {'text' if extract.in_text else 'binary'}"


def _compare(cursor: Any, extract: Extract) -> None:
    """Refuse columns of other types, which might be read as something else."""
    cursor.execute(describing(extract.select))
    fields = fields_of_cursor(cursor.description)
    found = columns_of(fields, runner(cursor), find_not_null=False).columns
    for column, wanted in zip(found, extract.described, strict=True):
        if column.type_name != wanted.type_name:
            raise SchemaMismatchError(
                f"what is merged has a column of type {column.type_name} here, and "
                f"{wanted.type_name} on the shard that merges. Alter the tables to agree"
            )
