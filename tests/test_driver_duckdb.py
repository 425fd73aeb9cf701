"""DuckDB shards: its types as Arrow, read-only files, and the way through dask."""

from __future__ import annotations

import datetime as dt
import subprocess
import sys
import uuid
from collections import Counter
from decimal import Decimal

import duckdb
import pyarrow as pa
import pyarrow.compute as pc
import pytest

import dask_shardsql as dss
from dask_shardsql import (
    ColumnError,
    ConfigurationError,
    ConnectionFailedError,
    ParameterError,
    QueryError,
    SchemaMismatchError,
    StatementError,
    Topology,
    UnrepresentableValueError,
)
from dask_shardsql.engine.drivers.duckdb import DuckDBDriver

ORDERS = """CREATE TABLE orders (o_id INTEGER PRIMARY KEY, o_name VARCHAR, o_price DOUBLE,
    o_total DECIMAL(12, 2), o_open BOOLEAN, o_day DATE, o_at TIMESTAMPTZ, o_tags VARCHAR[])"""
ROWS = [
    (
        *(n, f"name {n}" if n % 3 else None, n / 7, Decimal(n) / 4, n % 2 == 0),
        *(dt.date(2024, 1, n % 28 + 1), dt.datetime(2024, 1, 1, n % 24, tzinfo=dt.UTC), ["a"] * n),
    )
    for n in range(1, 41)
]


def make(path, rows, *statements):
    with duckdb.connect(str(path)) as connection:
        for statement in statements or [ORDERS]:
            connection.execute(statement)
        for row in rows:
            connection.execute(f"INSERT INTO orders VALUES ({', '.join('?' * len(row))})", row)
    return f"duckdb:///{path}"


@pytest.fixture
def whole(tmp_path):
    """The unsharded file, as a topology of one shard."""
    return Topology.from_dsns([make(tmp_path / "whole.duckdb", ROWS)])


@pytest.fixture
def topology(tmp_path):
    """Three files: the middle one has no rows."""
    parts = [ROWS[:25], [], ROWS[25:]]
    paths = [tmp_path / f"s{i}.duckdb" for i in range(3)]
    return Topology.from_dsns([make(p, rows) for p, rows in zip(paths, parts, strict=True)])


@pytest.fixture
def one(tmp_path):
    """A topology of one file with a small table."""
    url = make(tmp_path / "one.duckdb", [], "CREATE TABLE t (a INTEGER NOT NULL, b INTEGER)")
    return Topology.from_dsns([url])


def multiset(table):
    return Counter(repr(row) for row in table.to_pylist())


HUGE = 2**127 - 1


