"""merge="global": the answer is the one that a database with all the rows gives."""

from __future__ import annotations

import html
import json
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pandas as pd
import psycopg2
import pytest
import values
from distributed import Client, LocalCluster
from sessions import interrupt_when, transactions, wait_until

import dask_shardsql as dss
from dask_shardsql import merge
from dask_shardsql.engine import pools
from dask_shardsql.engine.drivers.postgresql_libpq import Session
from dask_shardsql.engine.drivers.postgresql_merge import PostgreSQLMerging

SHARDED = {"mg_orders": "id", "mg_items": "order_id", "mg_parted": "id", "mg_space.mg_far": "id"}
MOODS = ("sad", "ok", "happy")
SCHEMA = """
CREATE TYPE mg_mood AS ENUM ('sad', 'ok', 'happy');
CREATE TYPE mg_pair AS (a int4, b text);
CREATE TABLE mg_orders (
    id int8 PRIMARY KEY, kind text, total numeric(12,2), at timestamptz, "Note" text,
    mood mg_mood, moods mg_mood[], pair mg_pair, odd float8);
CREATE TABLE mg_items (order_id int8, n int4, price float8, qty int4, PRIMARY KEY (order_id, n));
CREATE TABLE mg_kinds (kind text PRIMARY KEY, weight int4);
CREATE TABLE mg_parted (id int8, v int4) PARTITION BY RANGE (id);
CREATE TABLE mg_part_1 PARTITION OF mg_parted FOR VALUES FROM (0) TO (50);
CREATE TABLE mg_part_2 PARTITION OF mg_parted FOR VALUES FROM (50) TO (1000);
CREATE SCHEMA mg_space;
CREATE TABLE mg_space.mg_far (id int8, v int4);
CREATE VIEW mg_big AS SELECT o.*, k.weight FROM mg_orders o JOIN mg_kinds k USING (kind)
    WHERE total > 100;
CREATE VIEW mg_space.mg_bigger AS SELECT id, weight, total FROM mg_big WHERE weight > 1;
CREATE VIEW mg_heavy AS SELECT * FROM mg_kinds WHERE weight > 2;
CREATE MATERIALIZED VIEW mg_kept AS SELECT count(*) AS n FROM mg_orders;
CREATE FUNCTION mg_count() RETURNS int8 LANGUAGE sql STABLE AS 'SELECT count(*) FROM mg_orders';
CREATE FUNCTION mg_atomic() RETURNS int8 LANGUAGE sql STABLE
    BEGIN ATOMIC SELECT count(*) FROM mg_big; END;
CREATE VIEW mg_hidden AS SELECT mg_count() AS n;
CREATE FUNCTION mg_twice(x numeric) RETURNS numeric LANGUAGE sql IMMUTABLE AS 'SELECT 2 * x';
"""
ORDERS = [
    (
        i,
        None if i % 17 == 0 else f"k{i % 5}",
        None if i % 11 == 0 else i * 7 % 1000 + i / 4,
        f"2024-01-01 00:00:00+00:{i % 60:02}",
        ["straße", "Zebra", "apple", "Äpfel", "apple ", ""][i % 6],
        MOODS[i % 3],
        "{" + ",".join(MOODS[: i % 4]) + "}",
        f"({i},x)",
        ["NaN", "Infinity", 1.5, -0.0, None][i % 5],
    )
    for i in range(300)
]
ITEMS = [(i % 310, i, i * 1.25, i % 7) for i in range(900)]


@pytest.fixture(scope="module")
def made(servers):
    for number, name in enumerate([*servers.dsns, "reference"]):
        with servers.session(name) as cursor:
            for other in range(number):  # so that no two databases have the same OIDs
                cursor.execute(f"CREATE TYPE mg_other_{other} AS ENUM ()")
    servers.execute(SCHEMA)
    rows = [(f"k{i}", i) for i in range(7)]
    servers.load("mg_kinds", rows)
    return servers


@pytest.fixture(scope="module", params=[1, 2, 4, 7])
def sharded(request, made):
    """Topologies: all rows over n shards, of which the last is empty where there are several."""
    n = request.param
    names = list(made.dsns)[:n]

    def shard_of(row):
        return hash(row[0]) % max(1, n - 1)

    made.execute("TRUNCATE mg_orders, mg_items, mg_parted, mg_space.mg_far")
    made.load("mg_orders", ORDERS, shard_of=shard_of)
    made.load("mg_items", ITEMS, shard_of=shard_of)
    for table in ("mg_parted", "mg_space.mg_far"):
        made.load(table, [(i, i % 9) for i in range(100)], shard_of=shard_of)
    return dss.Topology.from_dsns({name: made.dsns[name] for name in names}, sharded=SHARDED)


