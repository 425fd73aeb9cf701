"""SQLite shards: declared types, strict values, read-only files, and the way through dask."""

from __future__ import annotations

import datetime as dt
import os
import sqlite3
from collections import Counter
from decimal import Decimal

import pyarrow as pa
import pyarrow.compute as pc
import pytest

import dask_shardsql as dss
from dask_shardsql import (
    ColumnError,
    ConfigurationError,
    ConnectionFailedError,
    QueryError,
    SchemaMismatchError,
    StatementError,
    Topology,
    UnrepresentableValueError,
)
from dask_shardsql.config import Settings
from dask_shardsql.engine.drivers.base import Query
from dask_shardsql.engine.drivers.rows import to_array
from dask_shardsql.engine.drivers.sqlite import SQLiteDriver
from dask_shardsql.sql.types import Column

ORDERS = """CREATE TABLE orders (o_id INTEGER PRIMARY KEY, o_name VARCHAR(20), o_price REAL,
    o_total DECIMAL(12, 2), o_open BOOLEAN, o_day DATE, o_raw BLOB)"""
ROWS = [
    (n, f"name {n}" if n % 3 else None, n / 7, n / 4, n % 2, f"2024-01-{n % 28 + 1:02}", b"\0" * n)
    for n in range(1, 41)
]


def make(path, rows, statement=ORDERS):
    with sqlite3.connect(path) as connection:
        connection.execute(statement)
        marks = ", ".join("?" * len(ROWS[0]))
        connection.executemany(f"INSERT INTO orders VALUES ({marks})", rows)
    connection.close()
    return f"sqlite:///{path}"


@pytest.fixture
def whole(tmp_path):
    """The unsharded file, as a topology of one shard."""
    return Topology.from_dsns([make(tmp_path / "whole.db", ROWS)])


@pytest.fixture
def topology(tmp_path):
    """Three files: the middle one has no rows."""
    parts = [ROWS[:25], [], ROWS[25:]]
    return Topology.from_dsns([make(tmp_path / f"s{i}.db", part) for i, part in enumerate(parts)])


@pytest.fixture
def one(tmp_path):
    """Make a topology of one file from SQL statements."""

    def make_one(*statements):
        path = tmp_path / f"one{len(os.listdir(tmp_path))}.db"
        with sqlite3.connect(path) as connection:
            for statement in statements:
                connection.execute(statement)
        connection.close()
        return Topology.from_dsns([f"sqlite:///{path}"])

    return make_one


def multiset(table):
    return Counter(tuple(row.items()) for row in table.to_pylist())


def described(topology, sql, params=None):
    driver = SQLiteDriver()
    connection = driver.connect(topology.shards[0].primary, None, Settings())
    try:
        return driver.describe(connection, Query(driver.check(sql), params))
    finally:
        driver.close(connection)


@pytest.mark.parametrize(
    ("declared", "kind"),
    [
        ("INTEGER", pa.int64()),
        ("int", pa.int64()),
        ("UNSIGNED BIG INT", pa.int64()),
        ("FLOATING POINT", pa.int64()),  # SQLite's own rule: it contains INT
        ("CHARACTER(20)", pa.string()),
        ("VARYING CHARACTER(255)", pa.string()),
        ("text", pa.string()),
        ("CLOB", pa.string()),
        ("BLOB", pa.binary()),
        ("DOUBLE PRECISION", pa.float64()),
        ("FLOAT", pa.float64()),
        ("NUMERIC", pa.float64()),
        ("DECIMAL(15, 2)", pa.decimal128(15, 2)),
        ("numeric(4)", pa.decimal128(4, 0)),
        ("NUMERIC(50, 10)", pa.decimal256(50, 10)),
        ("BOOLEAN", pa.bool_()),
        ("DATE", pa.string()),
        ("timestamp with time zone", pa.string()),
        ("DATETIME", pa.string()),
        ("JSON", pa.null()),
    ],
)
def test_declared_types(one, declared, kind):
    topology = one(f"CREATE TABLE t (x {declared})")
    for sql in (
        "SELECT x FROM t",
        "SELECT y FROM (SELECT x AS y FROM t)",
        "WITH c AS (SELECT x FROM t) SELECT max(c.x), c.x FROM c",
        "SELECT x FROM t UNION ALL SELECT x FROM t",
    ):
        (column,) = described(topology, sql)[-1:]
        assert (column.arrow_type, column.type_name) == (kind, declared.upper())