@pytest.mark.parametrize(
    ("sql", "kind", "value"),
    [
        ("true", pa.bool_(), True),
        ("1::TINYINT", pa.int8(), 1),
        ("18446744073709551615::UBIGINT", pa.uint64(), 2**64 - 1),
        ("0.1::FLOAT", pa.float32(), pa.scalar(0.1, pa.float32()).as_py()),
        ("1.50::DECIMAL(9, 2)", pa.decimal128(9, 2), Decimal("1.50")),
        ("1::HUGEINT", pa.decimal128(38, 0), Decimal(1)),
        ("sum(1::BIGINT)", pa.decimal128(38, 0), Decimal(1)),
        ("1::UHUGEINT", pa.decimal128(38, 0), Decimal(1)),
        ("'sad'::ENUM('sad', 'ok')", pa.string(), "sad"),
        (f"'{uuid.UUID(int=7)}'::UUID", pa.string(), str(uuid.UUID(int=7))),
        ("'[1]'::JSON", pa.string(), "[1]"),
        ("'\\xFF'::BLOB", pa.binary(), b"\xff"),
        ("DATE '2024-02-29'", pa.date32(), dt.date(2024, 2, 29)),
        ("TIME '12:30:00.000001'", pa.time64("us"), dt.time(12, 30, 0, 1)),
        ("TIMESTAMP '2024-01-01 01:02:03'", pa.timestamp("us"), dt.datetime(2024, 1, 1, 1, 2, 3)),
        ("TIMESTAMP_S '2024-01-01 01:02:03'", pa.timestamp("s"), dt.datetime(2024, 1, 1, 1, 2, 3)),
        (
            "TIMESTAMP_MS '2024-01-01 01:02:03'",
            pa.timestamp("ms"),
            dt.datetime(2024, 1, 1, 1, 2, 3),
        ),
        (
            "TIMESTAMPTZ '2024-01-01 01:00:00+01'",
            pa.timestamp("us", "UTC"),
            dt.datetime(2024, 1, 1, tzinfo=dt.UTC),
        ),
        (
            "strftime(TIMESTAMPTZ '2024-01-01 01:00:00+01', '%H')",
            pa.string(),
            "00",  # the session's time zone is UTC
        ),
        ("INTERVAL '1 month 2 days 3 seconds'", pa.month_day_nano_interval(), (1, 2, 3 * 10**9)),
        ("'01:02:03+04'::TIMETZ", pa.string(), "01:02:03+04"),
        ("'0101'::BIT", pa.string(), "0101"),
        ("union_value(x := 1)", pa.string(), "1"),
        ("NULL", pa.int32(), None),
        ("[1, 2]", pa.list_(pa.int32()), [1, 2]),
        ("[1, 2]::INTEGER[2]", pa.list_(pa.int32(), 2), [1, 2]),
        ("['sad']::ENUM('sad')[]", pa.list_(pa.string()), ["sad"]),
        ("['1']::HUGEINT[1]", pa.list_(pa.string(), 1), ["1"]),
        (
            """{'a"b': 1::HUGEINT, 'c': [true]}""",
            pa.struct([('a"b', pa.string()), ("c", pa.list_(pa.bool_()))]),
            {'a"b': "1", "c": [True]},
        ),
        ("MAP {'k': 1}", pa.map_(pa.string(), pa.int32()), [("k", 1)]),
        (
            f"MAP {{'k': '{uuid.UUID(int=7)}'::UUID}}",
            pa.map_(pa.string(), pa.string()),
            [("k", str(uuid.UUID(int=7)))],
        ),
    ],
)
def test_types(one, sql, kind, value):
    table = dss.collect(f"SELECT {sql} AS x", one)
    assert table.schema.field("x").type == kind
    assert table.column("x").to_pylist() == [value]
    empty = dss.collect(f"SELECT * FROM (SELECT {sql} AS x) WHERE 1 = 0", one)
    assert empty.schema == table.schema
    assert empty.num_rows == 0


@pytest.mark.parametrize("sql", [f"{HUGE}::HUGEINT", f"'{2**128 - 1}'::UHUGEINT"])
def test_integers_beyond_38_digits_are_never_changed(one, sql):
    with pytest.raises(UnrepresentableValueError) as caught:
        dss.collect(f"SELECT {sql} AS x", one)
    assert caught.value.value in (str(HUGE), str(2**128 - 1))
    assert dss.collect(f"SELECT {sql} AS x", one, unrepresentable="null")["x"].null_count == 1
    wide = dss.collect(f"SELECT {sql} AS x", one, types={"x": "decimal256(39, 0)"})
    assert str(wide["x"][0]) == caught.value.value


def test_other_types_are_exact_too(one):
    text = dss.collect("SELECT '12' AS x", one, types={"x": "int64"})
    assert text["x"].to_pylist() == [12]
    for value, kind in (
        ("1.5", "int64"),
        ("300", "int8"),
        ("TIMESTAMP '2024-01-01 01:00'", "date32"),
    ):
        with pytest.raises(UnrepresentableValueError):
            dss.collect(f"SELECT {value} AS x", one, types={"x": kind})
    with pytest.raises(ColumnError, match="no cast"):
        dss.collect("SELECT [1] AS x", one, types={"x": "binary"})


def test_names_given_twice_are_refused(one):
    with pytest.raises(ColumnError, match="more than one column named 'a'"):
        dss.collect("SELECT 1 AS a, 2 AS a", one)


@pytest.mark.parametrize(
    "sql",
    [
        "FROM t",
        "TABLE t",
        "(SELECT a FROM t)",
        "VALUES (1), (2)",
        "WITH c AS (FROM t) SELECT * FROM c",
        "SELECT $$;$$ AS x, e'\\';' AS y -- ;",
        "PIVOT t ON a IN (1, 2) USING count(*)",
    ],
)
def test_what_duckdb_calls_a_query(one, sql):
    assert DuckDBDriver().check(sql) == sql
    assert DuckDBDriver().check(f"{sql}\n; -- x; y") == f"{sql}\n"
    assert dss.collect(sql, one).num_columns >= 1