@pytest.fixture(scope="module")
def four(made):
    """Four shards, with rows."""
    made.execute("TRUNCATE mg_orders, mg_items")
    made.load("mg_orders", ORDERS, shard_of=lambda row: row[0] % 4)
    made.load("mg_items", ITEMS, shard_of=lambda row: row[0] % 4)
    return dss.Topology.from_dsns({n: made.dsns[n] for n in list(made.dsns)[:4]}, sharded=SHARDED)


def one_database(servers, sql, **options):
    return dss.collect(sql, servers.reference, **options)


def rows_of(table):
    # as texts, so that NaN is NaN and -0.0 is not 0.0
    return [repr(row) for row in table.to_pylist()]


QUERIES = [
    "SELECT count(*), count(total) AS n, sum(total), avg(total), min(total), max(total) "
    "FROM mg_orders",
    "SELECT count(*) FROM mg_orders WHERE false",
    "SELECT sum(id) / count(*) + 1 AS x, round(avg(total), 3)::float8 AS y FROM mg_orders",
    "SELECT avg(odd), stddev(total), var_pop(id), round(corr(id, total)::numeric, 9) AS c "
    "FROM mg_orders WHERE id % 5 = 2",
    "SELECT kind, count(*) FROM mg_orders GROUP BY kind ORDER BY kind",
    "SELECT kind, sum(total) AS s FROM mg_orders GROUP BY 1 HAVING sum(total) > 30000 "
    "ORDER BY s, 1",
    "SELECT kind AS k FROM mg_orders GROUP BY kind ORDER BY max(total) DESC NULLS LAST, 1 LIMIT 3",
    "SELECT id % 3 AS r, mood, count(*) FROM mg_orders GROUP BY id % 3, mood ORDER BY 1, 2",
    "SELECT id, kind, total FROM mg_orders ORDER BY total DESC, id LIMIT 5 OFFSET 3",
    "SELECT id FROM mg_orders ORDER BY total FETCH FIRST 3 ROWS WITH TIES",
    'SELECT DISTINCT "Note" FROM mg_orders ORDER BY "Note"',
    'SELECT DISTINCT "Note" FROM mg_orders',
    'SELECT min("Note"), max("Note") FROM mg_orders',
    'SELECT id, "Note" FROM mg_orders ORDER BY "Note" COLLATE "C" DESC, id LIMIT 7',
    "SELECT DISTINCT ON (kind) kind, id, total FROM mg_orders ORDER BY kind, total DESC, id",
    "SELECT count(DISTINCT kind) AS a, count(DISTINCT mood) AS b FROM mg_orders",
    "SELECT mood, count(*) FILTER (WHERE total > 500) FROM mg_orders GROUP BY mood ORDER BY mood",
    "SELECT max(mood), min(mood), array_agg(id ORDER BY total, id) FROM mg_orders WHERE id < 20",
    "SELECT string_agg(kind, ',' ORDER BY id) FROM mg_orders WHERE id < 30",
    "SELECT percentile_cont(0.5) WITHIN GROUP (ORDER BY total) AS p, "
    "mode() WITHIN GROUP (ORDER BY kind) AS m FROM mg_orders",
    "SELECT id, rank() OVER (ORDER BY total, id), sum(total) OVER (PARTITION BY kind) "
    "FROM mg_orders ORDER BY id LIMIT 40",
    "SELECT kind, mood, sum(total) FROM mg_orders GROUP BY ROLLUP (kind, mood) ORDER BY 1, 2, 3",
    "SELECT bool_and(id >= 0), bool_or(id > 298) AS o, bit_or(id), every(kind = 'k1') "
    "FROM mg_orders",
    "SELECT o.kind, sum(i.price * i.qty) FROM mg_orders o JOIN mg_items i ON i.order_id = o.id "
    "GROUP BY o.kind ORDER BY 1",
    "SELECT count(*) FROM mg_orders a JOIN mg_orders b ON a.total = b.total",
    "SELECT k.kind, count(o.id) FROM mg_kinds k LEFT JOIN mg_orders o USING (kind) GROUP BY 1 "
    "ORDER BY 1",
    "SELECT k.kind, o.id FROM mg_orders o RIGHT JOIN mg_kinds k ON k.kind = o.kind AND o.id = 1",
    "SELECT k.kind, o.id FROM mg_orders o FULL JOIN mg_kinds k ON k.kind = o.kind AND o.id < 3",
    "SELECT id FROM mg_orders WHERE total > (SELECT avg(total) FROM mg_orders)",
    "SELECT id FROM mg_orders o WHERE NOT EXISTS (SELECT FROM mg_items i WHERE i.qty = o.id)",
    "SELECT kind FROM mg_kinds WHERE kind NOT IN "
    "(SELECT kind FROM mg_orders WHERE id BETWEEN 1 AND 3)",
    "SELECT weight, (SELECT count(*) FROM mg_orders o WHERE o.kind = k.kind) FROM mg_kinds k",
    "WITH t AS (SELECT kind, sum(total) AS s FROM mg_orders GROUP BY kind) SELECT max(s) FROM t",
    "WITH RECURSIVE r(n) AS (VALUES (1) UNION ALL SELECT n + 1 FROM r WHERE n < 5) "
    "SELECT n, count(o.id) FROM r LEFT JOIN mg_orders o ON o.id % 5 = n GROUP BY n ORDER BY n",
    "SELECT kind FROM mg_orders UNION SELECT kind FROM mg_kinds ORDER BY 1",
    "SELECT id FROM mg_orders EXCEPT SELECT order_id FROM mg_items",
    "SELECT order_id FROM mg_items EXCEPT ALL SELECT id FROM mg_orders",
    "SELECT kind FROM mg_kinds UNION ALL SELECT kind FROM mg_orders",
    "SELECT id, kind, total FROM mg_orders GROUP BY id ORDER BY id LIMIT 4",
    "SELECT * FROM mg_orders",
    "SELECT o FROM mg_orders o WHERE id < 9",
    "SELECT row_to_json(o)::text AS j, o.id FROM mg_orders o WHERE id < 5",
    "SELECT count(o) FROM mg_orders o",
    "SELECT moods, pair, mood FROM mg_orders ORDER BY pair DESC LIMIT 5",
    "SELECT mood = ANY(moods) AS has, count(*) FROM mg_orders GROUP BY 1 ORDER BY 1",
    "SELECT count(*), sum(weight) FROM mg_big",
    "SELECT sum(weight) AS w, sum(total) AS t FROM mg_space.mg_bigger",
    "SELECT b.id FROM mg_space.mg_bigger b JOIN mg_items i ON i.order_id = b.id ORDER BY 1 LIMIT 3",
    "SELECT count(*) FROM public.mg_orders JOIN mg_heavy USING (kind)",
    "SELECT count(*), sum(v) FROM mg_parted",
    "SELECT count(*), sum(v) FROM mg_part_2",
    "SELECT (SELECT count(*) FROM mg_part_1) AS a, (SELECT count(*) FROM mg_parted) AS b",
    "SELECT count(*), max(v) FROM mg_space.mg_far",
    "WITH mg_orders AS (SELECT 1 AS a) SELECT * FROM mg_orders",
    "SELECT count(*) AS c, 'mg_orders' AS t, $$it's; -- mg_orders$$ AS u FROM mg_orders -- the end",
    "SELECT * FROM mg_kinds ORDER BY kind",
    "SELECT 1 AS one",
    "VALUES (1, 'x')",
    "SELECT mg_twice(sum(total)) AS t FROM mg_orders",
    "SELECT id FROM mg_orders TABLESAMPLE bernoulli (100) ORDER BY id",
    "SELECT extract(hour FROM max(at)) AS h, date_trunc('month', min(at)) AS m FROM mg_orders",
    "SELECT id, x FROM mg_orders, LATERAL generate_series(1, id % 3) AS x",
    "SELECT count(*) FROM mg_orders o NATURAL JOIN mg_kinds",
]


