"""The DuckDB driver: files opened read-only, answers delivered as Arrow by DuckDB itself.

======================================================  ========================================
DuckDB                                                  Arrow
======================================================  ========================================
BOOLEAN, (U)TINYINT ... (U)BIGINT, FLOAT, DOUBLE        bool, (u)int8 ... (u)int64, float, double
DECIMAL(p, s)                                           decimal128(p, s)
HUGEINT, UHUGEINT (also the sum of integers)            decimal128(38, 0)
VARCHAR, JSON, ENUM, UUID                               string
BLOB                                                    binary
DATE, TIME                                              date32, time64[us]
TIMESTAMP, TIMESTAMP_S, TIMESTAMP_MS, TIMESTAMP_NS      timestamp[us], [s], [ms], [ns]
TIMESTAMP WITH TIME ZONE                                timestamp[us, UTC]
INTERVAL                                                month_day_nano_interval
t[], t[n], STRUCT, MAP                                  list, fixed_size_list, struct, map
``NULL`` without a type                                 int32, as in CREATE TABLE AS
every other (TIME WITH TIME ZONE, BIT, UNION, BIGNUM,   string: the value's own text
HUGEINT inside of another type, ...)
======================================================  ========================================
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import duckdb
import pyarrow as pa

from dask_shardsql.config import Settings
from dask_shardsql.engine.drivers.base import Columns, OnBatch, Query
from dask_shardsql.engine.drivers.duckdb_gather import DuckDBGathering, interrupt_beside
from dask_shardsql.engine.drivers.duckdb_tables import estimate
from dask_shardsql.engine.drivers.gathering import Gathering, GathersOnly
from dask_shardsql.engine.drivers.postgresql_types import makes_nulls
from dask_shardsql.engine.drivers.rows import double_quoted, plain_params, to_array
from dask_shardsql.errors import (
    ColumnError,
    ConfigurationError,
    ConnectionFailedError,
    ConnectionLostError,
    ParameterError,
    QueryError,
    ShardSQLError,
    StatementError,
)
from dask_shardsql.sql.statement import sendable
from dask_shardsql.sql.types import Column, arrow_schema
from dask_shardsql.topology import Server, ShardedTable

__all__ = ["DuckDBDriver"]

_BATCH_ROWS = 65_536
_SCALARS = {
    "boolean": pa.bool_(),
    "tinyint": pa.int8(),
    "smallint": pa.int16(),
    "integer": pa.int32(),
    "bigint": pa.int64(),
    "utinyint": pa.uint8(),
    "usmallint": pa.uint16(),
    "uinteger": pa.uint32(),
    "ubigint": pa.uint64(),
    "float": pa.float32(),
    "double": pa.float64(),
    "varchar": pa.string(),
    "blob": pa.binary(),
    "date": pa.date32(),
    "time": pa.time64("us"),
    "timestamp": pa.timestamp("us"),
    "timestamp_s": pa.timestamp("s"),
    "timestamp_ms": pa.timestamp("ms"),
    "timestamp_ns": pa.timestamp("ns"),
    "timestamp with time zone": pa.timestamp("us", "UTC"),
    "interval": pa.month_day_nano_interval(),
}
# Python variables must not stand in for tables, and times of day must not depend on the machine.
_PINS = ("SET python_enable_replacements = false", "SET TimeZone = 'UTC'")
_POINTER = re.compile(r"\n\nLINE (\d+): (.*)\n( *)\^")


class DuckDBDriver(GathersOnly):
    """Read DuckDB files: see :class:`dask_shardsql.engine.drivers.base.Driver`.

    Placeholders are DuckDB's: ``?`` or ``$1`` for a sequence of parameters, ``$name`` for a
    mapping.

    Notes
    -----
    Keywords of a shard: ``database`` (the file); every other one is an option of DuckDB's
    (``threads = 2``, ``memory_limit = "1GB"``). The file is opened with ``read_only``, which
    takes a lock that keeps other processes from opening it to write: so a connection is closed
    after every answer, none is kept idle. Several may read at the same time. A query may still
    read other files (``read_parquet``), unless ``enable_external_access = false`` is set.
    """

    name = "duckdb"

    def check(self, sql: str) -> str:
        """Return the text of the one query in `sql`, as DuckDB's own parser finds it."""
        statements = _parsed(sendable(sql))
        if not statements:
            raise StatementError("the query is empty", query=sql)
        if len(statements) > 1:
            raise StatementError(
                f"only one statement can be run, and the text holds {len(statements)}",
                query=sql,
                hint="run the statements one by one",
            )
        kind = statements[0].type.name
        if kind != "SELECT":
            raise StatementError(
                f"only a query can be read from the shards, and this is a statement of type {kind}",
                query=sql,
                hint="write SELECT, FROM, VALUES or WITH; name the values of a PIVOT with IN (...)",
            )
        return _without_semicolon(sql)

    def quote_identifier(self, name: str) -> str:
        """Return `name` in double quotes."""
        return double_quoted(name)

    def connect(self, server: Server, password: str | None, settings: Settings) -> Any:
        """Open the file read-only, in time zone UTC."""
        options: dict[str, Any] = dict(server.keywords)
        path = str(options.pop("database", ""))
        if not path or path.startswith(":memory:"):
            raise ConfigurationError(
                "a duckdb shard needs database = the path of its file; a database in memory is "
                "seen by one process only"
            )
        if password is not None:
            raise ConfigurationError(
                f"the duckdb shard {path!r} has a password, which DuckDB files do not take: remove "
                "it from the topology"
            )
        options |= {key: secret.reveal() for key, secret in server.secrets}
        problem = ""
        try:
            connection = duckdb.connect(path, read_only=True, config=options)
        except duckdb.Error as error:
            problem = str(error)
        if problem:
            raise ConnectionFailedError(problem + _remedy(problem))
        try:
            connection.execute("; ".join(_PINS))
        except BaseException:
            connection.close()
            raise
        return connection

    def is_usable(self, connection: Any) -> bool:
        """No: an idle connection would hold the file's lock, so each is closed after its use."""
        return False

    def describe(self, connection: Any, query: Query) -> Columns:
        """Describe the query by binding it, without running it."""
        try:
            return self._describe(connection, query)
        except BaseException:
            self.close(connection)
            raise

    def read(
        self,
        connection: Any,
        query: Query,
        resolve: Callable[[Columns], Columns],
        on_batch: OnBatch,
    ) -> None:
        """Describe the query and stream its answer; the file cannot change in between."""
        try:
            columns = resolve(self._describe(connection, query))
            self._read(connection, query, columns, on_batch)
        except BaseException:
            self.close(connection)
            raise

    def cancel(self, connection: Any) -> None:
        """Interrupt what the connection runs."""
        with suppress(duckdb.Error):
            interrupt_beside(connection)
            connection.interrupt()

    def close(self, connection: Any) -> None:
        """Close the connection, which releases the file when it is the last of this process."""
        with suppress(duckdb.Error):
            connection.close()

    def translate(self, error: Exception, query: Query | None = None) -> ShardSQLError | None:
        """Map DuckDB's exceptions by their class."""
        if not isinstance(error, duckdb.Error | duckdb.Warning):
            return None
        text = str(error) or repr(error)
        if isinstance(error, duckdb.FatalException | duckdb.ConnectionException):
            return ConnectionLostError(text)
        sql = query.sql if query else None
        if isinstance(error, duckdb.InterruptException):
            return QueryError(text, sqlstate="57014", query=sql)
        if re.search(r"Values were not provided for|argument.count mismatch", text):
            return _parameter_error(text, sql)
        return _query_error(text, sql, lines_before=1)

    def gathering(
        self, connection: Any, query: Query, sharded: Sequence[ShardedTable]
    ) -> Gathering:
        """Begin to gather for a query."""
        return DuckDBGathering(connection, query, sharded, _PINS, self.read)

    estimate = staticmethod(estimate)

    def _describe(self, connection: Any, query: Query) -> Columns:
        params, text = plain_params(query.params), "DESCRIBE\n" + query.sql
        entries = _run(lambda: connection.execute(text, params), query).fetchall()
        types = _types(connection, query, params)
        not_null = query.find_not_null and not (
            makes_nulls(query.sql) or re.search(r"\bpositional\b", query.sql, re.IGNORECASE)
        )
        return tuple(
            Column(entry[0], str(entry[1]), _mapped(kind)[1], not (not_null and entry[2] == "NO"))
            for entry, kind in zip(entries, types, strict=True)
        )

    def _read(self, connection: Any, query: Query, columns: Columns, on_batch: OnBatch) -> None:
        params = plain_params(query.params)
        casts = [_mapped(kind)[0] for kind in _types(connection, query, params)]
        text = "\n" + query.sql
        if any(casts):
            names = [f"c{number}" for number in range(len(casts))]
            chosen = [
                f"CAST({name} AS {cast}) AS {name}" if cast else name
                for name, cast in zip(names, casts, strict=True)
            ]
            text = f"SELECT {', '.join(chosen)} FROM (\n{query.sql}\n) AS q({', '.join(names)})"
        relation = _run(lambda: connection.sql(text, params=params), query)
        open_reader = getattr(relation, "to_arrow_reader", None) or relation.fetch_record_batch
        reader = open_reader(_BATCH_ROWS)
        schema = arrow_schema(columns)
        try:
            while (batch := _next(reader, query)) is not None:
                arrays = [
                    _fitted(values, column, query.unrepresentable)
                    for values, column in zip(batch.columns, columns, strict=True)
                ]
                on_batch(pa.RecordBatch.from_arrays(arrays, schema=schema))
        finally:
            reader.close()


