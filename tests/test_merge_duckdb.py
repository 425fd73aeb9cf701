"""merge="global" on DuckDB shards: the answer is the one that a file with all the rows gives."""

from __future__ import annotations

import threading
import time
from decimal import Decimal

import duckdb
import pytest

import dask_shardsql as dss
from dask_shardsql.engine import pools
from dask_shardsql.engine.drivers import duckdb_gather
from dask_shardsql.engine.drivers.duckdb import DuckDBDriver
from dask_shardsql.engine.drivers.gathering import Estimate

SHARDED = {"Orders": "id", "items": "order_id", "order lines": "Id", "far.away": "id"}
SCHEMA = """
CREATE TYPE mood AS ENUM ('sad', 'ok', 'happy');
CREATE SCHEMA far;
CREATE TABLE kinds (kind VARCHAR PRIMARY KEY, weight INTEGER);
CREATE TABLE orders (
    id BIGINT PRIMARY KEY, kind VARCHAR REFERENCES kinds (kind), total DECIMAL(12, 2), mood mood,
    note VARCHAR COLLATE NOCASE, tags VARCHAR[], pair STRUCT(a INTEGER, b VARCHAR), odd DOUBLE,
    counts MAP(VARCHAR, INTEGER), twice BIGINT GENERATED ALWAYS AS (id * 2), CHECK (id >= 0));
CREATE TABLE items (order_id BIGINT NOT NULL, n INTEGER, price DOUBLE, huge HUGEINT);
CREATE INDEX items_n ON items (n);
CREATE TABLE "order lines" ("Id" INTEGER, "select" VARCHAR, "a""b" INTEGER);
CREATE TABLE far.away (id INTEGER, v INTEGER);
CREATE TABLE away (id INTEGER);
INSERT INTO away VALUES (7), (8);
CREATE VIEW big AS SELECT o.*, k.weight FROM Orders o JOIN kinds k USING (kind) WHERE total > 50;
CREATE VIEW far.bigger AS SELECT id, weight, total FROM main.big WHERE weight > 1;
CREATE VIEW heavy AS SELECT * FROM kinds WHERE weight > 2;
CREATE VIEW placed AS SELECT rowid AS place FROM orders;
CREATE MACRO plus(x, y := 5) AS x + y;
CREATE MACRO how_many(x) AS (SELECT count(*) FROM orders WHERE id > x);
CREATE MACRO above(x) AS TABLE SELECT * FROM orders WHERE id > x;
CREATE SEQUENCE numbers;
"""
MOODS = ("sad", "ok", "happy")
NOTES = ("straße", "Zebra", "apple", "Äpfel", "APPLE", "", None)
ORDERS = [
    (
        *(i, None if i % 17 == 0 else f"k{i % 5}"),
        *(None if i % 11 == 0 else Decimal(i * 7 % 100) + Decimal(i) / 4, MOODS[i % 3]),
        *(NOTES[i % len(NOTES)], [f"t{n}" for n in range(i % 4)] if i % 9 else None),
        *({"a": i % 6, "b": "xy"[i % 2]}, [float("nan"), float("inf"), 1.5, -0.0, None][i % 5]),
        {"a": i % 3, "b": 1},
    )
    for i in range(120)
]
ITEMS = [(i % 130, i, i * 1.25, 2**70 + i) for i in range(300)]
LINES = [(i, f"line {i % 3}", i % 5) for i in range(30)]
TABLES = {
    "orders": ORDERS,
    "items": ITEMS,
    '"order lines"': LINES,
    "far.away": [(i, i % 9) for i in range(50)],
}


def make(path, number=0, shards=1, schema=SCHEMA):
    """Make a file with the rows of one of so many shards."""
    with duckdb.connect(str(path)) as connection:
        connection.execute(schema)
        connection.execute("INSERT INTO kinds SELECT 'k' || i, i FROM range(7) t(i)")
        for table, rows in TABLES.items():
            own = [row for row in rows if row[0] % shards == number]
            if own:
                marks = ", ".join("?" * len(own[0]))
                connection.executemany(f"INSERT INTO {table} VALUES ({marks})", own)
    return f"duckdb:///{path}"


def make_shards(folder, n, schema=SCHEMA):
    """Make n files, of which the last has no rows where there are several."""
    parts = max(1, n - 1)
    files = {f"s{i}": make(folder / f"s{i}.duckdb", i, parts, schema) for i in range(n)}
    return dss.Topology.from_dsns(files, sharded=SHARDED)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "whole.duckdb"
    return dss.Topology.from_dsns([make(path)])