def test_a_column_declared_without_a_type_is_never_read_as_a_guess(one):
    topology = one("CREATE TABLE t (x)", "INSERT INTO t VALUES ('text')")
    with pytest.raises((ColumnError, UnrepresentableValueError), match="types="):
        dss.collect("SELECT x FROM t", topology)
    assert dss.collect("SELECT x FROM t", topology, types={"x": "string"})["x"][0].as_py() == "text"


def test_declared_types_come_through_views(one):
    topology = one("CREATE TABLE t (x DECIMAL(5, 1))", "CREATE VIEW v AS SELECT x AS y FROM t")
    assert described(topology, "SELECT * FROM v")[0].arrow_type == pa.decimal128(5, 1)


@pytest.mark.parametrize(
    ("expression", "kind"),
    [
        ("CAST(a AS INTEGER)", pa.int64()),
        ("CAST(count(*) AS INTEGER)", pa.int64()),
        ("CAST(a || 'x' AS TEXT)", pa.string()),
        ("CAST(sum(a) AS REAL)", pa.float64()),
        ("CAST(? AS TEXT)", pa.string()),
        ("(SELECT a FROM t)", pa.int64()),
        ("CAST(a AS NUMERIC)", pa.null()),
        ("count(*)", pa.null()),
        ("a + 1", pa.null()),
        ("?", pa.null()),
        ("NULL", pa.null()),
    ],
)
def test_expressions_have_the_type_of_their_cast(one, expression, kind):
    topology = one("CREATE TABLE t (a INTEGER)")
    params = ("?",) if "?" in expression else None
    (column,) = described(topology, f"SELECT {expression} AS x FROM t", params)
    assert column.arrow_type == kind


def test_describing_runs_nothing_of_the_query(one):
    topology = one("CREATE TABLE t (a INTEGER)", "INSERT INTO t VALUES (1)")
    endless = "WITH RECURSIVE r(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM r) "
    sql = endless + "SELECT t.a, CAST(s.n AS INTEGER) AS n FROM t JOIN (SELECT sum(n) n FROM r) s"
    assert [c.arrow_type for c in described(topology, sql)] == [pa.int64()] * 2
    sql = endless + "SELECT a FROM t WHERE a IN (SELECT n FROM r) LIMIT ?"
    assert [c.name for c in described(topology, sql, (1,))] == ["a"]


def test_placeholders_are_told_from_what_looks_like_them(one):
    topology = one('CREATE TABLE t (a$b INTEGER, [c?d] INTEGER, "e:f" INTEGER)')
    sql = "SELECT *, '?' AS q FROM t WHERE a$b=:x AND `c?d`=@y AND [c?d]<$z /* ? */ -- :no"
    columns = described(topology, sql, {"x": 1, "y": 2, "z": 3})
    assert [c.name for c in columns] == ["a$b", "c?d", "e:f", "q"]


def test_columns_without_a_type_are_all_named_with_the_remedies(topology):
    with pytest.raises(ColumnError, match=r"types=\{'n': 'int64'\}.*CAST\(.*AS n") as caught:
        dss.collect("SELECT o_name, count(*) AS n, max(o_id) AS m FROM orders", topology)
    assert caught.value.columns == ("n", "m")


def test_types_and_casts_are_those_remedies(topology):
    sql = "SELECT count(*) AS n FROM orders"
    table = dss.collect(sql, topology, types={"n": "int64"})
    assert table.to_pydict() == {"n": [25, 0, 15]}
    cast = dss.collect("SELECT CAST(count(*) AS INTEGER) AS n FROM orders", topology)
    assert cast.equals(table)


def test_names_given_twice_are_refused_and_odd_ones_are_not(one):
    topology = one('CREATE TABLE t (a INTEGER, "a:1" INTEGER)', "INSERT INTO t VALUES (1, 2)")
    with pytest.raises(ColumnError, match="more than one column named 'a'"):
        dss.collect("SELECT a, a FROM t", topology)
    assert dss.collect("SELECT * FROM t", topology).to_pydict() == {"a": [1], "a:1": [2]}


