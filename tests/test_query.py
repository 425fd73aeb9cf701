"""collect, read_sharded_sql and read_sharded_table: the union, and everything that can be wrong."""

from __future__ import annotations

import datetime as dt
import decimal
import uuid

import dask
import numpy as np
import pandas as pd
import psycopg2
import pyarrow as pa
import pytest
from conftest import first_shards
from psycopg2.extras import Json

import dask_shardsql as dss


@pytest.fixture(scope="module")
def orders(servers):
    """A sharded table and a reference table; the last of four shards is empty."""
    servers.execute("DROP TABLE IF EXISTS q_orders, q_customer")
    servers.execute(
        "CREATE TABLE q_orders (id int8 NOT NULL PRIMARY KEY, customer int4, total numeric(12,2), "
        "placed date, note text)"
    )
    servers.execute("CREATE TABLE q_customer (id int4 PRIMARY KEY, segment text NOT NULL)")
    rows = [
        (i, i % 7 or None, decimal.Decimal(i) / 4, dt.date(2024, 1, 1) + dt.timedelta(i), f"n{i}")
        for i in range(300)
    ]
    servers.load("q_orders", rows, shard_of=lambda row: row[0] % 3)
    servers.load("q_customer", [(i, "abc"[i % 3]) for i in range(1, 7)])
    return "q_orders"


def reference_rows(servers, sql, params=None):
    with servers.connect("reference") as connection, connection.cursor() as cursor:
        cursor.execute("SET TimeZone = 'UTC'")
        cursor.execute(sql, params)
        rows = cursor.fetchall()
    connection.close()
    return sorted(rows, key=repr)


def rows_of(table: pa.Table):
    return sorted((tuple(row.values()) for row in table.to_pylist()), key=repr)


def test_the_union_is_what_one_database_holds(servers, topology, orders):
    sql = "SELECT * FROM q_orders"
    table = dss.collect(sql, topology)
    assert isinstance(table, pa.Table)
    assert rows_of(table) == reference_rows(servers, sql)


def test_joins_with_reference_tables_run_inside_each_shard(servers, topology, orders):
    sql = (
        "SELECT o.id, c.segment, o.total FROM q_orders o JOIN q_customer c ON o.customer = c.id "
        "WHERE o.total > %(p)s"
    )
    assert rows_of(dss.collect(sql, topology, {"p": 30})) == reference_rows(servers, sql, {"p": 30})
    ddf = dss.read_sharded_sql(sql, topology, params={"p": 30})
    means = ddf.groupby("segment").total.mean().compute()
    with servers.connect("reference") as connection, connection.cursor() as cursor:
        cursor.execute(f"SELECT segment, avg(total) FROM ({sql}) q GROUP BY 1", {"p": 30})
        for segment, mean in cursor.fetchall():
            assert means[segment] == mean.quantize(decimal.Decimal("1e-16"))
    connection.close()


def test_reading_is_lazy_and_its_columns_come_from_the_server(topology, orders, servers):
    ddf = dss.read_sharded_sql("SELECT *, 1/(id-id) AS never FROM q_orders", topology)
    assert list(ddf.columns) == ["id", "customer", "total", "placed", "note", "never"]
    assert ddf.npartitions == 4
    assert [str(t) for t in ddf.dtypes] == [
        *("int64[pyarrow]", "int32[pyarrow]", "decimal128(12, 2)[pyarrow]"),
        *("date32[day][pyarrow]", "string[pyarrow]", "int64[pyarrow]"),
    ]
    with pytest.raises(dss.QueryError, match="division by zero") as caught:
        ddf.compute()
    assert caught.value.shard in {"s1", "s2", "s3"}
    assert caught.value.sqlstate == "22012"


def test_partitions_are_shards_and_the_empty_one_agrees_with_the_others(topology, orders):
    ddf = dss.read_sharded_sql("SELECT * FROM q_orders", topology, shard_column="shard")
    parts = [part.compute() for part in ddf.partitions]
    assert [len(part) for part in parts] == [100, 100, 100, 0]
    assert all(part.dtypes.equals(ddf.dtypes) for part in parts)
    assert [set(part["shard"]) for part in parts] == [{"s1"}, {"s2"}, {"s3"}, set()]
    assert ddf.groupby("shard").id.count().compute().to_dict() == {"s1": 100, "s2": 100, "s3": 100}
    assert len(ddf) == 300
    assert ddf.total.sum().compute() == sum(decimal.Decimal(i) / 4 for i in range(300))