@pytest.fixture(scope="module", params=[1, 2, 4])
def sharded(request, tmp_path_factory):
    return make_shards(tmp_path_factory.mktemp("sharded"), request.param)


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    return make_shards(tmp_path_factory.mktemp("four"), 4)


def rows_of(table):
    # as texts, so that NaN is NaN and -0.0 is not 0.0
    return [repr(row) for row in table.to_pylist()]


def check(sql, topology, whole, params=None, **options):
    expected = dss.collect(sql, whole, params, **options)
    found = dss.collect(sql, topology, params, merge="global", **options)
    assert found.schema.equals(expected.schema)
    if "ORDER BY" in sql:
        assert rows_of(found) == rows_of(expected)
    else:
        assert sorted(rows_of(found)) == sorted(rows_of(expected))
    return found


QUERIES = [
    "SELECT count(*), count(total), sum(total), avg(total), min(note), max(note) FROM orders",
    "SELECT count(*), sum(id) FROM orders WHERE false",
    "SELECT sum(id) // count(*) + 1 AS x, sum(huge) AS h FROM ORDERS, items WHERE n = id",
    "SELECT mood, count(*) AS n FROM orders GROUP BY mood ORDER BY mood",
    "SELECT max(mood), min(mood) FROM orders WHERE id < 100",
    "SELECT lower(note) AS k, count(*) FROM orders GROUP BY note, 1 ORDER BY 1, 2",
    "SELECT count(*) FROM orders WHERE note = 'Apple'",
    "SELECT kind, sum(total) AS s FROM orders GROUP BY 1 HAVING sum(total) > 1000 ORDER BY s, 1",
    "SELECT kind FROM orders GROUP BY ALL ORDER BY max(total) DESC NULLS LAST, 1 LIMIT 3",
    "SELECT id, note FROM orders ORDER BY note, id LIMIT 30",
    "SELECT id, kind, total FROM orders ORDER BY total DESC, id LIMIT 5 OFFSET 3",
    "SELECT id, odd FROM orders ORDER BY odd DESC NULLS FIRST, id",
    "SELECT DISTINCT note FROM orders WHERE note > 'b' ORDER BY note",
    "SELECT DISTINCT tags FROM orders ORDER BY tags",
    "SELECT DISTINCT ON (kind) kind, id, total FROM orders ORDER BY kind, total DESC, id",
    "SELECT count(DISTINCT kind) AS a, count(DISTINCT note) AS b, count(DISTINCT pair) FROM orders",
    "SELECT count(*) FILTER (total > 50), list(id ORDER BY id DESC) FROM orders WHERE id < 60",
    "SELECT median(total), quantile_cont(total, 0.25), mode(kind) IS NULL FROM orders",
    "SELECT id, rank() OVER (ORDER BY total, id), sum(total) OVER (PARTITION BY kind) FROM orders "
    "ORDER BY id",
    "SELECT id FROM orders QUALIFY row_number() OVER (PARTITION BY kind ORDER BY id) = 2 "
    "ORDER BY id",
    "SELECT kind, mood, sum(total) FROM orders GROUP BY ROLLUP (kind, mood) ORDER BY ALL",
    "SELECT pair, pair.a AS a, tags[1] AS t, counts FROM orders ORDER BY pair DESC, id LIMIT 9",
    "SELECT t, count(*) FROM (SELECT unnest(tags) AS t FROM orders) GROUP BY 1 ORDER BY 1",
    "WITH t AS (SELECT kind, sum(total) AS s FROM orders GROUP BY kind) SELECT max(s) FROM t",
    "WITH orders AS (SELECT 1 AS a) SELECT * FROM orders",
    "WITH orders AS (SELECT * FROM main.orders WHERE id > 5) SELECT count(*) FROM orders",
    "WITH RECURSIVE r(x) AS (VALUES (1) UNION ALL SELECT x + 1 FROM r WHERE x < 5) "
    "SELECT x, count(o.id) FROM r LEFT JOIN orders o ON o.id % 5 = x GROUP BY x ORDER BY x",
    "SELECT kind FROM orders UNION SELECT kind FROM kinds ORDER BY 1",
    "SELECT order_id FROM items EXCEPT SELECT id FROM orders ORDER BY 1",
    "SELECT order_id FROM items EXCEPT ALL SELECT id FROM orders",
    "SELECT id FROM orders INTERSECT SELECT n FROM items ORDER BY 1",
    "SELECT kind FROM kinds UNION ALL BY NAME SELECT kind, id FROM orders",
    "SELECT id FROM orders WHERE total > (SELECT avg(total) FROM orders) ORDER BY id",
    "SELECT id FROM orders o WHERE NOT EXISTS (FROM items i WHERE i.n = o.id + 200)",
    "SELECT weight, (SELECT count(*) FROM orders o WHERE o.kind = k.kind) FROM kinds k",
    "SELECT kind FROM kinds WHERE kind NOT IN (SELECT kind FROM orders WHERE id BETWEEN 1 AND 3)",
    "SELECT k.kind, count(o.id) FROM kinds k LEFT JOIN orders o USING (kind) GROUP BY 1 ORDER BY 1",
    "SELECT k.kind, o.id FROM orders o RIGHT JOIN kinds k ON k.kind = o.kind AND o.id = 1",
    "SELECT k.kind, o.id FROM orders o FULL JOIN kinds k ON k.kind = o.kind AND o.id < 3",
    "SELECT a.id, b.id AS other FROM orders a JOIN orders b ON a.total = b.total AND a.id < b.id",
    "SELECT o.id, i.n FROM orders o ASOF JOIN items i ON o.total >= i.price ORDER BY 1",
    "SELECT o.id, x FROM orders o, LATERAL (SELECT max(n) AS x FROM items i WHERE i.n < o.id) t",
    "SELECT count(*), sum(weight) FROM big",
    "SELECT sum(weight) AS w, sum(total) AS t FROM far.bigger",
    "SELECT count(*) FROM main.orders JOIN heavy USING (kind)",
    "SELECT how_many(10) AS n, plus(1) AS p, plus(1, 2) AS q",
    "SELECT plus(max(id)) AS m, how_many(3) AS n FROM above(5)",
    "SELECT count(*) FROM query_table('orders')",
    "SELECT count(*) FROM query_table('ord' || 'ers')",
    'SELECT "id", "SELECT", "a""b" FROM "ORDER LINES" ORDER BY "Id"',
    "SELECT sum(v), count(*) FROM far.away",
    "SELECT count(*) FROM away",
    "PIVOT orders ON mood IN ('sad', 'ok') USING count(*) GROUP BY kind ORDER BY kind",
    "FROM orders SELECT twice ORDER BY twice DESC LIMIT 3",
    "SELECT count(*) AS c, 'orders' AS t, $$it's; -- orders$$ AS u FROM orders -- the end",
    "SELECT id FROM orders WHERE false AND EXISTS (FROM items)",
    "SELECT 'sad'::mood AS m, count(*) FROM orders WHERE mood = 'sad'::mood",
    "SELECT * FROM orders",
    "SELECT * FROM kinds ORDER BY kind",
    "FROM heavy",
    "SELECT 1 AS one",
    "VALUES (1, 'x')",
]


