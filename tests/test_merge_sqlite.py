"""merge="global" on SQLite shards: the answer is the one that a file with all the rows gives."""

from __future__ import annotations

import gc
import sqlite3
import threading
import time
from contextlib import closing

import pytest

import dask_shardsql as dss
from dask_shardsql.engine import pools
from dask_shardsql.engine.drivers.gathering import Estimate
from dask_shardsql.engine.drivers.sqlite import SQLiteDriver

SHARDED = {"Orders": "id", "main.items": "order_id", "order lines": "Id", "keyed": "a"}
SCHEMA = """
CREATE TABLE orders (
    id INTEGER PRIMARY KEY, kind TEXT COLLATE NOCASE, total REAL, amount DECIMAL(12, 2), mixed,
    note TEXT, twice INTEGER GENERATED ALWAYS AS (id * 2), CHECK (id >= 0));
CREATE TABLE items (order_id INTEGER NOT NULL, n INTEGER, price REAL, raw BLOB);
CREATE INDEX items_n ON items (n);
CREATE TABLE "order lines" ("Id" INTEGER, "select" TEXT, "a""b" NUMERIC);
CREATE TABLE keyed (a INTEGER, b TEXT, PRIMARY KEY (a, b)) WITHOUT ROWID;
CREATE TABLE kinds (kind TEXT, weight INTEGER);
CREATE VIEW big AS SELECT o.*, k.weight FROM Orders o JOIN kinds k ON k.kind = o.kind
    WHERE total > 50;
CREATE VIEW bigger AS SELECT id, weight, total FROM big WHERE weight > 1;
CREATE VIEW heavy AS SELECT * FROM kinds WHERE weight > 2;
CREATE VIRTUAL TABLE words USING fts5(note, content='orders', content_rowid='id');
CREATE TABLE counted (id INTEGER PRIMARY KEY AUTOINCREMENT);
"""
MIXED = (None, 7, 7.5, "7", b"7", "x", -1, 1e300)
NOTES = ("straße", "Zebra", "apple", "Äpfel", "APPLE", "", None)
ORDERS = [
    (
        *(i, None if i % 17 == 0 else f"{'kK'[i % 2]}{i % 5}"),
        *(None if i % 11 == 0 else i * 7 % 100 + i / 4, i % 40 / 4),
        *(MIXED[i % len(MIXED)], NOTES[i % len(NOTES)]),
    )
    for i in range(120)
]
ITEMS = [(i % 130, i, i * 1.25, bytes([i % 7])) for i in range(300)]
LINES = [(i, f"line {i % 3}", [1, 2.5, "three"][i % 3]) for i in range(30)]
KEYED = [(i, "ab"[i % 2]) for i in range(20)]
TABLES = {
    "orders (id, kind, total, amount, mixed, note)": ORDERS,
    "items": ITEMS,
    '"order lines"': LINES,
    "keyed": KEYED,
}


def make(path, number=0, shards=1, schema=SCHEMA):
    """Make a file with the rows of one of so many shards."""
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.executescript(schema)
        for table, rows in TABLES.items():
            own = [row for row in rows if row[0] % shards == number]
            marks = ", ".join("?" * len(rows[0]))
            connection.executemany(f"INSERT INTO {table} VALUES ({marks})", own)
        kinds = [(f"K{i}", i) for i in range(7)]
        connection.executemany("INSERT INTO kinds VALUES (?, ?)", kinds)
    return f"sqlite:///{path}"


def make_shards(folder, n, schema=SCHEMA):
    """Make n files, of which the last has no rows where there are several."""
    parts = max(1, n - 1)
    files = {f"s{i}": make(folder / f"s{i}.db", i, parts, schema) for i in range(n)}
    return dss.Topology.from_dsns(files, sharded=SHARDED)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "whole.db"
    return dss.Topology.from_dsns([make(path)])


@pytest.fixture(scope="module", params=[1, 2, 4])
def sharded(request, tmp_path_factory):
    return make_shards(tmp_path_factory.mktemp("sharded"), request.param)


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    return make_shards(tmp_path_factory.mktemp("four"), 4)


def rows_of(table):
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