@pytest.mark.parametrize(
    ("declared", "value", "kind"),
    [
        ("INTEGER", "'many'", "int64"),
        ("INTEGER", "1.5", "int64"),
        ("INTEGER", "9223372036854775808", "int64"),
        ("INTEGER", "x'00'", "int64"),
        ("TEXT", "x'414243'", "string"),
        ("TEXT", "CAST(x'ff41' AS TEXT)", "string"),
        ("BLOB", "'text'", "binary"),
        ("REAL", "'text'", "double"),
        ("NUMERIC", "9007199254740993", "double"),
        ("BOOLEAN", "2", "bool"),
        ("BOOLEAN", "'yes'", "bool"),
        ("DECIMAL(5, 2)", "1.005", "decimal128(5, 2)"),
        ("DECIMAL(5, 2)", "1000", "decimal128(5, 2)"),
        ("DATE", "20240101", "string"),
    ],
)
def test_a_value_of_another_kind_is_an_error_that_names_it(one, declared, value, kind):
    topology = one(f"CREATE TABLE t (x {declared})", f"INSERT INTO t VALUES (NULL), ({value})")
    with pytest.raises(UnrepresentableValueError) as caught:
        dss.collect("SELECT x FROM t", topology)
    assert (caught.value.column, caught.value.arrow_type, caught.value.shard) == ("x", kind, "s1")
    assert caught.value.value
    table = dss.collect("SELECT x FROM t", topology, unrepresentable="null")
    assert table.to_pydict() == {"x": [None, None]}


def test_only_the_unrepresentable_become_null(one):
    topology = one(
        "CREATE TABLE t (x TEXT)",
        "INSERT INTO t VALUES ('before'), (CAST(x'ff' AS TEXT)), ('after')",
    )
    table = dss.collect("SELECT x FROM t", topology, unrepresentable="null")
    assert table.to_pydict() == {"x": ["before", None, "after"]}


def test_iso_texts_can_be_read_as_dates_and_numbers_as_decimals(one):
    topology = one(
        "CREATE TABLE t (d DATE, s DATETIME, h TIME, c TEXT, r REAL)",
        "INSERT INTO t VALUES ('2024-02-29', '2024-02-29 12:30:00.25', '12:30', '0.10', 0.1)",
    )
    kinds = {"d": "date32", "s": "timestamp[us]", "h": "time64[us]"}
    kinds |= {"c": "decimal128(5, 2)", "r": "decimal128(5, 2)"}
    assert dss.collect("SELECT * FROM t", topology, types=kinds).to_pylist() == [
        {
            "d": dt.date(2024, 2, 29),
            "s": dt.datetime(2024, 2, 29, 12, 30, 0, 250000),
            "h": dt.time(12, 30),
            "c": Decimal("0.10"),
            "r": Decimal("0.10"),
        }
    ]
    zoned = pa.timestamp("us", "UTC")
    for column, kind in (("d", zoned), ("s", "date32"), ("s", "timestamp[s]")):
        with pytest.raises(UnrepresentableValueError):
            dss.collect(f"SELECT {column} FROM t", topology, types={column: kind})


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ([dt.datetime(2024, 1, 1, 1)], pa.date32()),
        ([dt.datetime(2024, 1, 1, tzinfo=dt.UTC)], pa.timestamp("us")),
        ([dt.datetime(2024, 1, 1)], pa.timestamp("us", "UTC")),
        ([dt.datetime(2024, 1, 1, 0, 0, 0, 1)], pa.timestamp("ms")),
        ([dt.datetime(1600, 1, 1)], pa.timestamp("ns")),
        ([dt.time(1, tzinfo=dt.UTC)], pa.time64("us")),
        ([dt.timedelta(days=1)], pa.time64("us")),
        ([True], pa.int64()),
        ([True], pa.float64()),
        ([300], pa.int8()),
        ([-1], pa.uint64()),
        ([1e39], pa.float32()),
        ([float("inf")], pa.int64()),
        ([float("nan")], pa.decimal128(5, 2)),
        ([Decimal("NaN")], pa.int64()),
        ([Decimal("1E+4")], pa.decimal128(5, 2)),
        (["\udc80"], pa.string()),
        ([1], pa.date32()),
        ([1], pa.timestamp("us")),
    ],
)
def test_no_value_changes_on_its_way_to_arrow(values, kind):
    with pytest.raises(UnrepresentableValueError):
        to_array([None, *values], Column("x", "", kind))
    assert to_array([None, *values], Column("x", "", kind), "null").null_count == 2