@pytest.mark.parametrize(
    ("sql", "params"),
    [
        ("SELECT id FROM q_orders WHERE id = %s", (8,)),
        ("SELECT id FROM q_orders WHERE id = ANY(%s)", [[8, 9]]),
        ("SELECT id FROM q_orders WHERE id = %(a)s OR note = %(b)s", {"a": 8, "b": "n9"}),
        ("SELECT id FROM q_orders WHERE note LIKE 'n1%%' AND id < %s", (200,)),
        ("SELECT id FROM q_orders WHERE note LIKE 'n1%'", None),
        ("SELECT id FROM q_orders WHERE placed = %s", (dt.date(2024, 1, 9),)),
        ("SELECT id FROM q_orders WHERE total = %s", (decimal.Decimal("2.00"),)),
        ("SELECT id FROM q_orders WHERE id % 5 = 0 -- a comment at the end", None),
        ("SELECT id FROM q_orders WHERE id = 8;  -- done", None),
        ("TABLE q_orders", None),
        ("WITH w AS (SELECT id FROM q_orders WHERE id < 5) SELECT * FROM w", None),
        ("(SELECT id FROM q_orders WHERE id < 5)", None),
    ],
)
def test_queries_and_parameters_in_every_form(servers, topology, orders, sql, params):
    expected = reference_rows(servers, sql, params)
    assert expected
    assert rows_of(dss.collect(sql, topology, params)) == expected


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (np.int64(7), 7),
        (np.float32(1.5), 1.5),
        (np.bool_(True), True),
        (pd.Timestamp("2024-01-02 03:04:05.678901"), dt.datetime(2024, 1, 2, 3, 4, 5, 678901)),
        (np.datetime64("2024-01-02T03:04:05"), dt.datetime(2024, 1, 2, 3, 4, 5)),
        (pa.scalar(5), 5),
        (pd.NA, None),
        (pd.NaT, None),
        (None, None),
        (uuid.UUID(int=7), str(uuid.UUID(int=7))),
        (np.array([1, 2]), [1, 2]),
        (pd.Series([1, 2]), [1, 2]),
        ("it's \\ % ; -- \" $$ ünï", "it's \\ % ; -- \" $$ ünï"),
        (b"\x00\xff'", b"\x00\xff'"),
        (memoryview(b"\x00\xff'"), b"\x00\xff'"),
        (psycopg2.Binary(b"\x00\xff'"), b"\x00\xff'"),
        (Json({"a": [1]}), '{"a": [1]}'),
    ],
)
def test_parameters_of_numpy_pandas_and_arrow(topology, value, shown):
    cast = {bool: "bool", type(None): "text"}.get(type(shown), "")
    sql = f"SELECT %s::{cast} AS x" if cast else "SELECT %s AS x"
    assert dss.collect(sql, topology, [value], shards=["s1"]).to_pylist() == [{"x": shown}]


@pytest.mark.parametrize(
    ("sql", "params", "message"),
    [
        ("SELECT %s, %s", (1,), "do not fit"),
        ("SELECT 1 AS a", [1], "no placeholder"),
        ("SELECT %s", (1, 2), "do not fit"),
        ("SELECT %(a)s", {"b": 1}, r"%\(a\)s"),
        ("SELECT %s", (object(),), "no SQL form"),
        ("SELECT %s", ("a\0b",), "NUL"),
        ("SELECT %s", "text", "sequence or a mapping"),
        ("SELECT %s", 5, "sequence or a mapping"),
        ("SELECT 5 % 2 WHERE 1 = %s", (1,), "do not fit|unsupported format"),
    ],
)
def test_parameters_that_do_not_fit_are_refused(topology, sql, params, message):
    with pytest.raises(dss.ParameterError, match=message):
        dss.collect(sql, topology, params)