COUNT = "CAST(count(*) AS INTEGER) AS n"
QUERIES = [
    f"SELECT {COUNT}, CAST(sum(id) AS INTEGER) AS s, CAST(avg(total) AS REAL) AS a, "
    "CAST(min(note) AS TEXT) AS x, CAST(max(note) AS TEXT) AS y FROM orders",
    f"SELECT {COUNT}, CAST(sum(id) AS INTEGER) AS s FROM orders WHERE 0",
    "SELECT CAST(sum(id) / count(*) + 1 AS INTEGER) AS x FROM ORDERS",
    f"SELECT CAST(lower(kind) AS TEXT) AS k, {COUNT} FROM orders GROUP BY kind ORDER BY kind",
    f"SELECT {COUNT} FROM orders WHERE kind = 'k1'",
    f"SELECT CAST(lower(kind) AS TEXT) AS k, {COUNT} FROM orders GROUP BY 1 HAVING count(*) > 22 "
    "ORDER BY 1",
    f"SELECT CAST(typeof(mixed) AS TEXT) AS t, {COUNT} FROM orders GROUP BY 1 ORDER BY 1",
    "SELECT id, CAST(quote(mixed) AS TEXT) AS q FROM orders ORDER BY mixed, id",
    f"SELECT CAST(quote(mixed) AS TEXT) AS m, {COUNT} FROM orders GROUP BY mixed ORDER BY mixed",
    f"SELECT {COUNT} FROM orders WHERE mixed = 7",
    f"SELECT {COUNT} FROM orders WHERE mixed > 'a'",
    "SELECT id, note FROM orders ORDER BY note, id LIMIT 9",
    "SELECT id, note FROM orders ORDER BY note COLLATE NOCASE DESC, id DESC LIMIT 9 OFFSET 5",
    "SELECT id, kind, total FROM orders ORDER BY total DESC NULLS LAST, id LIMIT 5 OFFSET 3",
    "SELECT id, amount FROM orders ORDER BY amount DESC, id LIMIT 20",
    "SELECT CAST(sum(amount) AS REAL) AS s FROM orders",
    "SELECT DISTINCT note FROM orders ORDER BY note",
    "SELECT DISTINCT CAST(lower(kind) AS TEXT) AS k FROM orders",
    "SELECT CAST(count(DISTINCT kind) AS INTEGER) AS a, CAST(count(DISTINCT note) AS INTEGER) AS b "
    "FROM orders",
    "SELECT CAST(count(*) FILTER (WHERE total > 50) AS INTEGER) AS n FROM orders",
    "SELECT id, CAST(rank() OVER (ORDER BY total, id) AS INTEGER) AS r, "
    "CAST(sum(id) OVER (PARTITION BY kind ORDER BY id) AS INTEGER) AS s FROM orders ORDER BY id",
    "SELECT id, CAST(lag(id) OVER w AS INTEGER) AS before FROM orders WINDOW w AS (ORDER BY id) "
    "ORDER BY id LIMIT 50",
    "WITH t AS (SELECT kind, sum(id) AS s FROM orders GROUP BY kind) "
    "SELECT CAST(max(s) AS INTEGER) AS m FROM t",
    "WITH orders AS (SELECT weight AS id FROM kinds) SELECT id FROM orders",
    f"WITH orders AS (SELECT id FROM main.orders WHERE id > 5) SELECT {COUNT} FROM orders",
    f"WITH RECURSIVE r(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM r WHERE x < 5) "
    f"SELECT CAST(x AS INTEGER) AS x, {COUNT} FROM r LEFT JOIN orders ON id % 5 = x "
    "GROUP BY x ORDER BY x",
    "WITH RECURSIVE r(x) AS (SELECT min(id) FROM orders UNION ALL "
    "SELECT o.id FROM r JOIN orders o ON o.id = r.x + 1 WHERE o.id < 40) "
    "SELECT CAST(max(x) AS INTEGER) AS m FROM r",
    "SELECT CAST(upper(kind) AS TEXT) AS k FROM orders UNION SELECT CAST(kind AS TEXT) FROM kinds "
    "ORDER BY 1",
    "SELECT order_id FROM items EXCEPT SELECT id FROM orders ORDER BY 1",
    "SELECT id FROM orders INTERSECT SELECT n FROM items ORDER BY 1",
    "SELECT kind FROM kinds UNION ALL SELECT note FROM orders",
    "SELECT id FROM orders WHERE total > (SELECT avg(total) FROM orders) ORDER BY id",
    "SELECT id FROM orders o WHERE NOT EXISTS (SELECT 1 FROM items i WHERE i.n = o.id + 200)",
    "SELECT weight, CAST((SELECT count(*) FROM orders o WHERE o.kind = k.kind) AS INTEGER) AS n "
    "FROM kinds k ORDER BY weight",
    "SELECT kind FROM kinds WHERE kind NOT IN (SELECT kind FROM orders WHERE id BETWEEN 1 AND 3)",
    "SELECT k.kind, CAST(count(o.id) AS INTEGER) AS n FROM kinds k LEFT JOIN orders o "
    "ON k.kind = o.kind GROUP BY 1 ORDER BY 1",
    "SELECT k.kind, o.id FROM kinds k LEFT JOIN orders o ON k.kind = o.kind AND o.id = 1",
    "SELECT a.id, b.id AS other FROM orders a JOIN orders b ON a.total = b.total AND a.id < b.id "
    "ORDER BY 1, 2",
    f"SELECT {COUNT} FROM orders a, orders b WHERE a.mixed = b.mixed",
    "SELECT o.kind, CAST(sum(i.price) AS REAL) AS p FROM orders o JOIN items i ON i.n = o.id "
    "WHERE o.kind = 'k1' GROUP BY 1 ORDER BY 1",
    f"SELECT {COUNT} FROM items INDEXED BY items_n WHERE n > 5",
    f"SELECT {COUNT}, CAST(sum(weight) AS INTEGER) AS w FROM big",
    f"SELECT {COUNT} FROM bigger",
    "SELECT b.id, b.weight FROM bigger b JOIN items i ON i.n = b.id ORDER BY 1 LIMIT 3",
    f"SELECT {COUNT} FROM main.orders JOIN heavy USING (kind)",
    'SELECT "Id", "select", CAST(typeof("a""b") AS TEXT) AS t FROM "order lines" ORDER BY "id"',
    f"SELECT [select], {COUNT} FROM [ORDER LINES] GROUP BY [select] ORDER BY 1",
    f"SELECT b, {COUNT} FROM keyed GROUP BY b ORDER BY b",
    "SELECT id, twice FROM orders ORDER BY twice DESC LIMIT 3",
    "SELECT CAST(max(twice) AS INTEGER) AS t FROM orders",
    "SELECT rowid AS r, _rowid_ AS s FROM orders ORDER BY oid LIMIT 3",
    "SELECT CAST(j.value AS TEXT) AS v, o.id FROM orders o, json_each('[1, 2]') j ORDER BY 2, 1",
    f"SELECT {COUNT}, 'orders' AS t, 'it''s; -- orders' AS u FROM orders -- the end",
    "SELECT id FROM orders WHERE 0 AND EXISTS (SELECT 1 FROM items)",
    f"SELECT {COUNT} FROM (SELECT 'k1' AS kind) JOIN orders USING (kind)",
    f"SELECT {COUNT} FROM kinds NATURAL JOIN (SELECT kind FROM orders)",
    f"SELECT {COUNT} FROM (SELECT 7 AS n) JOIN items USING (n)",
    f"SELECT {COUNT} FROM (SELECT 7 AS a) JOIN keyed USING (a)",
    "SELECT * FROM kinds ORDER BY kind",
    "SELECT kind, weight FROM heavy",
    "SELECT CAST(1 AS INTEGER) AS one",
    "VALUES (CAST(1 AS INTEGER), CAST('x' AS TEXT))",
    "SELECT id, kind FROM (SELECT id, note AS kind FROM orders) ORDER BY id",
    "SELECT raw FROM items GROUP BY raw ORDER BY raw",
]