@pytest.mark.parametrize("sql", QUERIES)
def test_it_is_the_answer_of_one_file(sql, sharded, whole):
    check(sql, sharded, whole)


@pytest.mark.parametrize(
    ("sql", "params"),
    [
        ("SELECT count(*) AS n FROM orders WHERE id > ? AND note < ?", [5, "Z"]),
        ("SELECT count(*) AS n FROM big WHERE id > $low OR kind = $kind", {"low": 9, "kind": "k1"}),
        ("SELECT id FROM orders ORDER BY total, id LIMIT ?", [4]),
        ("SELECT id FROM orders WHERE kind = ANY(?) ORDER BY id", [["k1", "k2"]]),
        ("WITH orders AS (FROM orders WHERE id > $1) SELECT count(*) FROM orders", [7]),
        ("SELECT how_many(?::INTEGER) AS n", [50]),
    ],
)
def test_parameters(sql, params, sharded, whole):
    assert len(check(sql, sharded, whole, params))


@pytest.mark.parametrize(
    ("sql", "reason"),
    [
        ("SELECT rowid FROM items", "system-column"),
        ("SELECT i.RowId FROM Items i", "system-column"),
        ("SELECT max(place) FROM placed", "system-column"),
        ("SELECT estimated_size FROM duckdb_tables()", "system-table"),
        ("SELECT count(*) FROM information_schema.tables, orders", "system-table"),
        ("SELECT column_name FROM (DESCRIBE orders)", "system-table"),
    ],
)
def test_what_is_refused(sql, reason, four):
    with pytest.raises(dss.MergeRefusedError) as caught:
        dss.collect(sql, four, merge="global")
    assert caught.value.reason == reason