@pytest.mark.parametrize(
    ("sql", "sqlstate", "position"),
    [
        ("SELECT nope FROM q_orders", "42703", 8),
        ("SELECT * FROM q_nowhere", "42P01", 15),
        ("SELEC 1", None, None),
        ("SELECT * FROM", "42601", 14),
        ("SELECT 1 FROM q_orders\nWHERE note = 3", "42883", 35),
        ("SELECT (1", "42601", None),
    ],
)
def test_bad_sql_is_the_servers_own_error_once(topology, orders, sql, sqlstate, position):
    with pytest.raises(dss.QueryError) as caught:
        dss.read_sharded_sql(sql, topology)
    error = caught.value
    assert error.sqlstate == sqlstate
    if position:
        assert error.position == position
        assert "LINE" in str(error)
    if sqlstate:
        assert error.shard == "s1"
        assert "all 4 shards" in str(error)


@pytest.mark.parametrize(
    "sql",
    [
        *("SELECT 1; SELECT 2", "INSERT INTO q_orders VALUES (1)", "", " -- nothing", "SHOW ALL"),
        *(
            "DELETE FROM q_orders",
            "SELECT 1; DROP TABLE q_orders",
            "BEGIN",
            "COPY q_orders TO STDOUT",
        ),
        "SELECT 'a\0b'",
    ],
)
def test_only_one_query_is_accepted(topology, orders, sql):
    with pytest.raises(dss.StatementError):
        dss.collect(sql, topology)


def test_a_query_cannot_write(servers, topology, orders):
    for sql in (
        "WITH gone AS (DELETE FROM q_orders RETURNING id) SELECT * FROM gone",
        "SELECT setval(pg_get_serial_sequence('q_serial', 'id'), 5)",
        "SELECT 1) AS a, (DELETE FROM q_orders RETURNING 1",
        "SELECT lo_create(0)",
    ):
        with pytest.raises(dss.QueryError):
            dss.collect(sql, topology)
    assert dss.collect("SELECT * FROM q_orders", topology).num_rows == 300


def test_an_error_on_one_shard_says_what_the_others_did(servers, topology, table_name):
    with servers.connect("s2") as connection, connection.cursor() as cursor:
        cursor.execute(f"CREATE TABLE {table_name} (x int)")
    connection.close()
    with pytest.raises(dss.QueryError) as caught:
        dss.collect(f"SELECT * FROM {table_name}", topology)
    assert caught.value.shard == "s1"
    assert "'s3', 's4'" in str(caught.value)


def test_columns_that_differ_between_shards_are_listed_before_any_row(
    servers, topology, table_name
):
    types = {"s1": "int4", "s2": "int8", "s3": "int4", "s4": "text"}
    for shard, kind in types.items():
        with servers.connect(shard) as connection, connection.cursor() as cursor:
            extra = ", more int" if shard == "s3" else ""
            cursor.execute(f"CREATE TABLE {table_name} (a text, x {kind}{extra})")
        connection.close()
    events = []
    with pytest.raises(dss.SchemaMismatchError) as caught, dss.listen(events.append):
        dss.collect(f"SELECT * FROM {table_name}", topology)
    assert not events
    assert caught.value.differences == (
        ("s2", "x", "int8", "int4"),
        ("s3", "more", "more int4", "missing"),
        ("s4", "x", "text", "int4"),
    )
    for part in ("'s2'", "'x'", "int8, but int4 on shard 's1'", "'s4'"):
        assert part in str(caught.value)
    same = f"SELECT a, x::text AS x FROM {table_name}"
    assert dss.collect(same, topology).num_rows == 0
    # one description only: the others are still compared when they are read
    ddf = dss.read_sharded_sql(f"SELECT a, x FROM {table_name}", topology, check_schema=False)
    with pytest.raises(dss.SchemaMismatchError, match="was int4"):
        ddf.compute()


def test_a_table_altered_after_planning_is_an_error_not_a_wrong_answer(
    servers, topology, table_name
):
    servers.execute(f"CREATE TABLE {table_name} (x int4)")
    ddf = dss.read_sharded_sql(f"SELECT * FROM {table_name}", topology)
    servers.execute(f"ALTER TABLE {table_name} ALTER x TYPE text")
    with pytest.raises(dss.SchemaMismatchError, match="'x' is text, was int4"):
        ddf.compute()


def test_duplicate_column_names_are_named(topology, orders):
    with pytest.raises(dss.ColumnError, match="'id'") as caught:
        dss.read_sharded_sql(
            "SELECT * FROM q_orders o JOIN q_customer c ON o.customer = c.id", topology
        )
    assert caught.value.columns == ("id",)
    with pytest.raises(dss.ColumnError, match="shard_column"):
        dss.collect("SELECT id FROM q_orders", topology, shard_column="id")
    with pytest.raises(dss.ColumnError, match="no columns"):
        dss.collect("SELECT FROM q_orders", topology)