@pytest.mark.parametrize("sql", QUERIES)
def test_it_is_the_answer_of_one_file(sql, sharded, whole):
    types = {"t": "string", "u": "string"} if "AS u" in sql else None
    check(sql, sharded, whole, types=types)


@pytest.mark.parametrize(
    ("sql", "params"),
    [
        (f"SELECT {COUNT} FROM orders WHERE id > ? AND note < ?", [5, "Z"]),
        (f"SELECT {COUNT} FROM orders WHERE mixed = :m", {"m": b"7"}),
        ("SELECT id FROM orders ORDER BY total, id LIMIT ?", [4]),
    ],
)
def test_parameters(sql, params, sharded, whole):
    assert len(check(sql, sharded, whole, params))


def test_types_may_be_chosen(four, whole):
    found = check(
        "SELECT count(*) AS n, avg(id) AS a FROM orders",
        four,
        whole,
        types={"n": "int64", "a": "double"},
    )
    assert found.to_pylist() == [{"n": 120, "a": 59.5}]


@pytest.mark.parametrize(
    ("sql", "reason"),
    [
        ("SELECT rowid FROM items", "system-column"),
        ("SELECT i.OID FROM Items i", "system-column"),
        ("SELECT o.id FROM orders o JOIN kinds k ON k.rowid = o.id", "system-column"),
        ("SELECT CAST(note AS TEXT) AS t FROM words", "virtual-table"),
        ("SELECT id FROM orders WHERE note IN (SELECT note FROM words)", "virtual-table"),
        (
            f"SELECT {COUNT} FROM kinds JOIN (SELECT 1 AS kind, note FROM words) USING (kind)",
            "virtual-table",
        ),
        (f"SELECT {COUNT} FROM orders JOIN Words USING (note)", "virtual-table"),
        ("SELECT CAST(seq AS INTEGER) AS n FROM sqlite_sequence", "system-table"),
        ("SELECT name FROM sqlite_master", "system-table"),
        ("SELECT CAST(page_count AS INTEGER) AS n FROM pragma_page_count", "system-table"),
        ("SELECT id, CAST(last_insert_rowid() AS INTEGER) AS r FROM orders", "function"),
    ],
)
def test_what_is_refused(sql, reason, four):
    with pytest.raises(dss.MergeRefusedError) as caught:
        dss.collect(sql, four, merge="global")
    assert caught.value.reason == reason