def _parsed(sql: str) -> list[Any]:
    try:
        return list(duckdb.extract_statements(sql))
    except duckdb.Error as error:
        problem = str(error)
    raise _query_error(problem, sql, lines_before=0)


def _without_semicolon(sql: str) -> str:
    """Cut the text at the semicolon that ends it: the last one where the rest is a subquery."""
    end = len(sql)
    while end >= 0:
        with suppress(duckdb.Error):
            duckdb.extract_statements(f"SELECT * FROM (\n{sql[:end]}\n)")
            return sql[:end]
        end = sql.rfind(";", 0, end)
    raise StatementError(
        "this statement cannot be used as a subquery, which is how it is described",
        query=sql,
        hint="write it as SELECT * FROM (...)",
    )


def _types(connection: Any, query: Query, params: Any) -> list[Any]:
    text = f"SELECT * FROM (\n{query.sql}\n) LIMIT 0"
    return list(_run(lambda: connection.sql(text, params=params), query).types)


def _run(call: Callable[[], Any], query: Query) -> Any:
    problem = ""
    try:
        return call()
    except duckdb.NotImplementedException as error:
        if "Unable to transform python value" not in str(error):
            raise
        problem = str(error)
    raise _parameter_error(problem, query.sql)


def _parameter_error(problem: str, sql: str | None) -> ParameterError:
    return ParameterError(
        f"the parameters do not fit the query: {problem}",
        query=sql,
        hint="write one ? for each value of a sequence, or $name for each key of a mapping",
    )