def test_tables_are_read_by_name_quoted(servers, topology):
    servers.execute('DROP SCHEMA IF EXISTS "My Schema" CASCADE')
    servers.execute('CREATE SCHEMA "My Schema"')
    servers.execute(
        'CREATE TABLE "My Schema"."Odd ""Table" ("A b" int, c% text)'.replace("c%", '"c%"')
    )
    plain = dss.Topology.from_dsns({s.name: servers.dsns[s.name] for s in topology.shards})
    ddf = dss.read_sharded_table('Odd "Table', plain, schema="My Schema")
    assert list(ddf.columns) == ["A b", "c%"]
    ddf = dss.read_sharded_table('Odd "Table', plain, schema="My Schema", columns=["c%"])
    assert list(ddf.columns) == ["c%"]
    with pytest.raises(dss.QueryError, match="does not exist"):
        dss.read_sharded_table("x; DROP TABLE q_orders; --", plain)
    with pytest.raises(dss.ConfigurationError, match="columns"):
        dss.read_sharded_table("q_orders", plain, columns="id")


def test_a_reference_table_is_read_from_one_shard(servers, topology, orders):
    with pytest.raises(dss.ConfigurationError, match="'q_customer' is not a sharded table"):
        dss.read_sharded_table("q_customer", topology)
    assert len(dss.read_sharded_table("q_customer", topology, shards=["s2"])) == 6


def test_shards_can_be_named(topology, orders):
    table = dss.collect("SELECT id FROM q_orders", topology, shards=["s2", "s1"], shard_column="s")
    assert table["s"].unique().to_pylist() == ["s1", "s2"]
    for bad in ([], "s1"):
        with pytest.raises(dss.ConfigurationError, match="at least one shard"):
            dss.collect("SELECT 1", topology, shards=bad)
    with pytest.raises(dss.TopologyError, match="'s9'"):
        dss.collect("SELECT 1", topology, shards=["s9"])


def test_every_read_is_a_new_one_unless_it_is_a_named_snapshot(topology, orders, servers):
    sql = "SELECT id FROM q_orders"
    first, second = (dss.read_sharded_sql(sql, topology) for _ in range(2))
    assert set(first.__dask_graph__()).isdisjoint(second.__dask_graph__())
    one, two = (dss.read_sharded_sql(sql, topology, snapshot="monday") for _ in range(2))
    assert set(one.__dask_graph__()) == set(two.__dask_graph__())
    other = dss.read_sharded_sql(sql, topology, snapshot="tuesday")
    assert set(one.__dask_graph__()).isdisjoint(other.__dask_graph__())
    wider = dss.read_sharded_sql(sql, first_shards(servers, 5), snapshot="monday")
    assert set(one.__dask_graph__()).isdisjoint(wider.__dask_graph__())


def test_task_names_read_well(topology, orders):
    ddf = dss.read_sharded_sql("SELECT id FROM q_orders", topology)
    assert all(key[0].startswith("read-sharded-sql-") for key in ddf.__dask_graph__())
    assert "read-sharded-sql" in repr(ddf)


@pytest.mark.parametrize("scheduler", ["threads", "sync", "processes"])
def test_schedulers_are_honoured(topology, orders, scheduler):
    ddf = dss.read_sharded_sql("SELECT id FROM q_orders", topology, scheduler="sync")
    assert len(ddf.compute(scheduler=scheduler)) == 300
    with dask.config.set(scheduler=scheduler):
        assert dss.collect("SELECT id FROM q_orders", topology).num_rows == 300


def test_a_shard_that_cannot_be_reached_is_named(servers, topology, orders):
    broken = dss.Topology.from_dsns(
        {"s1": servers.dsns["s1"], "gone": "host=127.0.0.1 port=1 dbname=x password=hush"}
    )
    with pytest.raises(dss.ConnectionFailedError, match="'gone'.*127.0.0.1:1") as caught:
        dss.collect("SELECT 1 AS x", broken)
    assert caught.value.shard == "gone"
    assert "hush" not in str(caught.value)