@pytest.mark.parametrize("sql", QUERIES)
def test_it_is_the_answer_of_one_database(sql, sharded, made):
    expected = one_database(made, sql)
    found = dss.collect(sql, sharded, merge="global")
    assert found.schema.equals(expected.schema)
    if "ORDER BY" not in sql:
        assert sorted(rows_of(found)) == sorted(rows_of(expected))
    else:
        assert rows_of(found) == rows_of(expected)


@pytest.mark.parametrize(
    ("sql", "way"),
    [
        ("SELECT * FROM mg_orders", "union"),
        ("SELECT id, upper(kind) FROM mg_orders o WHERE o.total > 5 AND mood <> 'sad'", "union"),
        (
            "SELECT o.id FROM mg_orders o JOIN mg_items i ON (i.order_id = o.id) AND i.n > 3",
            "union",
        ),
        ("SELECT o.id FROM mg_orders o, mg_items i WHERE i.order_id = o.id", "union"),
        ("SELECT o.id FROM mg_orders o LEFT JOIN mg_kinds k ON k.kind = o.kind", "union"),
        ("SELECT * FROM mg_kinds", "direct"),
        ("SELECT count(*) FROM mg_orders", "merge"),
        ("SELECT o.id FROM mg_kinds k LEFT JOIN mg_orders o ON k.kind = o.kind", "gather"),
        ("SELECT o.id FROM mg_orders o JOIN mg_items i ON i.n = o.id", "gather"),
        ("SELECT id FROM mg_big", "union"),
    ],
)
def test_the_cheapest_way_is_taken(sql, way, four, made):
    assert dss.explain(sql, four, merge="global").strategy == way
    found, expected = dss.collect(sql, four, merge="global"), one_database(made, sql)
    assert sorted(rows_of(found)) == sorted(rows_of(expected))