def _mapped(kind: Any, nested: bool = False) -> tuple[str, pa.DataType]:
    """Return what to cast a DuckDB type to, empty where Arrow has it, and its Arrow type."""
    name = kind.id
    if name in _SCALARS:
        return "", _SCALARS[name]
    if name == "decimal":
        digits = {key: int(value) for key, value in kind.children}
        return "", pa.decimal128(digits["precision"], digits["scale"])
    if name in ("hugeint", "uhugeint") and not nested:
        return "VARCHAR", pa.decimal128(38, 0)
    if name == "null":
        return "INTEGER", pa.int32()
    if name in ("list", "array", "struct", "map"):
        return _mapped_nested(kind)
    return "VARCHAR", pa.string()


def _mapped_nested(kind: Any) -> tuple[str, pa.DataType]:
    children = dict(kind.children)
    size = children.pop("size", None) if kind.id == "array" else None
    inner = {key: _mapped(child, nested=True) for key, child in children.items()}
    if kind.id == "struct" and ("" in inner or len(inner) < len(kind.children)):
        return "VARCHAR", pa.string()  # fields without names
    casts = {key: cast or str(children[key]) for key, (cast, _) in inner.items()}
    types = [arrow for _, arrow in inner.values()]
    if kind.id == "map":
        cast, arrow = f"MAP({casts['key']}, {casts['value']})", pa.map_(*types)
    elif kind.id == "struct":
        quoted = ", ".join(f'"{key.replace(chr(34), chr(34) * 2)}" {c}' for key, c in casts.items())
        cast, arrow = f"STRUCT({quoted})", pa.struct(list(zip(casts, types, strict=True)))
    else:
        cast = f"{casts['child']}[{'' if size is None else size}]"
        arrow = pa.list_(types[0]) if size is None else pa.list_(types[0], int(size))
    return cast if any(c for c, _ in inner.values()) else "", arrow