def test_every_shard_that_cannot_be_reached_is_named_once(servers):
    dsns = {name: f"host=127.0.0.1 port={port}" for name, port in (("x", 1), ("y", 2))}
    broken = dss.Topology.from_dsns({"s1": servers.dsns["s1"], **dsns})
    with pytest.raises(dss.ConnectionFailedError, match="1 more of 3 shards failed") as caught:
        dss.collect("SELECT 1 AS x", broken)
    for name in ("'x'", "'y'"):
        assert str(caught.value).count(name) == 1


def test_sessions_are_pinned_and_named(topology, servers):
    with servers.connect("s1") as connection, connection.cursor() as cursor:
        cursor.execute("ALTER ROLE CURRENT_USER SET TimeZone = 'Asia/Tokyo'")
        cursor.execute("ALTER ROLE CURRENT_USER SET DateStyle = 'German'")
        cursor.execute("ALTER ROLE CURRENT_USER SET extra_float_digits = -5")
        cursor.execute("ALTER ROLE CURRENT_USER SET bytea_output = 'escape'")
        cursor.execute("ALTER ROLE CURRENT_USER SET IntervalStyle = 'iso_8601'")
    connection.close()
    try:
        fresh = dss.Topology.from_dsns({"other": servers.dsns["s1"]})
        row = dss.collect(
            "SELECT current_setting('TimeZone') AS zone,"
            " current_setting('application_name') AS name,"
            " current_setting('transaction_read_only') AS ro,"
            " current_setting('client_encoding') AS enc, timestamptz '2024-01-02 03:04:05+09' AS t,"
            " 0.1::float8 + 0.2::float8 AS f,"
            " date '2024-12-31' AS d, '\\x00ff'::bytea AS b, interval '1 day 2 hours' AS i",
            fresh,
        ).to_pylist()[0]
    finally:
        with servers.connect("s1") as connection, connection.cursor() as cursor:
            cursor.execute("ALTER ROLE CURRENT_USER RESET ALL")
        connection.close()
    assert row["zone"] == "UTC"
    assert row["name"].startswith("dask_shardsql:")
    assert row["ro"] == "on"
    assert row["enc"] == "UTF8"
    assert row["t"] == dt.datetime(2024, 1, 1, 18, 4, 5, tzinfo=dt.UTC)
    assert row["f"] == 0.1 + 0.2
    assert row["d"] == dt.date(2024, 12, 31)
    assert row["b"] == b"\x00\xff"
    assert row["i"] == pa.MonthDayNano([0, 1, 7_200_000_000_000])


@pytest.mark.parametrize("backend", ["pyarrow", "numpy_nullable", "numpy"])
def test_dataframes_of_every_kind_of_value_print(topology, backend):
    sql = (
        "SELECT interval '1 mon 2 days 03:00' AS i, date '2024-01-02' AS d, time '01:02' AS t, "
        "timestamptz '2024-01-02 03:04+00' AS z, 1.5::numeric AS n, '\\x00'::bytea AS b, "
        "ARRAY[1, NULL] AS a, 'x'::text AS s, NULL::interval AS e, true AS o"
    )
    frame = dss.read_sharded_sql(sql, topology, dtype_backend=backend).compute()
    assert "days=2, months=1" in repr(frame["i"])
    assert all(name in repr(frame.T) for name in frame.columns)
    assert len(frame.to_string()) > 100
    assert frame["i"].iloc[0] + pd.Timestamp("2024-01-01") == pd.Timestamp("2024-02-03 03:00")


def test_types_can_be_named_by_texts(topology):
    sql = "SELECT 1::int8 AS f, 2.5 AS d, timestamptz '2024-01-01 00:00+00' AS t, 'x' AS s"
    types = {"f": "float64", "d": "decimal128(38, 4)", "t": "timestamp[ms, UTC]"}
    table = dss.collect(sql, topology, types=types)
    assert table.schema.types == [
        *(pa.float64(), pa.decimal128(38, 4), pa.timestamp("ms", "UTC"), pa.string()),
    ]
    with pytest.raises(dss.ConfigurationError, match="'f'.*no Arrow type"):
        dss.collect(sql, topology, types={"f": "double precision"})
    with pytest.raises(dss.ColumnError, match="nope.*it returns f, d, t, s"):
        dss.collect(sql, topology, types={"nope": "int64"})


