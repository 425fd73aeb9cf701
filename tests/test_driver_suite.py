"""The compliance suite, run for every driver of the package."""

from __future__ import annotations

import datetime as dt
import sqlite3
from decimal import Decimal

import duckdb
import psycopg2
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from dask_shardsql import Server
from dask_shardsql.config import Settings
from dask_shardsql.engine.drivers.dbapi import DBAPIDriver
from dask_shardsql.engine.drivers.duckdb import DuckDBDriver
from dask_shardsql.engine.drivers.postgresql import PostgreSQLDriver
from dask_shardsql.engine.drivers.sqlite import SQLiteDriver
from dask_shardsql.engine.pools import Pool
from dask_shardsql.testing.driver_suite import DriverSuite

TEXTS = ["one", "it's; 'two'", None, "", "žluťoučký 🐎"]
COUNTLESS = """WITH RECURSIVE r(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM r WHERE n < 2000000000)
SELECT CAST(max(n) AS INTEGER) AS id FROM r"""


def rows(**columns):
    return pa.table({"id": pa.array(range(1, 6), columns.pop("id", pa.int64())), **columns})


def created(*columns):
    return "CREATE TABLE suite_rows (id INTEGER NOT NULL, " + ", ".join(columns) + ")"


SQLITE_ROWS = [
    (1, "one", 1.5, b"\0\xff", 1, "2024-02-29", 12.5),
    (2, "it's; 'two'", -0.0, b"", 0, "0001-01-01", -0.01),
    (3, None, None, None, None, None, None),
    (4, "", 1e300, b"a", 1, "", 99999999.99),
    (5, "žluťoučký 🐎", 0.1, b"'", 0, "9999-12-31", 0),
]


def make_sqlite(path):
    with sqlite3.connect(path) as connection:
        connection.execute(
            created("t TEXT", "f REAL", "b BLOB", "o BOOLEAN", "d DATE", "c DECIMAL(10, 2)")
        )
        connection.executemany("INSERT INTO suite_rows VALUES (?, ?, ?, ?, ?, ?, ?)", SQLITE_ROWS)
    connection.close()


class TestSQLite(DriverSuite):
    named_placeholder = ":wanted"
    module = sqlite3
    slow_query = COUNTLESS
    misfit = ("SELECT CAST(t AS TEXT) AS x FROM suite_rows WHERE id = 1", "x", "int64")
    unreachable = Server("sqlite", (("database", "/no/such/folder/file.db"),))
    expected = rows(
        t=pa.array(TEXTS),
        f=pa.array([1.5, -0.0, None, 1e300, 0.1]),
        b=pa.array([b"\0\xff", b"", None, b"a", b"'"]),
        o=pa.array([True, False, None, True, False]),
        d=pa.array(["2024-02-29", "0001-01-01", None, "", "9999-12-31"]),
        c=pa.array(
            [Decimal("12.5"), Decimal("-0.01"), None, Decimal("99999999.99"), Decimal(0)],
            pa.decimal128(10, 2),
        ),
    )

    @pytest.fixture
    def driver(self):
        return SQLiteDriver()

    @pytest.fixture
    def server(self, tmp_path):
        make_sqlite(tmp_path / "suite.db")
        return Server("sqlite", (("database", str(tmp_path / "suite.db")),))


class TestDuckDB(DriverSuite):
    named_placeholder = "$wanted"
    module = duckdb
    slow_query = "SELECT count(*) AS id FROM range(100000000000) a, range(1000000) b"
    misfit = ("SELECT t AS x FROM suite_rows WHERE id = 1", "x", "int64")
    unreachable = Server("duckdb", (("database", "/no/such/folder/file.duckdb"),))
    expected = rows(
        id=pa.int32(),
        t=pa.array(TEXTS),
        h=pa.array([Decimal(10**37), Decimal(-1), None, Decimal(0), Decimal(1)], pa.decimal128(38)),
        e=pa.array(["sad", "ok", None, "sad", "sad"]),
        z=pa.array([dt.datetime(2024, 2, 29, 11)] * 2 + [None] * 3, pa.timestamp("us", "UTC")),
        s=pa.array(
            [{"a": 1, "b c": ["x"]}, {"a": None, "b c": []}, None, {"a": 2, "b c": None}, None],
            pa.struct([("a", pa.int32()), ("b c", pa.list_(pa.string()))]),
        ),
    )

    @pytest.fixture
    def driver(self):
        return DuckDBDriver()

    @pytest.fixture
    def server(self, tmp_path):
        path = str(tmp_path / "suite.duckdb")
        with duckdb.connect(path) as connection:
            connection.execute("CREATE TYPE mood AS ENUM ('sad', 'ok')")
            connection.execute(
                created(
                    "t VARCHAR",
                    "h HUGEINT",
                    "e mood",
                    "z TIMESTAMPTZ",
                    's STRUCT(a INT, "b c" VARCHAR[])',
                )
            )
            noon = "TIMESTAMPTZ '2024-02-29 12:00:00+01'"
            connection.execute(
                f"""INSERT INTO suite_rows VALUES
                (1, 'one', {10**37}, 'sad', {noon}, {{'a': 1, 'b c': ['x']}}),
                (2, 'it''s; ''two''', -1, 'ok', {noon}, {{'a': NULL, 'b c': []}}),
                (3, NULL, NULL, NULL, NULL, NULL),
                (4, '', 0, 'sad', NULL, {{'a': 2, 'b c': NULL}}),
                (5, 'žluťoučký 🐎', 1, 'sad', NULL, NULL)"""
            )
        return Server("duckdb", (("database", path),))