def _next(reader: Any, query: Query) -> Any:
    problem = ""
    try:
        return reader.read_next_batch()
    except StopIteration:
        return None
    except (pa.ArrowException, OSError) as error:  # how Arrow's C stream passes errors on
        problem = str(error)
    if "INTERRUPT" in problem:
        raise QueryError(problem, sqlstate="57014", query=query.sql)
    raise _query_error(problem, query.sql, lines_before=1)


def _fitted(values: Any, column: Column, unrepresentable: str) -> Any:
    kind = column.arrow_type
    if isinstance(values, pa.ExtensionArray):
        values = values.storage
    if values.type == kind:
        return values
    if pa.types.is_decimal(kind) and pa.types.is_string(values.type):
        # Arrow's own cast of 39 digits or more wraps around without an error
        return to_array(values.to_pylist(), column, unrepresentable)
    try:
        cast = values.cast(kind)
        exact = not (pa.types.is_date(kind) and pa.types.is_timestamp(values.type))
        if exact or cast.cast(values.type).equals(values):
            return cast
    except pa.ArrowNotImplementedError:
        raise ColumnError(
            f"column {column.name!r} ({column.type_name}) cannot be read as {kind}: Arrow has no "
            f"cast from {values.type}",
            (column.name,),
        ) from None
    except pa.ArrowInvalid:
        pass  # find out below which value it is
    return to_array(values.to_pylist(), column, unrepresentable)


def _remedy(problem: str) -> str:
    if "different configuration" in problem:
        return ". This process has the file open in another way: close that connection first"
    if "lock" in problem:
        return ". Another process has the file open to write: wait for it, or let it close the file"
    return ""


def _query_error(text: str, sql: str | None, *, lines_before: int) -> QueryError:
    """Make the line and caret that DuckDB prints a position in the user's own text."""
    head, *rest = text.partition("\n\nLINE ")[0].split("\n")
    position = None
    if sql is not None and (found := _POINTER.search(text)):
        position = _position(sql, int(found[1]) - lines_before, found)
    return QueryError(head, position=position, detail="\n".join(rest) or None, query=sql)


def _position(sql: str, number: int, found: re.Match[str]) -> int | None:
    lines = sql.split("\n")
    if not 1 <= number <= len(lines):
        return None
    cut = found[2].startswith("...") and not lines[number - 1].startswith("...")
    shown = found[2].removeprefix("...") if cut else found[2]
    start = lines[number - 1].find(shown.removesuffix("..."))
    if start < 0 or not shown:
        return None  # DuckDB shows a text of its own making
    caret = len(found[3]) - len(f"LINE {found[1]}: ") - (3 if cut else 0)
    return sum(len(line) + 1 for line in lines[: number - 1]) + start + caret + 1