def test_rows_that_one_file_could_not_hold_are_refused(tmp_path):
    files = {f"s{i}": make(tmp_path / f"{i}.db") for i in range(2)}  # both have them all
    topology = dss.Topology.from_dsns(files, sharded=SHARDED)
    with pytest.raises(dss.MergeRefusedError, match="UNIQUE.*orders") as caught:
        dss.collect(f"SELECT {COUNT} FROM orders", topology, merge="global")
    assert caught.value.reason == "constraint"


def test_a_sharded_table_must_be_there(four):
    topology = dss.Topology(four.shards, (dss.ShardedTable("big", "id"),))
    with pytest.raises(dss.MergeRefusedError, match="'big' is no table") as caught:
        dss.collect("SELECT * FROM kinds", topology, merge="global")
    assert caught.value.reason == "unknown-table"


@pytest.mark.parametrize(
    ("old", "new", "match"),
    [
        ("kind TEXT COLLATE NOCASE", "kind TEXT", "NOCASE"),
        ("note TEXT", "note NUMERIC", "NUMERIC"),
        ("CHECK", "more TEXT, CHECK", "columns here"),
        ("\nCREATE TABLE orders", "PRAGMA encoding = 'UTF-16le';\nCREATE TABLE orders", "UTF-16le"),
    ],
)
def test_shards_must_agree(old, new, match, tmp_path):
    schema = SCHEMA.replace(old, new, 1)
    files = [make(tmp_path / f"{i}.db", i, 2, one) for i, one in enumerate([SCHEMA, schema])]
    topology = dss.Topology.from_dsns({"s0": files[0], "s1": files[1]}, sharded=SHARDED)
    with pytest.raises(dss.SchemaMismatchError, match=match):
        dss.collect(f"SELECT {COUNT} FROM orders", topology, merge="global")


def test_views_must_agree_where_they_are_read(tmp_path):
    other = SCHEMA.replace("WHERE weight > 2", "WHERE weight > 3", 1)
    files = [make(tmp_path / f"{i}.db", i, 2, one) for i, one in enumerate([SCHEMA, other])]
    topology = dss.Topology.from_dsns({"s0": files[0], "s1": files[1]}, sharded=SHARDED)
    dss.collect(f"SELECT {COUNT} FROM orders JOIN kinds USING (kind)", topology, merge="global")
    with pytest.raises(dss.SchemaMismatchError, match="heavy is defined in another way"):
        dss.collect(f"SELECT {COUNT} FROM orders JOIN heavy USING (kind)", topology, merge="global")


def test_utf_16_files_are_gathered_in_their_own_order(tmp_path, whole):
    schema = "PRAGMA encoding = 'UTF-16le';" + SCHEMA
    topology = make_shards(tmp_path, 3, schema)
    alone = dss.Topology.from_dsns([make(tmp_path / "whole.db", schema=schema)])
    check("SELECT id, note FROM orders ORDER BY note, id", topology, alone)