@pytest.mark.parametrize(
    "sql",
    ["EXPLAIN SELECT 1", "PRAGMA show_tables", "COPY t TO 'x.csv'", "PIVOT t ON a", "ATTACH 'x'"],
)
def test_what_is_no_query(one, sql):
    with pytest.raises(StatementError):
        dss.collect(sql, one)


@pytest.mark.parametrize(
    ("sql", "pointed"),
    [
        ("SELECT\n  nope\nFROM t", "nope"),
        ("SELECT a FROM t WHERE\n\n  no_such_function(a) = 1", "no_such_function"),
        ("SELECT a, " + "b, " * 60 + "nope FROM t", "nope"),
        ("SELEC 1", "SELEC"),
    ],
)
def test_errors_point_into_the_users_text(one, sql, pointed):
    with pytest.raises(QueryError) as caught:
        dss.collect(sql, one)
    assert caught.value.query == sql
    assert sql[caught.value.position - 1 :].startswith(pointed)
    assert "LINE" not in caught.value.message


def test_an_error_in_the_middle_of_the_rows(one):
    bad = "CASE WHEN i = 250000 THEN 'x' ELSE '1' END"
    with pytest.raises(QueryError, match="Could not convert string 'x'"):
        dss.collect(f"SELECT CAST({bad} AS INTEGER) AS n FROM range(300000) r(i)", one)
    assert dss.collect("SELECT 1 AS n", one).num_rows == 1


@pytest.mark.parametrize(
    ("sql", "params"), [("SELECT ? AS x", ()), ("SELECT $a AS x", {}), ("SELECT 1 AS x", (1,))]
)
def test_parameters_that_do_not_fit(one, sql, params):
    with pytest.raises(ParameterError, match="do not fit"):
        dss.collect(sql, one, params)


def test_parameters_keep_their_values(one):
    values = [Decimal("1.25"), dt.date(2024, 1, 1), [1, 2], b"\0", None, "100%"]
    names = [f"c{i}" for i in range(len(values))]
    sql = "SELECT " + ", ".join(f"? AS {name}" for name in names)
    (row,) = dss.collect(sql, one, values).to_pylist()
    assert list(row.values()) == values


def test_python_variables_are_no_tables(one):
    query = columns = pa.table({"secret": [1]})
    assert query is columns
    for name in ("query", "columns", "params"):
        with pytest.raises(QueryError, match="does not exist"):
            dss.collect(f"SELECT * FROM {name}", one, scheduler="sync")


def test_nothing_can_write_or_create_a_file(tmp_path, one):
    with pytest.raises(ConnectionFailedError, match=r"missing\.duckdb"):
        dss.collect("SELECT 1 AS x", Topology.from_dsns([f"duckdb:///{tmp_path}/missing.duckdb"]))
    assert not (tmp_path / "missing.duckdb").exists()
    with pytest.raises(QueryError):
        dss.collect("WITH c AS (INSERT INTO t VALUES (1, 1) RETURNING a) SELECT * FROM c", one)


def test_the_file_is_free_after_every_answer(tmp_path, one):
    sql = "SELECT a FROM t"
    for rows in range(3):
        assert dss.collect(sql, one).num_rows == rows
        with pytest.raises(QueryError):
            dss.collect("SELECT nope FROM t", one)
        with duckdb.connect(str(tmp_path / "one.duckdb")) as writer:
            writer.execute("INSERT INTO t VALUES (1, 2)")


def test_a_file_open_to_write_says_what_to_do(tmp_path, one):
    path = str(tmp_path / "one.duckdb")
    with (
        duckdb.connect(path),
        pytest.raises(ConnectionFailedError, match="This process has the file open"),
    ):
        dss.collect("SELECT a FROM t", one)
    code = f"import duckdb; c = duckdb.connect({path!r}); print('open', flush=True); input()"
    other = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert other.stdout.readline() == "open\n"
        with pytest.raises(ConnectionFailedError, match="Another process has the file open"):
            dss.collect("SELECT a FROM t", one)
    finally:
        other.communicate("\n", timeout=30)
    assert dss.collect("SELECT a FROM t", one).num_rows == 0