@pytest.mark.parametrize(
    ("sql", "reason"),
    [
        ("SELECT ctid::text FROM mg_orders", "system-column"),
        ("SELECT tableoid::int8 AS t, count(*) FROM mg_parted GROUP BY 1", "system-column"),
        ("SELECT n FROM mg_kept, (SELECT count(*) FROM mg_orders) q", "materialized-view"),
        ("SELECT n FROM mg_kept", "materialized-view"),
        ("SELECT mg_count() AS n FROM mg_orders", "function"),
        ("SELECT mg_count() AS n", "function"),
        ("SELECT mg_atomic() AS n", "function"),
        ("SELECT n FROM mg_hidden", "function"),
        ("SELECT count(*) FROM ONLY mg_parted", "only"),
        ("SELECT ROW(id, 1) AS r FROM mg_orders ORDER BY id", "column-type"),
    ],
)
def test_what_would_be_wrong_is_refused(sql, reason, four):
    with pytest.raises(dss.MergeRefusedError, match=reason) as caught:
        dss.collect(sql, four, merge="global")
    assert caught.value.reason == reason


HIDING = """
CREATE TABLE mh_main (id int8 PRIMARY KEY, at timestamptz, v int4);
CREATE TABLE mh_other (id int8, v int4);
CREATE TABLE mh_plain (k text, r regclass, a aclitem);
CREATE VIEW mh_view AS SELECT * FROM mh_main WHERE v > 2;
CREATE FUNCTION mh_by_view() RETURNS int8 LANGUAGE sql STABLE AS 'SELECT count(*) FROM mh_view';
CREATE FUNCTION mh_outer() RETURNS int8 LANGUAGE plpgsql STABLE AS 'BEGIN RETURN mh_by_view(); END';
CREATE FUNCTION mh_lies() RETURNS int8 LANGUAGE sql IMMUTABLE AS 'SELECT count(*) FROM mh_main';
CREATE FUNCTION mh_step(s int8, x int8) RETURNS int8 LANGUAGE sql STABLE
    AS 'SELECT s + x + (SELECT count(*) FROM mh_main)';
CREATE AGGREGATE mh_agg(int8) (SFUNC = mh_step, STYPE = int8, INITCOND = '0');
CREATE OPERATOR <+> (LEFTARG = int8, RIGHTARG = int8, FUNCTION = mh_step);
CREATE FUNCTION mh_check(x int8) RETURNS bool LANGUAGE sql STABLE
    AS 'SELECT x <= (SELECT count(*) FROM mh_main)';
CREATE DOMAIN mh_domain AS int8 CHECK (mh_check(VALUE));
CREATE FUNCTION mh_add(s int8, x timestamptz) RETURNS int8 LANGUAGE sql IMMUTABLE AS 'SELECT s + 1';
CREATE AGGREGATE length(timestamptz) (SFUNC = mh_add, STYPE = int8, INITCOND = '0');
CREATE TABLE mh_parent (id int8);
CREATE TABLE mh_child () INHERITS (mh_parent);
CREATE TABLE mh_regs (id int8, r regclass, a aclitem);
CREATE TABLE mh_guarded (id int8, who text);
CREATE TABLE mh_char (k char(5), v int4);
CREATE TABLE mh_varchar (k varchar, v int4);
"""
HIDING_KEYS = {
    **{f"mh_{name}": "id" for name in ("main", "other", "child", "regs", "guarded")},
    "mh_char": "k",
    "mh_varchar": "k",
}


@pytest.fixture(scope="module")
def hiding(made):
    made.execute(HIDING)
    rows = [(i, "2024-01-01", i % 5) for i in range(20)]
    made.load("mh_main", rows, shard_of=lambda row: row[0] % 2)
    made.load("mh_other", [(i, i) for i in range(20)], shard_of=lambda row: row[0] % 2)
    made.load("mh_char", [("a", 1)], shard_of=lambda row: 0)
    made.load("mh_varchar", [("a", 1), ("a    ", 2)], shard_of=lambda row: 1)
    dsns = {name: made.dsns[name] for name in ("s1", "s2")}
    return dss.Topology.from_dsns(dsns, sharded=HIDING_KEYS)