def test_explain(four):
    sql = f"SELECT {COUNT} FROM orders o JOIN kinds k ON k.kind = o.kind"
    found = dss.explain(sql, four, merge="global")
    assert (found.strategy, found.reason, found.final) == ("gather", "all-rows", sql)
    by_table = {one["table"]: one for one in found.gathered}
    assert sorted(by_table) == ["kinds", "orders"]
    assert list(by_table["kinds"]["rows"].values()) == [7]
    assert by_table["orders"]["select"].startswith('SELECT "id", "kind"')
    assert by_table["orders"]["bytes"]["s3"] == 0 < by_table["orders"]["bytes"]["s2"]
    direct = dss.explain("SELECT * FROM kinds", four, merge="global")
    assert (direct.strategy, direct.reason) == ("direct", "reference-tables")


def test_too_much_is_refused_by_estimate_and_while_it_is_counted(tmp_path, monkeypatch):
    topology = make_shards(tmp_path, 3)
    for i in range(2):
        with closing(sqlite3.connect(tmp_path / f"s{i}.db")) as connection, connection:
            connection.execute(
                "WITH RECURSIVE r(x) AS (SELECT ? UNION ALL SELECT x + 2 FROM r WHERE x < 50000) "
                "INSERT INTO items SELECT x, x, x, zeroblob(10) FROM r",
                (1000 + i,),
            )
    sql = f"SELECT {COUNT} FROM items"
    with pytest.raises(dss.MergeRefusedError, match="about .* bytes of items") as caught:
        dss.collect(sql, topology, merge="global", max_gather_bytes=500_000)
    assert caught.value.reason == "max-gather-bytes"
    size = dss.explain(sql, topology, merge="global").gathered_bytes
    assert 1_000_000 < size < 3_000_000
    monkeypatch.setattr(SQLiteDriver, "estimate", lambda *a: [Estimate()] * len(a[-1]))
    with pytest.raises(dss.MergeRefusedError, match="more of items") as caught:
        dss.collect(sql, topology, merge="global", max_gather_bytes=500_000)
    assert caught.value.reason == "max-gather-bytes"
    found = dss.collect(sql, topology, merge="global", max_gather_bytes=4_000_000)
    assert found.to_pylist() == [{"n": 300 + len(range(1000, 50_002))}]


def test_a_shard_that_fails_is_named(four, tmp_path, monkeypatch):
    topology = make_shards(tmp_path, 2)
    sql = f"SELECT {COUNT} FROM orders"
    at = dss.explain(sql, topology, merge="global").shards[0]
    other = {"s0": "s1", "s1": "s0"}[at]
    answer = SQLiteDriver.estimate

    def break_one(_, connection, query, extracts):
        if connection.path.endswith(f"{other}.db"):
            found = answer(connection, query, extracts)
            (tmp_path / f"{other}.db").write_bytes(b"no database" * 1000)
            return found
        return answer(connection, query, extracts)

    monkeypatch.setattr(SQLiteDriver, "estimate", break_one)
    with pytest.raises(dss.ShardSQLError) as caught:
        dss.collect(sql, topology, merge="global")
    assert caught.value.shard == other


def test_an_error_of_the_query_itself_is_told(four):
    with pytest.raises(dss.QueryError, match="integer overflow"):
        dss.collect(
            "SELECT CAST(sum(9223372036854775807) AS INTEGER) AS s FROM orders",
            four,
            merge="global",
        )
    with pytest.raises(dss.QueryError, match="no such column: nope"):
        dss.collect("SELECT sum(nope) FROM orders", four, merge="global")


def test_nothing_stays_open(four):
    for _ in range(3):
        dss.collect(f"SELECT {COUNT} FROM orders", four, merge="global")
    gc.collect()
    found = [one for one in gc.get_objects() if isinstance(one, sqlite3.Connection)]
    for one in found:
        try:
            files = {row[2] for row in one.execute("PRAGMA database_list")}
        except sqlite3.ProgrammingError:
            continue  # closed
        assert files != {""}  # no database in memory
    for pool in pools.active_pools():
        assert not pool._apart
        assert not pool._busy


def test_a_cancelled_query_stops_in_memory(four):
    sql = (
        "WITH RECURSIVE r(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM r, (SELECT min(id) FROM "
        "orders)) SELECT CAST(count(*) AS INTEGER) AS n FROM r"
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
                if getattr(connection, "beside", None) is not None:
                    query_id = owner
    time.sleep(0.2)
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