class TestSQLiteThroughDBAPI(DriverSuite):
    named_placeholder = ":wanted"
    module = sqlite3
    slow_query = COUNTLESS
    misfit = ("SELECT t AS x FROM suite_rows WHERE id = 1", "x", "int64")
    unreachable = Server("dbapi", (("database", "/no/such/folder/file.db"), ("module", "sqlite3")))
    expected = TestSQLite.expected
    types = {field.name: field.type for field in TestSQLite.expected.schema}  # noqa: RUF012

    @pytest.fixture
    def driver(self):
        return DBAPIDriver()

    @pytest.fixture
    def server(self, tmp_path):
        make_sqlite(tmp_path / "suite.db")
        keywords = {
            "check_same_thread": False,
            "database": str(tmp_path / "suite.db"),
            "module": "sqlite3",
        }
        return Server("dbapi", tuple(keywords.items()))


POSTGRESQL_ROWS = f"""{created("t text", "n numeric(12,3)", "b bytea", "ts timestamp")};
INSERT INTO suite_rows VALUES
(1, 'one', 12.5, '\\x00ff', '2024-02-29 12:00:00.000001'),
(2, 'it''s; ''two''', -0.001, '', '0001-01-01'),
(3, NULL, NULL, NULL, NULL),
(4, '', 999999999.999, 'a', '9999-12-31 23:59:59'),
(5, 'žluťoučký 🐎', 0, '''', '2000-01-01')"""
POSTGRESQL_EXPECTED = rows(
    id=pa.int32(),
    t=pa.array(TEXTS),
    n=pa.array(
        [Decimal(x) if x else None for x in ("12.5", "-0.001", "", "999999999.999", "0")],
        pa.decimal128(12, 3),
    ),
    b=pa.array([b"\0\xff", b"", None, b"a", b"'"]),
    ts=pa.array(
        [
            dt.datetime(2024, 2, 29, 12, 0, 0, 1),
            dt.datetime(1, 1, 1),
            None,
            dt.datetime(9999, 12, 31, 23, 59, 59),
            dt.datetime(2000, 1, 1),
        ],
        pa.timestamp("us"),
    ),
)


@pytest.fixture
def suite_schema(servers, table_name):
    """A schema of its own with the suite's table; its connection keywords."""
    schema, dsn = table_name, servers.dsns["s1"]
    connection = psycopg2.connect(dsn)
    connection.autocommit = True
    cursor = connection.cursor()
    cursor.execute(f"CREATE SCHEMA {schema}; SET search_path = {schema}; {POSTGRESQL_ROWS}")
    found = Server.from_dsn(dsn)
    yield {**dict(found.keywords), "options": f"-c search_path={schema}"}, found.secrets
    cursor.execute(f"DROP SCHEMA {schema} CASCADE")
    connection.close()


class TestPostgreSQL(DriverSuite):
    placeholder = "%s"
    named_placeholder = "%(wanted)s"
    module = psycopg2
    slow_query = "SELECT 1 AS id FROM pg_sleep(60)"
    misfit = ("SELECT 'NaN'::numeric AS x", "x", "decimal128(10, 2)")
    unreachable = Server("postgresql", (("host", "127.0.0.1"), ("port", "1")))
    expected = POSTGRESQL_EXPECTED

    @pytest.fixture
    def driver(self):
        return PostgreSQLDriver()

    @pytest.fixture
    def server(self, suite_schema):
        keywords, secrets = suite_schema
        return Server("postgresql", tuple(keywords.items()), secrets)


class TestPsycopg2ThroughDBAPI(TestPostgreSQL):
    types = {"id": "int32", "b": "binary"}  # noqa: RUF012
    misfit = ("SELECT 'NaN'::numeric(4,2) AS x", "x", "decimal128(10, 2)")
    unreachable = Server("dbapi", (("host", "127.0.0.1"), ("module", "psycopg2"), ("port", "1")))

    @pytest.fixture
    def driver(self):
        return DBAPIDriver()

    @pytest.fixture
    def server(self, suite_schema):
        keywords, secrets = suite_schema
        return Server("dbapi", tuple({**keywords, "module": "psycopg2"}.items()), secrets)


def test_the_suite_finds_a_driver_that_changes_values(tmp_path):
    """A driver that rounds is caught: the suite is not a row of tests that cannot fail."""

    class Rounding(SQLiteDriver):
        def read(self, connection, query, resolve, on_batch):
            def change(batch):
                at = batch.schema.names.index("f")
                on_batch(batch.set_column(at, "f", pc.round(batch.column("f"))))

            super().read(connection, query, resolve, change)

    suite = TestSQLite()
    make_sqlite(tmp_path / "suite.db")
    server = Server("sqlite", (("database", str(tmp_path / "suite.db")),))
    pool = Pool(Rounding(), server, Settings())
    with pytest.raises(AssertionError):
        suite.test_reads_what_is_in_the_table(pool)
    pool.close()