@pytest.mark.parametrize(
    ("sql", "reason"),
    [
        ("SELECT mh_by_view() AS n", "function"),
        ("SELECT mh_outer() AS n, count(*) AS c FROM mh_other", "function"),
        ("SELECT mh_lies() AS n", "function"),
        ("SELECT mh_agg(id) AS n FROM mh_other", "function"),
        ("SELECT sum(id <+> 1::int8) AS n FROM mh_other", "function"),
        ("SELECT (4::int8)::mh_domain AS n", "function"),
        ("SELECT to_json(json_populate_record(null::mh_main, '{}'))::text AS n", "function"),
        ("SELECT count(*) FROM mh_parent", "parent-table"),
        ("SELECT r::text AS r, count(*) AS c FROM mh_regs GROUP BY 1", "column-type"),
    ],
)
def test_what_hides_a_sharded_table_is_refused(sql, reason, hiding):
    with pytest.raises(dss.MergeRefusedError) as caught:
        dss.collect(sql, hiding, merge="global")
    assert caught.value.reason == reason


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT length(at) AS n FROM mh_main",
        "SELECT a.v, b.v AS w FROM mh_char a JOIN mh_varchar b ON a.k = b.k",
        "SELECT a.v FROM mh_main a JOIN mh_other b ON a.id = b.id",
        "SELECT count(a) AS n FROM mh_regs",
        "SELECT count(*) AS n FROM mh_view",
        "SELECT count(*) AS n FROM mh_other",
    ],
)
def test_what_is_easily_taken_for_a_union(sql, hiding, made):
    found, expected = dss.collect(sql, hiding, merge="global"), one_database(made, sql)
    assert found.schema.equals(expected.schema)
    assert sorted(rows_of(found)) == sorted(rows_of(expected))
    front = "options='-c search_path=public,pg_temp'"
    dsns = {shard.name: f"{made.dsns[shard.name]} {front}" for shard in hiding.shards}
    behind = dss.Topology.from_dsns(dsns, sharded=HIDING_KEYS)
    assert sorted(rows_of(dss.collect(sql, behind, merge="global"))) == sorted(rows_of(expected))


@pytest.mark.parametrize("name", ["mh_typo", "MH_MAIN", "nowhere.mh_main"])
def test_a_sharded_table_that_is_not_there_is_an_error(name, hiding):
    topology = dss.Topology(hiding.shards, (dss.ShardedTable(name, "id"),))
    with pytest.raises(dss.MergeRefusedError, match="unknown-table"):
        dss.collect("SELECT count(*) FROM mh_main", topology, merge="global")


def test_row_security_is_refused(hiding, made, servers):
    made.execute(
        "ALTER TABLE mh_guarded ENABLE ROW LEVEL SECURITY; "
        "CREATE POLICY mh_own ON mh_guarded USING (who = current_user); "
        "CREATE ROLE mh_bob LOGIN PASSWORD 'mh_bob'; GRANT SELECT ON mh_guarded TO mh_bob; "
        "GRANT TEMPORARY ON DATABASE postgres TO mh_bob"
    )
    sql = "SELECT count(*) FROM mh_guarded"
    assert dss.collect(sql, hiding, merge="global").equals(one_database(made, sql))
    dsns = {n: f"{servers.dsns[n]} user=mh_bob password=mh_bob" for n in ("s1", "s2")}
    bob = dss.Topology.from_dsns(dsns, sharded={"mh_guarded": "id"})
    with pytest.raises(dss.MergeRefusedError, match="row-security"):
        dss.collect(sql, bob, merge="global")


def test_columns_of_other_types_are_not_converted(four, servers):
    sql = "SELECT count(total) FROM mg_orders"
    other = "s1" if dss.explain(sql, four, merge="global").shards[0] != "s1" else "s2"
    with closing(psycopg2.connect(servers.dsns[other])) as connection:
        connection.autocommit = True
        cursor = connection.cursor()
        cursor.execute("ALTER TABLE mg_items ADD spare numeric(12,2)")
        try:
            others = [name for name in servers.dsns if name != other]
            for name in [*others, "reference"]:
                with servers.connect(name) as one, one.cursor() as single:
                    single.execute("ALTER TABLE mg_items ADD spare numeric(12,4)")
            sql = sql.replace("mg_orders", "mg_items").replace("total", "spare")
            with pytest.raises(dss.SchemaMismatchError, match="here, and numeric") as caught:
                dss.collect(sql, four, merge="global")
            assert caught.value.shard in servers.dsns
        finally:
            servers.execute("ALTER TABLE mg_items DROP spare")
    check_left_well(servers)


def test_tables_of_one_name_in_two_schemas(made, servers, four):
    made.execute(
        "CREATE SCHEMA mg_other; CREATE TABLE mg_other.mg_kinds (kind text, id int8); "
        "CREATE TABLE mg_other.mg_orders (id int8)"
    )
    made.load("mg_other.mg_orders", [(1,)])
    dsns = {shard.name: servers.dsns[shard.name] for shard in four.shards}
    hides = "options='-c search_path=mg_other,public'"

    def refused(sql, sharded, dsns=dsns):
        with pytest.raises(dss.MergeRefusedError) as caught:
            dss.collect(sql, dss.Topology.from_dsns(dsns, sharded=sharded), merge="global")
        return caught.value.reason

    try:
        sql = "SELECT count(*) FROM public.mg_orders o, mg_other.mg_orders p WHERE o.id = p.id"
        qualified = {"public.mg_orders": "id"}
        assert refused(sql, SHARDED) == "ambiguous-name"
        hiding = {name: f"{dsn} {hides}" for name, dsn in dsns.items()}
        for text in ("SELECT count(*) FROM mg_orders", "SELECT count(*) FROM mg_big"):
            assert refused(text, SHARDED, hiding) == "ambiguous-name"
            plain = dss.Topology.from_dsns(dsns, sharded=qualified)
            assert dss.collect(text, plain, merge="global").equals(one_database(made, text))
        assert dss.collect(sql, plain, merge="global").equals(one_database(made, sql))
        plain = dss.Topology.from_dsns(hiding, sharded=qualified)
        assert dss.collect(sql, plain, merge="global").equals(one_database(made, sql))
        assert refused(sql, {**qualified, "mg_other.mg_orders": "id"}) == "same-name"
        both = {**qualified, "mg_other.mg_kinds": "id"}
        sql = "SELECT count(*) FROM mg_kinds, mg_other.mg_kinds"
        plain = dss.Topology.from_dsns(dsns, sharded=both)
        assert dss.collect(sql, plain, merge="global").equals(one_database(made, sql))
        whole = "SELECT count(k) FROM public.mg_kinds k, mg_other.mg_kinds"
        assert refused(whole, both) == "hidden-name"
    finally:
        made.execute("DROP SCHEMA mg_other CASCADE")