@pytest.mark.parametrize(
    ("value", "kind", "expected"),
    [
        (2.0, pa.int64(), 2),
        (Decimal("2.0"), pa.int64(), 2),
        (2, pa.float64(), 2.0),
        (Decimal("0.5"), pa.float64(), 0.5),
        (float("inf"), pa.float32(), float("inf")),
        (1, pa.decimal128(5, 2), Decimal("1.00")),
        (Decimal("1.500"), pa.decimal128(5, 2), Decimal("1.50")),
        (dt.datetime(2024, 1, 1), pa.date32(), dt.date(2024, 1, 1)),
        (dt.date(2024, 1, 1), pa.timestamp("us"), dt.datetime(2024, 1, 1)),
        (dt.timedelta(hours=1), pa.time64("us"), dt.time(1)),
        (bytearray(b"x"), pa.binary(), b"x"),
    ],
)
def test_equal_values_of_another_class_are_taken(value, kind, expected):
    assert to_array([value, None], Column("x", "", kind)).to_pylist() == [expected, None]


def test_parameters_of_pandas_numpy_and_the_standard_library(one):
    import uuid

    import numpy as np
    import pandas as pd

    topology = one("CREATE TABLE t (a INTEGER)")
    values = [np.int64(3), np.float32(0.5), pd.NA, pd.Timestamp("2024-01-01 02:03"), pa.scalar("x")]
    values += [np.datetime64("2024-01-01"), dt.date(2024, 1, 1), uuid.UUID(int=1), True]
    names = [f"c{i}" for i in range(len(values))]
    sql = "SELECT " + ", ".join(f"CAST(? AS TEXT) AS {name}" for name in names)
    (row,) = dss.collect(sql, topology, params=values).to_pylist()
    assert list(row.values()) == [
        *("3", "0.5", None, "2024-01-01 02:03:00", "x", "2024-01-01 00:00:00", "2024-01-01"),
        *("00000000-0000-0000-0000-000000000001", "1"),
    ]


def test_nothing_can_write_or_create_a_file(tmp_path, topology):
    with pytest.raises(ConnectionFailedError, match=r"s1.*missing\.db"):
        dss.collect("SELECT 1 AS x", Topology.from_dsns([f"sqlite:///{tmp_path}/missing.db"]))
    assert not (tmp_path / "missing.db").exists()
    for sql in ("WITH c AS (SELECT 1) DELETE FROM orders", "WITH c AS (SELECT 1) INSERT INTO x"):
        with pytest.raises(QueryError):
            dss.collect(sql, topology)
    driver = SQLiteDriver()
    connection = driver.connect(topology.shards[0].primary, None, Settings())
    driver.describe(connection, Query("SELECT * FROM orders"))
    for sql in ("DELETE FROM orders", "CREATE TEMP TABLE x (a)"):
        with pytest.raises(sqlite3.OperationalError, match="readonly"):
            connection.execute(sql)
    driver.close(connection)


def test_a_path_with_odd_characters(tmp_path):
    path = tmp_path / "a?b #1 %20 ü.db"
    make(path, ROWS[:2])
    topology = Topology.from_mapping(
        {"shards": [{"name": "s1", "driver": "sqlite", "database": str(path)}]}
    )
    assert dss.collect("SELECT o_id FROM orders", topology).num_rows == 2


def test_a_relative_path(tmp_path, monkeypatch):
    make(tmp_path / "here.db", ROWS[:3])
    monkeypatch.chdir(tmp_path)
    topology = Topology.from_dsns(["sqlite:///here.db?immutable=1"])
    assert dss.collect("SELECT o_id FROM orders", topology).num_rows == 3


def test_a_file_that_is_no_database(tmp_path):
    (tmp_path / "no.db").write_bytes(b"no database at all" * 100)
    with pytest.raises(ConnectionFailedError, match="not a database"):
        dss.collect("SELECT 1 AS x", Topology.from_dsns([f"sqlite:///{tmp_path}/no.db"]))


def test_a_replaced_file_is_opened_again(tmp_path):
    topology = Topology.from_dsns([make(tmp_path / "a.db", ROWS[:2])])
    assert dss.collect("SELECT o_id FROM orders", topology).num_rows == 2
    make(tmp_path / "b.db", ROWS[:5])
    os.replace(tmp_path / "b.db", tmp_path / "a.db")
    assert dss.collect("SELECT o_id FROM orders", topology).num_rows == 5