def test_a_sharded_table_must_be_there(four):
    topology = dss.Topology(four.shards, (dss.ShardedTable("big", "id"),))
    with pytest.raises(dss.MergeRefusedError, match="'big' is no table") as caught:
        dss.collect("SELECT * FROM kinds", topology, merge="global")
    assert caught.value.reason == "unknown-table"


@pytest.mark.parametrize(
    ("old", "new", "match"),
    [
        ("COLLATE NOCASE", "", "COLLATE"),
        ("'sad', 'ok', 'happy'", "'ok', 'sad', 'happy'", "'ok', 'sad'"),
        ("odd DOUBLE", "odd REAL", "FLOAT"),
    ],
)
def test_shards_must_agree(old, new, match, tmp_path):
    schema = SCHEMA.replace(old, new, 1)
    files = [make(tmp_path / f"{i}.duckdb", i, 2, one) for i, one in enumerate([SCHEMA, schema])]
    topology = dss.Topology.from_dsns({"s0": files[0], "s1": files[1]}, sharded=SHARDED)
    with pytest.raises(dss.SchemaMismatchError, match=match):
        dss.collect("SELECT count(*) FROM orders", topology, merge="global")


def test_views_must_agree_where_they_are_read(tmp_path):
    other = SCHEMA.replace("WHERE weight > 2", "WHERE weight > 3", 1)
    files = [make(tmp_path / f"{i}.duckdb", i, 2, one) for i, one in enumerate([SCHEMA, other])]
    topology = dss.Topology.from_dsns({"s0": files[0], "s1": files[1]}, sharded=SHARDED)
    dss.collect("SELECT count(*) FROM orders JOIN kinds USING (kind)", topology, merge="global")
    with pytest.raises(dss.SchemaMismatchError, match="heavy is defined in another way"):
        dss.collect("SELECT count(*) FROM orders JOIN heavy USING (kind)", topology, merge="global")


def test_files_of_one_name_in_several_folders(tmp_path):
    files = {}
    for i in range(2):
        (tmp_path / str(i)).mkdir()
        files[f"s{i}"] = make(tmp_path / str(i) / "same.duckdb", i, 2)
    topology = dss.Topology.from_dsns(files, sharded=SHARDED)
    found = dss.collect("SELECT count(*) AS n FROM same.main.orders", topology, merge="global")
    assert found.to_pylist() == [{"n": 120}]


def test_settings_of_a_shard_are_those_of_the_merge(tmp_path):
    files = {}
    for i in range(2):
        dsn = make(tmp_path / f"{i}.duckdb", i, 2)
        files[f"s{i}"] = f"{dsn}?default_null_order=nulls_first&enable_external_access=false"
    topology = dss.Topology.from_dsns(files, sharded=SHARDED)
    found = dss.collect("SELECT total FROM orders ORDER BY total", topology, merge="global")
    assert found["total"][0].as_py() is None
    with pytest.raises(dss.QueryError, match="disabled"):
        dss.collect("SELECT id FROM orders, read_csv('x.csv')", topology, merge="global")


def test_explain(four):
    sql = "SELECT count(*) FROM orders o JOIN kinds k USING (kind)"
    found = dss.explain(sql, four, merge="global")
    assert (found.strategy, found.reason, found.final) == ("gather", "all-rows", sql)
    by_table = {one["table"]: one for one in found.gathered}
    assert sorted(by_table) == ["kinds", "orders"]
    assert list(by_table["kinds"]["rows"].values()) == [7]
    assert by_table["orders"]["bytes"]["s3"] == 0 < by_table["orders"]["bytes"]["s2"]
    direct = dss.explain("SELECT * FROM kinds", four, merge="global")
    assert (direct.strategy, direct.reason) == ("direct", "reference-tables")