def test_parameters_types_and_the_search_path(made, four, servers):
    sql = "SELECT kind, count(*) AS n, avg(total) AS a FROM mg_orders WHERE total > %(t)s " + (
        "AND kind <> '100%%' GROUP BY kind ORDER BY kind"
    )
    options = {"params": {"t": 250}, "types": {"a": "decimal128(38, 18)"}}
    found = dss.collect(sql, four, merge="global", **options)
    assert found.equals(one_database(made, sql, **options))
    path = "options='-c search_path=mg_space,public'"
    names = [shard.name for shard in four.shards]
    topology = dss.Topology.from_dsns(
        {name: f"{servers.dsns[name]} {path}" for name in names}, sharded=SHARDED
    )
    sql = "SELECT count(*), sum(b.weight) FROM mg_bigger b JOIN mg_far USING (id)"
    made.execute("TRUNCATE mg_space.mg_far")
    made.load("mg_space.mg_far", [(i, i) for i in range(90)], shard_of=lambda row: row[0] % 4)
    expected = one_database(
        made, sql.replace("mg_b", "mg_space.mg_b").replace("mg_f", "mg_space.mg_f")
    )
    assert dss.collect(sql, topology, merge="global").equals(expected)


@pytest.mark.parametrize("backend", ["pyarrow", "numpy_nullable", "numpy"])
@pytest.mark.parametrize(
    "sql", [QUERIES[4], "SELECT * FROM mg_orders WHERE id < 50", "TABLE mg_kinds"]
)
def test_as_a_dask_dataframe(sql, backend, four, made):
    def read(topology, **options):
        return dss.read_sharded_sql(sql, topology, dtype_backend=backend, **options)

    ddf, expected = read(four, merge="global"), read(made.reference).compute()
    assert ddf.npartitions == (4 if "WHERE" in sql else 1)
    pd.testing.assert_series_equal(ddf.dtypes, expected.dtypes)
    columns = list(expected.columns)[:1]
    for found in (ddf.compute(), ddf.persist().compute()):
        pd.testing.assert_frame_equal(
            found.sort_values(columns, ignore_index=True),
            expected.sort_values(columns, ignore_index=True),
        )
    assert len(ddf) == len(expected)


@pytest.mark.parametrize("way", ["libpq", "cluster", "processes"])
def test_other_ways_to_run_it(way, four, made, monkeypatch, request):
    sql = (
        "SELECT kind, sum(total) AS s, repeat('x', 300000) AS pad FROM mg_orders GROUP BY kind "
        "ORDER BY 1"
    )
    expected = one_database(made, sql)
    if way == "libpq":
        monkeypatch.setattr(Session, "is_plain", False)
        pools.close_all()
        request.addfinalizer(pools.close_all)
        assert dss.collect(sql, four, merge="global").equals(expected)
    elif way == "processes":
        assert dss.collect(sql, four, merge="global", scheduler="processes").equals(expected)
    else:
        with (
            LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=":0") as cluster,
            Client(cluster),
        ):
            assert dss.collect(sql, four, merge="global").equals(expected)
            ddf = dss.read_sharded_sql(sql, four, merge="global")
            assert ddf.compute().kind.dropna().tolist() == ["k0", "k1", "k2", "k3", "k4"]
            assert int(ddf.s.count().compute()) == 6


def test_too_much_is_refused_before_and_while_it_is_gathered(four, monkeypatch, servers):
    sql = "SELECT array_agg(total ORDER BY id) AS t FROM mg_orders"
    with pytest.raises(dss.MergeRefusedError, match=r"about [\d,]+ bytes of mg_orders") as caught:
        dss.collect(sql, four, merge="global", max_gather_bytes=1000)
    assert caught.value.reason == "max-gather-bytes"
    monkeypatch.setattr(merge, "refuse_too_much", lambda *_: None)
    with pytest.raises(dss.MergeRefusedError, match="more of mg_orders") as caught:
        dss.collect(sql, four, merge="global", max_gather_bytes=1000)
    assert caught.value.reason == "max-gather-bytes"
    check_left_well(servers)
    for size in ("1 MiB", 1 << 20):
        assert len(dss.collect(sql, four, merge="global", max_gather_bytes=size)) == 1