def test_a_locked_file_says_so(tmp_path):
    url = make(tmp_path / "a.db", ROWS[:2])
    topology = Topology.from_dsns([f"{url}?timeout=0.1"])
    sql = "SELECT o_id FROM orders"
    assert dss.collect(sql, topology).num_rows == 2
    writer = sqlite3.connect(tmp_path / "a.db", isolation_level=None)
    writer.execute("BEGIN EXCLUSIVE")
    with pytest.raises(QueryError, match="another process writes"):
        dss.collect(sql, topology)
    writer.close()
    assert dss.collect(sql, topology).num_rows == 2


@pytest.mark.parametrize(
    ("entry", "problem"),
    [
        ({}, "needs database"),
        ({"database": ":memory:"}, "in memory"),
        ({"database": "x.db", "mode": "rwc"}, "unknown keys: mode"),
        ({"database": "x.db", "timeout": "soon"}, "must be seconds"),
        ({"database": "x.db", "password_env": "HOME"}, "password"),
    ],
)
def test_wrong_keywords(entry, problem):
    topology = Topology.from_mapping({"shards": [{"name": "s1", "driver": "sqlite", **entry}]})
    with pytest.raises((ConfigurationError, ConnectionFailedError), match=problem):
        dss.collect("SELECT 1 AS x", topology)


def test_shards_that_declare_a_column_differently(tmp_path):
    urls = [make(tmp_path / "a.db", [])]
    urls.append(make(tmp_path / "b.db", [], ORDERS.replace("o_price REAL", "o_price TEXT")))
    with pytest.raises(SchemaMismatchError, match="'o_price': TEXT, but REAL"):
        dss.collect("SELECT * FROM orders", Topology.from_dsns(urls))


def test_comments_do_not_nest_and_dollars_quote_nothing():
    driver = SQLiteDriver()
    assert driver.check("SELECT 1 /* /* */; ") == "SELECT 1 /* /* */"
    for sql in ("SELECT 1 /* /* */; SELECT 2 */", "SELECT $$;$$", "PRAGMA user_version", "TABLE t"):
        with pytest.raises(StatementError):
            driver.check(sql)


@pytest.mark.parametrize("scheduler", ["threads", "processes", "sync"])
def test_collect_gives_the_rows_of_the_unsharded_file(topology, whole, scheduler):
    sql = "SELECT * FROM orders WHERE o_price > :low"
    expected = dss.collect(sql, whole, {"low": 1.0}, scheduler="sync")
    table = dss.collect(sql, topology, {"low": 1.0}, scheduler=scheduler)
    assert table.schema == expected.schema
    assert multiset(table) == multiset(expected)
    assert table.num_rows == 33


@pytest.mark.parametrize("scheduler", ["threads", "processes"])
@pytest.mark.parametrize("dtype_backend", ["pyarrow", "numpy_nullable", "numpy"])
def test_dataframes_have_the_rows_and_dtypes(topology, whole, dtype_backend, scheduler):
    sql = "SELECT o_id, o_name, o_price, o_total, o_open, o_day FROM orders"
    ddf = dss.read_sharded_sql(sql, topology, dtype_backend=dtype_backend)
    frame = ddf.compute(scheduler=scheduler)
    expected = dss.read_sharded_sql(sql, whole, dtype_backend=dtype_backend).compute()
    assert (frame.dtypes == ddf.dtypes).all()
    assert (frame.dtypes == expected.dtypes).all()
    order = {"by": "o_id", "ignore_index": True}
    assert frame.sort_values(**order).equals(expected.sort_values(**order))
    empty = ddf.partitions[1].compute(scheduler=scheduler)
    assert len(empty) == 0
    assert (empty.dtypes == ddf.dtypes).all()


def test_a_table_by_name(topology):
    ddf = dss.read_sharded_table("orders", topology, columns=["o_id", "o_day"])
    assert sorted(ddf.o_id.compute()) == [row[0] for row in ROWS]


def test_big_answers_come_in_batches(one):
    topology = one("CREATE TABLE t (n INTEGER, s TEXT)")
    sql = """WITH RECURSIVE r(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM r WHERE n < 300000)
        SELECT CAST(n AS INTEGER) AS n, CAST(n AS TEXT) AS s FROM r"""
    seen = []
    with dss.listen(seen.append):
        table = dss.collect(sql, topology)
    assert table.num_rows == 300_000
    assert pc.sum(table["n"]).as_py() == 300_000 * 300_001 // 2
    assert len({event.rows for event in seen if event.state == "reading"}) > 3