def test_too_much_is_refused_by_estimate_and_while_it_is_counted(tmp_path, monkeypatch):
    topology = make_shards(tmp_path, 3)
    for i in range(2):
        with duckdb.connect(str(tmp_path / f"s{i}.duckdb")) as connection:
            connection.execute("INSERT INTO items SELECT i, i, i, i FROM range(1000, 50000) t(i)")
    sql = "SELECT count(*) AS n FROM items"
    size = dss.explain(sql, topology, merge="global").gathered_bytes
    assert 3_000_000 < size < 5_000_000
    with pytest.raises(dss.MergeRefusedError, match="about .* bytes of items") as caught:
        dss.collect(sql, topology, merge="global", max_gather_bytes=size - 1)
    assert caught.value.reason == "max-gather-bytes"
    monkeypatch.setattr(DuckDBDriver, "estimate", lambda *a: [Estimate()] * len(a[-1]))
    with pytest.raises(dss.MergeRefusedError, match="more of items") as caught:
        dss.collect(sql, topology, merge="global", max_gather_bytes=size - 100)
    assert caught.value.reason == "max-gather-bytes"
    found = dss.collect(sql, topology, merge="global", max_gather_bytes=size)
    assert found.to_pylist() == [{"n": 300 + 2 * 49_000}]


def test_a_large_table_comes_in_parts(four, whole, monkeypatch):
    monkeypatch.setattr(duckdb_gather, "_ROWS", 7)
    check("SELECT id, note FROM orders ORDER BY id", four, whole)
    check("SELECT count(*), sum(n) FROM items", four, whole)


def test_a_shard_that_fails_is_named(tmp_path, monkeypatch):
    topology = make_shards(tmp_path, 2)
    sql = "SELECT count(*) FROM orders"
    at = dss.explain(sql, topology, merge="global").shards[0]
    other = {"s0": "s1", "s1": "s0"}[at]
    as_it_was = duckdb_gather.DuckDBGathering._attached

    def attached(self, source):
        if source is not self._connection:
            raise duckdb.IOException("the disk is gone")
        return as_it_was(self, source)

    monkeypatch.setattr(duckdb_gather.DuckDBGathering, "_attached", attached)
    with pytest.raises(dss.ShardSQLError, match="disk is gone") as caught:
        dss.collect(sql, topology, merge="global")
    assert caught.value.shard == other


def test_an_error_of_the_query_itself_is_told(four):
    with pytest.raises(dss.QueryError, match="Could not convert string"):
        dss.collect("SELECT sum(note::INTEGER) FROM orders", four, merge="global")
    with pytest.raises(dss.QueryError, match="nope"):
        dss.collect("SELECT sum(nope) FROM orders", four, merge="global")


def test_nothing_stays_open(tmp_path):
    topology = make_shards(tmp_path, 3)
    assert len(dss.collect("SELECT count(*) FROM orders", topology, merge="global")) == 1
    with pytest.raises(dss.QueryError):
        dss.collect("SELECT sum(note::INTEGER) FROM orders", topology, merge="global")
    assert not duckdb_gather._beside
    for number in range(3):  # to write, which takes a lock that no reader has
        duckdb.connect(str(tmp_path / f"s{number}.duckdb")).close()
    for pool in pools.active_pools():
        assert not pool._apart
        assert not pool._busy


def test_a_cancelled_query_stops_in_memory(four):
    sql = (
        "SELECT count(*) AS n FROM orders a, orders b, orders c, orders d, orders e, orders f "
        "WHERE a.total + b.total + c.total + d.total + e.total = f.total"
    )
    caught = []

    def run():
        try:
            dss.collect(sql, four, merge="global", scheduler="sync")
        except dss.ShardSQLError as error:
            caught.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    deadline = time.monotonic() + 20
    query_id = None
    while query_id is None and time.monotonic() < deadline:
        time.sleep(0.05)
        for pool in pools.active_pools():
            for connection, owner in list(pool._apart.values()):
                if connection in duckdb_gather._beside:
                    query_id = owner
    time.sleep(0.5)
    for pool in pools.active_pools():
        pool.cancel(query_id)
    thread.join(20)
    assert not thread.is_alive()
    assert isinstance(caught[0], dss.QueryError)
    assert caught[0].sqlstate == "57014"


def test_lazily_on_threads(four, whole):
    sql = "SELECT id, note FROM orders WHERE total > (SELECT avg(total) FROM orders) ORDER BY id"
    expected = dss.read_sharded_sql(sql, whole).compute(scheduler="threads")
    found = dss.read_sharded_sql(sql, four, merge="global")
    assert found.npartitions == 1
    found = found.compute(scheduler="threads")
    assert len(found) > 10
    assert found.equals(expected)
    eager = dss.collect(sql, four, merge="global", scheduler="threads")
    assert eager.equals(dss.collect(sql, whole))