def check_left_well(servers):
    wait_until(lambda: not transactions(servers), 10)
    for name in servers.dsns:
        with servers.session(name) as cursor:
            cursor.execute(
                "SELECT count(*) FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace "
                "WHERE n.nspname LIKE 'pg_temp%'"
            )
            assert cursor.fetchone() == (0,)


def test_errors_name_the_shard_and_leave_nothing(four, servers):
    with pytest.raises(dss.QueryError, match="division by zero") as caught:
        dss.collect("SELECT sum(1 / (id - 5)) AS x FROM mg_orders", four, merge="global")
    assert caught.value.sqlstate == "22012"
    assert caught.value.shard in servers.dsns
    with pytest.raises(dss.QueryError, match="nope") as caught:
        dss.collect("SELECT sum(nope) FROM mg_orders", four, merge="global")
    assert caught.value.position == 12
    check_left_well(servers)


@pytest.mark.parametrize("victim", ["source", "target"])
def test_a_server_that_is_lost_on_the_way(victim, four, servers, monkeypatch):
    sql = "SELECT max(id) FROM mg_orders"
    at = dss.explain(sql, four, merge="global").shards[0]
    lost = []
    name = "send" if victim == "source" else "prepare"
    as_it_was = getattr(PostgreSQLMerging, name)

    def end_one(self, *source_and_what):
        connection = source_and_what[0] if source_and_what else self._connection
        port = connection.info.port
        (shard,) = [name for name, dsn in servers.dsns.items() if f"port={port} " in f"{dsn} "]
        if not lost:
            lost.append(shard)
            with servers.session(shard) as cursor:
                cursor.execute("SELECT pg_terminate_backend(%s)", (connection.info.backend_pid,))
            time.sleep(0.2)
        as_it_was(self, *source_and_what)

    monkeypatch.setattr(PostgreSQLMerging, name, end_one)
    with pytest.raises(dss.ConnectionLostError) as caught:
        dss.collect(sql, four, merge="global")
    assert caught.value.shard == lost[0]
    assert (lost[0] == at) == (victim == "target")
    monkeypatch.undo()
    check_left_well(servers)
    assert dss.collect(sql, four, merge="global").to_pylist() == [{"max": 299}]


def test_a_session_that_waits_for_others_is_not_ended(four, servers):
    option = "options='-c idle_in_transaction_session_timeout=150'"
    dsns = {shard.name: f"{servers.dsns[shard.name]} {option}" for shard in four.shards}
    topology = dss.Topology.from_dsns(dsns, sharded=SHARDED)
    sql = "SELECT count(*) AS n FROM mg_orders o WHERE EXISTS (SELECT FROM mg_items i, mg_items j)"
    at = dss.explain(sql, topology, merge="global").shards[0]
    other = next(name for name in dsns if name != at)
    lock = psycopg2.connect(servers.dsns[other])
    found = dss.explain(sql, topology, merge="global")
    assert found.shards == (at,)
    with closing(lock), ThreadPoolExecutor() as threads:
        prepared = dss.read_sharded_sql(sql, topology, merge="global")
        lock.cursor().execute("LOCK TABLE mg_items")
        answer = threads.submit(prepared.compute, scheduler="threads")
        time.sleep(0.6)
        assert not answer.done()
        lock.rollback()
        assert answer.result()["n"].tolist() == [300]


def test_ctrl_c_while_it_gathers(four, servers):
    with closing(psycopg2.connect(servers.dsns["s2"])) as other:
        other.cursor().execute("LOCK TABLE mg_items")
        with (
            pytest.raises(KeyboardInterrupt),
            interrupt_when(lambda: len(transactions(servers)) > 0),
        ):
            dss.collect("SELECT count(*) FROM mg_items", four, merge="global")
    check_left_well(servers)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"merge": "all"}, "'global' or 'union' is needed"),
        ({"merge": "global", "shards": ["s1"]}, "shards says something of single shards"),
        ({"merge": "global", "shard_column": "shard"}, "shard_column says something"),
        ({"merge": "global", "partitions_per_shard": 2}, "partitions_per_shard says something"),
        ({"merge": "global", "max_gather_bytes": "lots"}, "max_gather_bytes must be a size"),
        ({"merge": "global", "max_gather_bytes": 1.5}, "a whole number of bytes, not 1.5"),
        ({"merge": "global", "max_gather_bytes": "1.5"}, "a whole number of bytes, not '1.5'"),
        ({"max_gather_bytes": "1 GiB"}, "leave it out, or ask for merge='global'"),
    ],
)
def test_bad_options(options, match, four):
    of_shards = {"shards", "shard_column", "partitions_per_shard"}
    for call in (dss.collect, dss.read_sharded_sql, dss.stream, dss.explain):
        if (call is dss.explain and of_shards & {*options}) or (
            call is dss.stream and "partitions_per_shard" in options
        ):
            continue
        with pytest.raises(dss.ConfigurationError, match=match):
            call("SELECT 1 AS a", four, **options)