@pytest.mark.parametrize(
    ("entry", "problem"),
    [
        ({}, "needs database"),
        ({"database": ":memory:"}, "in memory"),
        ({"database": "{path}", "no_such_option": 1}, "no_such_option"),
        ({"database": "{path}", "password_env": "HOME"}, "password"),
    ],
)
def test_wrong_keywords(tmp_path, one, entry, problem):
    entry = {
        key: value.format(path=tmp_path / "one.duckdb") if isinstance(value, str) else value
        for key, value in entry.items()
    }
    topology = Topology.from_mapping({"shards": [{"name": "s1", "driver": "duckdb", **entry}]})
    with pytest.raises((ConfigurationError, ConnectionFailedError), match=problem):
        dss.collect("SELECT 1 AS x", topology)


def test_options_reach_duckdb(tmp_path, one):
    options = {"threads": 1, "enable_external_access": False}
    entry = {"name": "s1", "driver": "duckdb", "database": str(tmp_path / "one.duckdb"), **options}
    topology = Topology.from_mapping({"shards": [entry]})
    sql = "SELECT current_setting('threads') AS n"
    assert dss.collect(sql, topology).column("n").to_pylist() == [1]
    with pytest.raises(QueryError):
        dss.collect("SELECT * FROM read_csv('x.csv')", topology)


def test_shards_that_declare_a_column_differently(tmp_path):
    urls = [make(tmp_path / "a.duckdb", [])]
    urls.append(make(tmp_path / "b.duckdb", [], ORDERS.replace("o_price DOUBLE", "o_price FLOAT")))
    with pytest.raises(SchemaMismatchError, match="'o_price': FLOAT, but DOUBLE"):
        dss.collect("SELECT * FROM orders", Topology.from_dsns(urls))


def test_one_query_is_not_for_two_kinds_of_database(tmp_path, topology):
    other = Topology.from_dsns({"a": make(tmp_path / "a.duckdb", []), "b": "sqlite:///b.db"})
    with pytest.raises(ConfigurationError, match="different drivers"):
        dss.collect("SELECT * FROM orders", other)
    assert dss.collect("SELECT * FROM orders", other, shards=["a"]).num_rows == 0


@pytest.mark.parametrize("scheduler", ["threads", "processes", "sync"])
def test_collect_gives_the_rows_of_the_unsharded_file(topology, whole, scheduler):
    sql = "SELECT * FROM orders WHERE o_price > $low"
    expected = dss.collect(sql, whole, {"low": 1.0}, scheduler="sync")
    table = dss.collect(sql, topology, {"low": 1.0}, scheduler=scheduler)
    assert table.schema == expected.schema
    assert multiset(table) == multiset(expected)
    assert table.num_rows == 33


@pytest.mark.parametrize("scheduler", ["threads", "processes"])
@pytest.mark.parametrize("dtype_backend", ["pyarrow", "numpy_nullable", "numpy"])
def test_dataframes_have_the_rows_and_dtypes(topology, whole, dtype_backend, scheduler):
    sql = "SELECT * EXCLUDE (o_tags) FROM orders"
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


def test_numpy_has_integers_where_no_null_can_be(one):
    frame = dss.read_sharded_sql("SELECT a, b FROM t", one, dtype_backend="numpy")
    assert frame.dtypes.astype(str).to_dict() == {"a": "int32", "b": "float64"}
    outer = "SELECT t.a FROM (VALUES (1)) v(x) LEFT JOIN t ON t.a = v.x"
    frame = dss.read_sharded_sql(outer, one, dtype_backend="numpy")
    assert frame.compute().a.isna().tolist() == [True]


def test_big_answers_come_in_batches(one):
    seen = []
    with dss.listen(seen.append):
        table = dss.collect("SELECT i, i::VARCHAR AS s FROM range(300000) r(i)", one)
    assert pc.sum(table["i"]).as_py() == 299_999 * 300_000 // 2
    assert len({event.rows for event in seen if event.state == "reading"}) > 3
