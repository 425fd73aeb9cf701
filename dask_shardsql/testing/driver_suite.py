"""A compliance suite for drivers: subclass it in your own tests, and pytest runs it.

::

    class TestMyDriver(DriverSuite):
        expected = pa.table({"id": [1, 2, 3], "label": ["one", "two", None]})
        placeholder = "%s"

        @pytest.fixture
        def driver(self):
            return MyDriver()

        @pytest.fixture
        def server(self, tmp_path):
            ...  # make the table suite_rows, and return the Server that holds it

It needs pytest, and nothing else imports it.
"""

from __future__ import annotations

import inspect
import pickle
import threading
import time
from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import Any, ClassVar

import pyarrow as pa
import pytest

from dask_shardsql.config import Settings
from dask_shardsql.engine.drivers.base import Columns, Driver, Query
from dask_shardsql.engine.pools import Pool
from dask_shardsql.errors import (
    ConnectionFailedError,
    ParameterError,
    QueryError,
    ShardSQLError,
    StatementError,
    UnrepresentableValueError,
)
from dask_shardsql.server import Server
from dask_shardsql.sql.types import arrow_schema, override_types

__all__ = ["DriverSuite"]

# ruff: noqa: D102, S101 - these are tests, and their names say what they do


class DriverSuite:
    """What every driver must do.

    A subclass gives the fixtures `driver` and `server`, and the attributes below.

    Attributes
    ----------
    expected : pyarrow.Table
        The rows of the table ``suite_rows`` on the server, sorted by its first column ``id``, an
        integer: at least three rows with ids from 1, where each other column is NULL for id 3.
    types : mapping of str to pyarrow.DataType or str
        The ``types=`` that reading the table needs, where the driver knows too few.
    placeholder : str
        What a query writes for the first parameter of a sequence.
    named_placeholder : str, optional
        What a query writes for the parameter ``wanted`` of a mapping.
    module : module, optional
        The module whose exceptions must all be translated.
    slow_query : str, optional
        A query that runs for a minute or more; it must end when it is cancelled.
    misfit : (str, str, str), optional
        A query, the name of its only column, and an Arrow type which its value does not fit.
    unreachable : Server, optional
        A server that cannot be connected to.
    odd_names : tuple of str
        Names that must come through quoting as they are.
    """

    expected: ClassVar[pa.Table]
    types: ClassVar[Mapping[str, Any]] = {}
    placeholder: ClassVar[str] = "?"
    named_placeholder: ClassVar[str | None] = None
    module: ClassVar[ModuleType | None] = None
    slow_query: ClassVar[str | None] = None
    misfit: ClassVar[tuple[str, str, str] | None] = None
    unreachable: ClassVar[Server | None] = None
    odd_names: ClassVar[tuple[str, ...]] = ('a"b', "a b", "Ünïcode", "select", "x;y", "--z", "it's")

    @pytest.fixture
    def driver(self) -> Driver:
        """Return the driver."""
        raise NotImplementedError("a subclass of DriverSuite gives the fixture 'driver'")

    @pytest.fixture
    def server(self) -> Server:
        """Return the server with the table ``suite_rows``."""
        raise NotImplementedError("a subclass of DriverSuite gives the fixture 'server'")

    @pytest.fixture
    def pool(self, driver: Driver, server: Server) -> Iterator[Pool]:
        """Lend the driver's connections the way the library does."""
        pool = Pool(driver, server, Settings(pool_timeout=5.0))
        yield pool
        pool.close()

    def read(self, pool: Pool, query: Query | str, types: Mapping[str, Any] | None = None) -> Any:
        """Read a query the way the library does, errors translated."""
        query = Query(query) if isinstance(query, str) else query
        wanted = self.types if types is None else types
        chosen: list[Columns] = []
        batches: list[pa.RecordBatch] = []

        def resolve(columns: Columns) -> Columns:
            chosen.append(override_types(columns, self._relevant(columns, wanted)))
            return chosen[0]

        read = pool.driver.read
        self._use(pool, query, lambda c: read(c, query, resolve, batches.append))
        return pa.Table.from_batches(batches, arrow_schema(chosen[0]))

    def describe(self, pool: Pool, sql: str) -> Columns:
        """Describe a query the way the library does, errors translated."""
        query = Query(sql)
        columns: Columns = self._use(pool, query, lambda c: pool.driver.describe(c, query))
        return columns

    @staticmethod
    def _use(pool: Pool, query: Query, call: Any) -> Any:
        with pool.connection("suite", "s1") as connection:
            try:
                return call(connection)
            except ShardSQLError:
                raise
            except Exception as error:
                translated = pool.driver.translate(error, query)
                if translated is None:
                    raise
                raise translated from error

    @staticmethod
    def _relevant(columns: Columns, types: Mapping[str, Any]) -> dict[str, Any]:
        names = {column.name for column in columns}
        return {name: kind for name, kind in types.items() if name in names}

    def test_follows_the_protocol(self, driver: Driver) -> None:
        assert isinstance(driver, Driver)
        assert driver.name

    def test_reads_what_is_in_the_table(self, pool: Pool) -> None:
        table = self.read(pool, "SELECT * FROM suite_rows")
        assert table.sort_by("id").equals(self.expected)
        assert table.schema.types == self.expected.schema.types

    def test_describes_what_it_reads(self, pool: Pool) -> None:
        described = self.describe(pool, "SELECT * FROM suite_rows")
        seen: list[Columns] = []

        def resolve(columns: Columns) -> Columns:
            seen.append(columns)
            return override_types(columns, self._relevant(columns, self.types))

        query = Query("SELECT * FROM suite_rows")
        read, batches = pool.driver.read, []  # type: ignore[var-annotated]
        self._use(pool, query, lambda c: read(c, query, resolve, batches.append))
        assert seen == [described]
        schema = arrow_schema(override_types(described, self.types))
        assert batches
        assert all(batch.schema.equals(schema) for batch in batches)

    def test_an_empty_answer_has_the_same_schema(self, pool: Pool) -> None:
        table = self.read(pool, "SELECT * FROM suite_rows WHERE id < 0")
        assert table.num_rows == 0
        assert table.schema.equals(self.expected.schema)

    def test_an_answer_of_nulls_has_the_same_schema(self, pool: Pool) -> None:
        table = self.read(pool, "SELECT * FROM suite_rows WHERE id = 3")
        assert table.schema.equals(self.expected.schema)
        assert table.num_rows == 1
        assert {field.null_count for field in table.columns[1:]} == {1}

    def test_the_end_of_the_text_may_be_a_comment_or_a_semicolon(self, pool: Pool) -> None:
        for end in (" -- the end", " /* the end */", ";", " ; -- the end; really", "\n;\n"):
            sql = pool.driver.check(f"SELECT id FROM suite_rows{end}")
            assert self.read(pool, sql).num_rows == self.expected.num_rows

    @pytest.mark.parametrize(
        "sql",
        [
            "SELECT 1; SELECT 2",
            "SELECT ';' ; DELETE FROM suite_rows",
            "",
            " ; ",
            "-- nothing",
            "DELETE FROM suite_rows",
            "CREATE TABLE suite_more (id INTEGER)",
            "INSERT INTO suite_rows (id) VALUES (99)",
        ],
    )
    def test_refuses_all_but_one_query(self, driver: Driver, sql: str) -> None:
        with pytest.raises(StatementError) as caught:
            driver.check(sql)
        self._pickles(caught.value)

    def test_semicolons_inside_of_tokens_end_nothing(self, driver: Driver) -> None:
        sql = "SELECT ';' AS \"a;b\" /* ; */ FROM suite_rows -- ;"
        assert driver.check(sql) == sql

    @pytest.mark.parametrize(
        "sql",
        [
            "SELECT no_such_column FROM suite_rows",
            "SELECT * FROM no_such_table",
            "SELECT id FROM suite_rows WHERE",
            "SELECT id) FROM (suite_rows",
        ],
    )
    def test_a_wrong_query_is_a_query_error(self, pool: Pool, sql: str) -> None:
        for attempt in (self.describe, self.read):
            with pytest.raises(QueryError) as caught:
                attempt(pool, sql)
            assert str(caught.value)
            self._pickles(caught.value)
            self._still_works(pool)

    def test_what_resolve_raises_leaves_the_connection_clean(self, pool: Pool) -> None:
        def resolve(columns: Columns) -> Columns:
            raise KeyError("no such types")

        query = Query("SELECT * FROM suite_rows")
        batches: list[pa.RecordBatch] = []
        read = pool.driver.read
        with pytest.raises(KeyError, match="no such types"):
            self._use(pool, query, lambda c: read(c, query, resolve, batches.append))
        self._still_works(pool)

    def test_what_on_batch_raises_leaves_the_connection_clean(self, pool: Pool) -> None:
        def on_batch(batch: pa.RecordBatch) -> None:
            raise InterruptedError("enough")

        query = Query("SELECT id FROM suite_rows")
        read = pool.driver.read
        with pytest.raises(InterruptedError, match="enough"):
            self._use(pool, query, lambda c: read(c, query, self._typed, on_batch))
        self._still_works(pool)

    def test_no_batch_is_empty(self, pool: Pool) -> None:
        for where, rows in (("", self.expected.num_rows), (" WHERE id < 0", 0)):
            query = Query("SELECT id FROM suite_rows" + where)
            read, batches = pool.driver.read, []  # type: ignore[var-annotated]
            self._use(
                pool,
                query,
                lambda c: read(c, query, self._typed, batches.append),  # noqa: B023
            )
            assert sum(batch.num_rows for batch in batches) == rows
            assert all(batch.num_rows for batch in batches)

    def test_odd_names_come_through_quoting(self, pool: Pool) -> None:
        names = self.odd_names
        quoted = [f"id AS {pool.driver.quote_identifier(name)}" for name in names]
        columns = self.describe(pool, f"SELECT {', '.join(quoted)} FROM suite_rows")
        assert [column.name for column in columns] == list(names)

    def test_parameters(self, pool: Pool) -> None:
        sql = f"SELECT id FROM suite_rows WHERE id = {self.placeholder}"
        assert self.read(pool, Query(sql, (2,))).column("id").to_pylist() == [2]
        assert self.read(pool, Query(sql, [self.expected.column("id")[0]])).num_rows == 1
        if self.named_placeholder is not None:
            sql = f"SELECT id FROM suite_rows WHERE id = {self.named_placeholder}"
            assert self.read(pool, Query(sql, {"wanted": 2})).column("id").to_pylist() == [2]

    @pytest.mark.parametrize("params", [(), (1, 2), "1", 1, (object(),)])
    def test_parameters_that_do_not_fit(self, pool: Pool, params: Any) -> None:
        sql = f"SELECT id FROM suite_rows WHERE id = {self.placeholder}"
        with pytest.raises(ParameterError) as caught:
            self.read(pool, Query(sql, params))
        self._pickles(caught.value)
        self._still_works(pool)

    def test_a_named_parameter_that_is_missing(self, pool: Pool) -> None:
        if self.named_placeholder is None:
            pytest.skip("the driver has no named placeholders")
        sql = f"SELECT id FROM suite_rows WHERE id = {self.named_placeholder}"
        with pytest.raises(ParameterError):
            self.read(pool, Query(sql, {"other": 2}))
        self._still_works(pool)

    def test_without_parameters_a_percent_sign_is_one(self, pool: Pool) -> None:
        sql = "SELECT id FROM suite_rows WHERE '100%s' LIKE '100%' AND id = 1"
        assert self.read(pool, sql).num_rows == 1

    def test_one_connection_serves_threads_in_turn(self, driver: Driver, server: Server) -> None:
        connections = [driver.connect(server, None, Settings())]
        query = Query("SELECT id FROM suite_rows")
        batches: list[pa.RecordBatch] = []

        def read() -> None:
            driver.read(connections[0], query, self._typed, batches.append)

        thread = threading.Thread(target=read)
        thread.start()
        thread.join()
        driver.close(connections[0])
        assert sum(batch.num_rows for batch in batches) == self.expected.num_rows

    def test_a_misfit_is_an_error_or_null(self, pool: Pool) -> None:
        if self.misfit is None:
            pytest.skip("no misfit is given")
        sql, column, kind = self.misfit
        with pytest.raises(UnrepresentableValueError) as caught:
            self.read(pool, sql, {column: kind})
        assert caught.value.column == column
        self._pickles(caught.value)
        self._still_works(pool)
        table = self.read(pool, Query(sql, unrepresentable="null"), {column: kind})
        assert table.column(column).null_count == table.num_rows == 1

    def test_cancel_stops_a_query(self, pool: Pool) -> None:
        if self.slow_query is None:
            pytest.skip("no slow query is given")
        failures: list[BaseException] = []

        def read() -> None:
            try:
                self.read(pool, str(self.slow_query))
            except BaseException as error:  # noqa: BLE001 - told by the test itself
                failures.append(error)

        thread = threading.Thread(target=read, daemon=True)
        started = time.monotonic()
        thread.start()
        while thread.is_alive() and time.monotonic() - started < 20:
            pool.cancel("suite")
            thread.join(0.2)
        assert not thread.is_alive()
        assert [isinstance(failure, QueryError) for failure in failures] == [True]
        self._still_works(pool)

    def test_cancel_and_close_do_nothing_to_the_idle_or_closed(
        self, driver: Driver, server: Server
    ) -> None:
        connection = driver.connect(server, None, Settings())
        driver.cancel(connection)
        query = Query("SELECT id FROM suite_rows")
        batches: list[pa.RecordBatch] = []
        driver.read(connection, query, self._typed, batches.append)
        assert sum(batch.num_rows for batch in batches) == self.expected.num_rows
        for _ in range(2):
            driver.close(connection)
            driver.cancel(connection)
            assert driver.is_usable(connection) is False

    def test_a_server_that_cannot_be_reached(self, driver: Driver) -> None:
        if self.unreachable is None:
            pytest.skip("no unreachable server is given")
        pool = Pool(driver, self.unreachable, Settings(connect_timeout=2.0))
        with pytest.raises(ConnectionFailedError, match="s1") as caught:
            self.read(pool, "SELECT id FROM suite_rows")
        self._pickles(caught.value)

    def test_translates_every_exception_of_its_module(self, driver: Driver) -> None:
        if self.module is None:
            pytest.skip("no module is given")
        kinds = [
            kind
            for _, kind in inspect.getmembers(self.module, inspect.isclass)
            if issubclass(kind, Exception)
        ]
        assert len(kinds) >= 10  # PEP 249 names ten
        for kind in kinds:
            translated = driver.translate(kind("what the database says"), Query("SELECT 1"))
            assert isinstance(translated, ShardSQLError), kind
            assert "what the database says" in str(translated)
            self._pickles(translated)

    def test_leaves_other_exceptions_alone(self, driver: Driver) -> None:
        for error in (ValueError("x"), OSError("x"), pa.ArrowInvalid("x"), ShardSQLError("x")):
            assert driver.translate(error) is None

    def _typed(self, columns: Columns) -> Columns:
        return override_types(columns, self._relevant(columns, self.types))

    def _still_works(self, pool: Pool) -> None:
        table = self.read(pool, "SELECT id FROM suite_rows")
        assert table.num_rows == self.expected.num_rows

    @staticmethod
    def _pickles(error: ShardSQLError) -> None:
        copy = pickle.loads(pickle.dumps(error))  # noqa: S301 - our own
        assert type(copy) is type(error)
        assert str(copy) == str(error)
        assert copy.args == error.args