def test_the_topology_must_name_what_is_sharded(topology, tmp_path):
    bare = dss.Topology(topology.shards)
    with pytest.raises(dss.ConfigurationError, match="which tables are sharded"):
        dss.collect("SELECT 1 AS a", bare, merge="global")
    merging = dss.Topology(topology.shards, merging=topology.shards[0].primary)
    with pytest.raises(dss.ConfigurationError, match="also where a database that merges is named"):
        dss.collect("SELECT 1 AS a", merging, merge="global")
    keywords = {"module": "sqlite3", "database": str(tmp_path / "1.db")}
    shards = tuple(
        dss.Shard(name, (dss.Server("dbapi", tuple(keywords.items())),)) for name in ("s1", "s2")
    )
    other = dss.Topology(shards, (dss.ShardedTable("t", "id"),))
    with pytest.raises(dss.ConfigurationError, match="'dbapi' cannot answer"):
        dss.collect("SELECT 1 AS a", other, merge="global")


def test_explain_a_query_that_gathers(four):
    sql = (
        "SELECT o.kind, sum(i.price) AS p FROM mg_orders o JOIN mg_items i ON i.n = o.id "
        "WHERE i.price > 5 GROUP BY 1"
    )
    found = dss.explain(sql, four, merge="global")
    facts = found.to_dict()
    assert (found.strategy, found.reason) == ("gather", "all-rows")
    assert [table["table"] for table in facts["gathered"]] == ["mg_orders", "mg_items"]
    orders, items = facts["gathered"]
    assert items["select"] == (
        'SELECT "i"."n", "i"."order_id", "i"."price" FROM public.mg_items AS "i" WHERE '
        "(i.price > CAST((5) AS DOUBLE PRECISION))"
    )
    assert orders["select"] == 'SELECT "o"."id", "o"."kind" FROM public.mg_orders AS "o"'
    assert set(items["bytes"]) == {"s1", "s2", "s3", "s4"}
    assert all(size > 0 for size in items["bytes"].values())
    assert facts["shards"] == list(found.shards)
    assert len(found.shards) == 1
    assert json.loads(json.dumps(facts)) == facts
    text, page = str(found), found._repr_html_()
    for part in ("gather (all-rows)", items["select"], "mg_orders", found.shards[0], "GROUP BY"):
        assert part in text
        assert html.escape(part) in page
    assert "is refused" not in text
    small = dss.explain(sql, four, merge="global", max_gather_bytes=10)
    assert "is refused" in str(small)
    assert small.to_dict()["max_gather_bytes"] == 10


def test_explain_others(four, made):
    union = dss.explain("SELECT id FROM mg_orders WHERE id > %s", four, [5], merge="global")
    assert (union.strategy, union.reason, len(union.shards)) == ("union", "row-wise", 4)
    direct = dss.explain("TABLE mg_kinds", four, merge="global")
    assert (direct.strategy, direct.reason, len(direct.shards)) == ("direct", "reference-tables", 1)
    alone = dss.explain("SELECT count(*) FROM mg_orders", made.reference, merge="global")
    assert (alone.strategy, alone.reason) == ("direct", "one-shard")
    asked = dss.explain("SELECT count(*) FROM mg_orders", four)
    assert (asked.strategy, asked.reason, asked.to_dict()["gathered"]) == ("union", "asked-for", [])
    refused = dss.explain("SELECT ctid::text FROM mg_orders", four, merge="global")
    assert (refused.strategy, refused.reason, refused.shards) == ("refuse", "system-column", ())
    assert "leave that out" in str(refused)
    with pytest.raises(dss.QueryError, match="nope"):
        dss.explain("SELECT nope FROM mg_orders", four, merge="global")
    with pytest.raises(dss.ConfigurationError, match="is needed"):
        dss.explain("SELECT 1 AS a", four, merge="both")


def test_explain_shows_no_password(four, servers):
    (password,) = {psycopg2.extensions.parse_dsn(dsn)["password"] for dsn in servers.dsns.values()}
    found = dss.explain("SELECT count(*) FROM mg_orders", four, merge="global")
    assert password not in f"{found}{found!r}{found.to_dict()}{found._repr_html_()}"


def test_random_queries_are_answered_as_by_one_database(servers):
    sys.path.insert(0, str(Path(__file__).parent / "fuzz"))
    try:
        import merge as fuzz
    finally:
        sys.path.pop(0)
    fuzz.load(servers)
    ways = Counter(fuzz.run(seed, servers) for seed in range(3 * values.EXAMPLES))
    for seed in range(values.EXAMPLES // 2):
        fuzz.relate(seed, servers)
    assert ways["merge"] > 10
    assert ways["gather"] > 3