def test_events_tell_each_shards_progress(topology, orders):
    events = []
    with dss.listen(events.append):
        dss.collect("SELECT * FROM q_orders", topology)
    for shard in ("s1", "s2", "s3", "s4"):
        states = [event.state for event in events if event.shard == shard]
        assert states[0] == "started"
        assert states[-1] == "finished"
    finished = {event.shard: event.rows for event in events if event.state == "finished"}
    assert finished == {"s1": 100, "s2": 100, "s3": 100, "s4": 0}
    failed = []
    with dss.listen(failed.append), pytest.raises(dss.QueryError):
        dss.collect("SELECT 1/(id-id) AS x FROM q_orders", topology, shards=["s1"])
    assert [event.state for event in failed] == ["started", "failed"]
    before = len(events)
    dss.collect("SELECT 1 AS x", topology)
    assert len(events) == before


def test_a_large_answer_arrives_in_several_batches(topology):
    sql = "SELECT g AS id, repeat(md5(g::text), 8) AS t FROM generate_series(1, %s) g"
    events = []
    with dss.listen(events.append):
        table = dss.collect(sql, topology, [100_000], shards=["s1"])
    assert table.num_rows == 100_000
    assert len([event for event in events if event.state == "reading"]) > 2
    assert table["id"].to_pylist() == list(range(1, 100_001))


@pytest.mark.parametrize("params", [[5], {"a": 5}, [[5]]])
def test_later_changes_to_the_parameters_do_not_reach_a_lazy_query(topology, params):
    mark = "%(a)s" if isinstance(params, dict) else "%s"
    ddf = dss.read_sharded_sql(f"SELECT {mark} AS a", topology, params)
    before = ddf.compute()["a"].tolist()
    inner = params[0] if isinstance(params, list) and isinstance(params[0], list) else params
    inner["a" if isinstance(params, dict) else 0] = 99
    assert ddf.compute()["a"].tolist() == before


def test_parameters_may_come_from_a_generator_but_not_from_a_set(topology):
    table = dss.collect("SELECT %s AS a, %s AS b", topology, (x for x in (1, 2)))
    assert table.to_pylist() == [{"a": 1, "b": 2}] * 4
    with pytest.raises(dss.ParameterError, match="not set"):
        dss.collect("SELECT %s AS a", topology, {1})


def test_schemas_tell_sharded_tables_from_others(topology, servers):
    sharded = dss.Topology.from_dsns(
        {s.name: servers.dsns[s.name] for s in topology.shards}, sharded={"sales.customer": "k"}
    )
    with pytest.raises(dss.ConfigurationError, match="'public.customer' is not a sharded table"):
        dss.read_sharded_table("customer", sharded, schema="public")
    with pytest.raises(dss.QueryError, match="sales.customer"):
        dss.read_sharded_table("customer", sharded, schema="sales")


@pytest.mark.parametrize(
    "options",
    [
        *({"types": ["int64"]}, {"types": "int64"}, {"types": {"a": 5}}),
        *({"shards": 5}, {"shard_column": 5}, {"scheduler": "nonsense"}),
        *({"unrepresentable": "ignore"}, {"check_schema": "yes"}),
    ],
)
def test_options_of_the_wrong_kind_are_named(topology, options):
    with pytest.raises(dss.ConfigurationError):
        dss.collect("SELECT 1 AS a", topology, **options)


@pytest.mark.parametrize(
    "options", [{"dtype_backend": "arrow"}, {"snapshot": "\ud800"}, {"snapshot": 5}]
)
def test_options_of_a_lazy_read_are_named(topology, options):
    with pytest.raises(dss.ConfigurationError):
        dss.read_sharded_sql("SELECT 1 AS a", topology, **options)


@pytest.mark.parametrize(
    "options", [{"table": 5}, {"schema": 5}, {"columns": 5}, {"columns": [5]}, {"columns": []}]
)
def test_names_of_a_table_must_be_texts(topology, options):
    with pytest.raises(dss.ConfigurationError):
        dss.read_sharded_table(**{"table": "orders", "topology": topology, **options})


def test_a_value_pandas_cannot_hold_names_its_shard(topology):
    ddf = dss.read_sharded_sql(
        "SELECT 9007199254740993 AS a", topology, dtype_backend="numpy", shards=["s2"]
    )
    with pytest.raises(dss.UnrepresentableValueError, match="'a' of shard 's2'"):
        ddf.compute()
