"""How queries are split with merge="global": each way, and that its answer is one database's."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

import dask_shardsql as dss

SCHEMA = """
CREATE TABLE sp_orders (
    id int8 NOT NULL, cust int4, total numeric(12,2), kind text, at timestamptz, f float8, r float4,
    flag bool, span interval, cash money, small int2, bits bit(4), doc jsonb);
CREATE TABLE sp_items (oid int8 NOT NULL, n int4, qty int4, price numeric(10,4));
CREATE TABLE sp_loose (k int8, v int4);
CREATE TABLE sp_codes (code text NOT NULL, v int4);
CREATE TABLE sp_padded (code char(5) NOT NULL, v int4);
CREATE TABLE sp_kinds (kind text, w int4, label text);
CREATE VIEW sp_big AS SELECT o.id, o.kind, o.total, k.w
    FROM sp_orders o JOIN sp_kinds k USING (kind) WHERE o.total > 200;
CREATE VIEW sp_sums AS SELECT cust, sum(total) AS total FROM sp_orders GROUP BY cust;
"""
SHARDED = {
    "sp_orders": "id",
    "sp_items": "oid",
    "sp_loose": "k",
    "sp_codes": "code",
    "sp_padded": "code",
}
RNG = random.Random(5)  # noqa: S311
ORDERS = [
    (
        i,
        RNG.choice([None, *range(12)]),
        RNG.choice([None, *(n * 7 % 1000 + n / 4 for n in range(50))]),
        RNG.choice([None, "a", "b", "ä", "B", "c"]),
        f"2024-{i % 12 + 1:02}-{i % 28 + 1:02} 05:{i % 60:02}:00+00",
        i % 16 / 4,  # sums of these are exact
        i % 8 / 2,
        RNG.choice([None, True, False]),
        f"{i % 5} days {i % 60} minutes",
        i % 100,
        i % 300,
        f"{i % 16:04b}",
        f'{{"x": {i % 3}}}',
    )
    for i in range(400)
]
ITEMS = [
    (RNG.randrange(420), i % 60, RNG.choice([None, *range(9)]), i * 1.0625) for i in range(700)
]


@pytest.fixture(scope="module")
def loaded(servers):
    servers.execute(SCHEMA)
    servers.load("sp_kinds", [(k, w, f"kind {k}") for w, k in enumerate("abcdxyz")])
    return servers


@pytest.fixture(scope="module", params=[2, 4])
def topology(request, loaded):
    """Shards of which the last is empty."""
    return filled(loaded, request.param)


def filled(loaded, number):
    names = list(loaded.dsns)[:number]

    def shard_of(row):
        return hash(row[0]) % max(1, number - 1)

    tables = ", ".join(SHARDED)
    loaded.execute(f"TRUNCATE {tables}")
    loaded.load("sp_orders", ORDERS, shard_of=shard_of)
    loaded.load("sp_items", ITEMS, shard_of=shard_of)
    loose = [(RNG.choice([None, *range(20)]), i % 7) for i in range(200)]

    def loose_shard(row):
        return row[1] % min(2, number) if row[0] is None else 0

    loaded.load("sp_loose", loose, shard_of=loose_shard)
    loaded.load("sp_codes", [(f"c{i % 30}", i) for i in range(200)], shard_of=shard_of)
    padded = [("ab" + " " * (i % 2), i) for i in range(50)]
    loaded.load("sp_padded", padded, shard_of=lambda row: len(row[0]) % 2 if number > 2 else 0)
    loaded.execute(f"ANALYZE {tables}")
    return dss.Topology.from_dsns({name: loaded.dsns[name] for name in names}, sharded=SHARDED)


def aggregates(*calls):
    columns = ", ".join(f"{call} AS c{n}" for n, call in enumerate(calls))
    return [
        f"SELECT {columns} FROM sp_orders",
        f"SELECT {columns} FROM sp_orders WHERE id < 0",
        f"SELECT kind, {columns} FROM sp_orders GROUP BY kind",
        f"SELECT cust % 3 AS g, flag, {columns} FROM sp_orders WHERE id % 3 = 0 GROUP BY 1, 2",
    ]


MERGED = [
    *aggregates("count(*)", "count(cust)", "count(*) FILTER (WHERE flag)", "count(1)"),
    *aggregates("sum(small)", "sum(cust)", "sum(id)", "sum(total)", "sum(f)", "sum(r)"),
    *aggregates("sum(span)", "sum(cash)", "avg(small)", "avg(cust)", "avg(id)", "avg(total)"),
    *aggregates("avg(f)", "avg(r)", "avg(span)", "avg(total) FILTER (WHERE cust > 3)"),
    *aggregates("min(total)", "max(total)", "min(kind)", "max(kind)", "min(at)", "max(span)"),
    *aggregates('min(kind COLLATE "C")', "max(cust + small)", "min(f)", "max(r)", "min(cash)"),
    *aggregates("bool_and(flag)", "bool_or(flag)", "every(flag)", "bit_and(cust)", "bit_or(id)"),
    *aggregates("bit_or(bits)", "bit_and(small) FILTER (WHERE flag)"),
    *aggregates("var_pop(cust)", "var_samp(total)", "variance(id)", "stddev_pop(small)"),
    *aggregates("stddev_samp(total)", "stddev(cust)", "stddev(total) FILTER (WHERE cust = 1)"),
    *aggregates("count(DISTINCT cust)", "sum(DISTINCT cust)", "count(DISTINCT kind) + count(*)"),
    *aggregates("count(DISTINCT cust) FILTER (WHERE flag)", "avg(total)", "min(DISTINCT kind)"),
    *aggregates("array_agg(DISTINCT cust)", "string_agg(DISTINCT kind, ',' ORDER BY kind)"),
    *aggregates("sum(total) / nullif(count(cust), 0)", "(sum(cust))::int4 + 1", "-sum(total)"),
    *aggregates("coalesce(max(total), 0) - coalesce(min(total), 0)", "sum(total * cust) > 3"),
    *aggregates("CASE WHEN count(*) > 40 THEN 'many' ELSE 'few' END", "round(avg(total), 2)"),
    *aggregates("sum(CASE WHEN kind = 'a' THEN total ELSE 0 END)", "(avg(cust) * 100)::text"),
    "SELECT round(corr(cust, small)::numeric, 9) AS c, round(covar_pop(f, r)::numeric, 9) AS p, "
    "round(regr_slope(f, r)::numeric, 9) AS s FROM sp_orders",
    "SELECT kind, count(*) AS n FROM sp_orders GROUP BY kind HAVING count(*) > 60",
    "SELECT kind FROM sp_orders GROUP BY kind HAVING avg(total) > 300 AND max(cust) > 2",
    "SELECT count(*) AS n FROM sp_orders HAVING sum(total) < 0",
    "SELECT 1 AS one FROM sp_orders HAVING count(*) > 5",
    "SELECT sum(total) AS s FROM sp_orders GROUP BY kind ORDER BY kind NULLS FIRST",
    "SELECT kind, sum(total) AS s FROM sp_orders GROUP BY kind ORDER BY 2 DESC NULLS LAST, 1",
    "SELECT kind, avg(f) AS a FROM sp_orders GROUP BY 1 ORDER BY max(total), kind LIMIT 2 OFFSET 1",
    "SELECT kind AS c0, cust AS c1 FROM sp_orders GROUP BY 1, 2 ORDER BY 2 DESC, 1 LIMIT 9",
    "SELECT DISTINCT count(*) AS n FROM sp_orders GROUP BY cust ORDER BY n",
    "SELECT DISTINCT ON (n) count(*) AS n, min(cust) AS c FROM sp_orders GROUP BY kind, flag "
    "ORDER BY n, c",
    "SELECT o.kind, k.label, count(*) AS n, sum(i.price) AS p FROM sp_orders o "
    "JOIN sp_items i ON i.oid = o.id LEFT JOIN sp_kinds k ON k.kind = o.kind GROUP BY 1, 2",
    "SELECT k.w, sum(i.qty) AS q FROM sp_kinds k, sp_orders o, sp_items i "
    "WHERE k.kind = o.kind AND o.id = i.oid AND i.qty > 2 GROUP BY k.w ORDER BY 1",
    "SELECT count(*) AS n FROM sp_orders o WHERE EXISTS (SELECT FROM sp_items i WHERE "
    "i.oid = o.id)",
    "SELECT count(*) AS n FROM sp_orders o WHERE NOT EXISTS "
    "(SELECT FROM sp_items i WHERE i.oid = o.id AND i.qty > 5)",
    "SELECT sum(total) AS s FROM sp_orders o WHERE id IN (SELECT oid FROM sp_items WHERE qty > 6)",
    "SELECT sum(total) AS s FROM sp_orders o WHERE id IN "
    "(SELECT oid FROM sp_items GROUP BY oid HAVING sum(qty) > 9)",
    "SELECT sum(o.total) AS s FROM sp_orders o WHERE o.cust > "
    "(SELECT avg(i.qty) FROM sp_items i WHERE i.oid = o.id)",
    "SELECT sum(total) AS s FROM sp_orders WHERE kind IN (SELECT kind FROM sp_kinds WHERE w > 1)",
    "SELECT avg(q.s) AS a, count(*) AS n FROM "
    "(SELECT oid, sum(qty) AS s FROM sp_items GROUP BY oid) q",
    "SELECT q.d AS day, count(*) AS n FROM (SELECT date_trunc('month', at) AS d FROM sp_orders) q "
    "GROUP BY 1 ORDER BY 1",
    "SELECT sum(x) AS s FROM (SELECT cust AS x FROM sp_orders UNION ALL SELECT n FROM sp_items) q",
    "WITH q AS (SELECT * FROM sp_orders WHERE cust > 3) SELECT kind, count(*) AS n FROM q "
    "GROUP BY 1",
    "WITH q AS (SELECT cust, sum(total) AS t FROM sp_orders GROUP BY cust) "
    "SELECT cust FROM q WHERE t = (SELECT max(t) FROM q)",
    "SELECT count(*) AS n, sum(total) AS s FROM sp_big",
    "SELECT max(total) AS m FROM sp_sums",
    "SELECT k.label, s.n FROM sp_kinds k LEFT JOIN "
    "(SELECT kind, count(*) AS n FROM sp_orders GROUP BY kind) s ON s.kind = k.kind",
    "SELECT count(*) AS n FROM sp_orders UNION ALL SELECT sum(qty) FROM sp_items",
    "SELECT kind FROM sp_orders UNION SELECT kind FROM sp_kinds ORDER BY 1",
    "SELECT cust FROM sp_orders EXCEPT SELECT qty FROM sp_items",
    "SELECT extract(year FROM at) AS y, to_char(at, 'MM') AS m, count(*) AS n FROM sp_orders "
    "GROUP BY 1, 2",
    "SELECT k, count(*) AS n FROM sp_loose GROUP BY k",
    "SELECT code, count(*) AS n FROM sp_padded GROUP BY code",
    "SELECT doc, count(*) AS n FROM sp_orders GROUP BY doc",
]
ROWS = [
    "SELECT id, total FROM sp_orders ORDER BY total DESC NULLS LAST, id LIMIT 7",
    "SELECT id FROM sp_orders ORDER BY kind, at, id OFFSET 5 LIMIT 10",
    'SELECT kind FROM sp_orders ORDER BY kind COLLATE "C" DESC, id LIMIT 10',
    "SELECT total AS c1, id AS c0 FROM sp_orders ORDER BY c0 LIMIT 4",
    "SELECT -id AS id FROM sp_orders ORDER BY sp_orders.id LIMIT 5",
    "SELECT id FROM sp_orders ORDER BY cust + small, abs(id - 200), id LIMIT 5",
    "SELECT id FROM sp_orders ORDER BY id FETCH FIRST 3 ROWS WITH TIES",
    "SELECT DISTINCT kind FROM sp_orders",
    "SELECT DISTINCT kind, flag FROM sp_orders ORDER BY flag, kind DESC LIMIT 5",
    "SELECT DISTINCT ON (kind) kind, id FROM sp_orders ORDER BY kind, total DESC, id",
    "SELECT id, count(*) AS n FROM sp_orders GROUP BY id ORDER BY n, id LIMIT 3",
    "SELECT o.id, sum(i.qty) AS q FROM sp_orders o JOIN sp_items i ON o.id = i.oid GROUP BY o.id "
    "ORDER BY q DESC NULLS LAST, o.id LIMIT 5",
    "SELECT count(*) FROM (SELECT id FROM sp_orders ORDER BY id LIMIT 10) q",
]
COLUMNS = [
    "SELECT id, rank() OVER (PARTITION BY kind ORDER BY total, id) AS r FROM sp_orders",
    "SELECT kind, sum(count(*)) OVER (ORDER BY kind) AS s FROM sp_orders GROUP BY kind",
    "SELECT percentile_cont(0.5) WITHIN GROUP (ORDER BY total) AS p FROM sp_orders",
    "SELECT kind, mode() WITHIN GROUP (ORDER BY cust) AS m FROM sp_orders GROUP BY kind",
    "SELECT kind, string_agg(id::text, ',' ORDER BY id) AS s FROM sp_orders GROUP BY kind",
    "SELECT array_agg(cust ORDER BY id) AS a FROM sp_orders WHERE id < 40",
    "SELECT kind, flag, count(*) AS n FROM sp_orders GROUP BY ROLLUP (kind, flag)",
    "SELECT kind, sum(cust) AS n, grouping(kind) AS g FROM sp_orders "
    "GROUP BY GROUPING SETS ((kind), ())",
    "SELECT jsonb_object_agg(id, total) AS j FROM sp_orders WHERE id < 9",
]
GATHERED = [
    "SELECT k.w, count(o.id) AS n FROM sp_kinds k LEFT JOIN sp_orders o ON o.kind = k.kind "
    "AND o.total > 100 GROUP BY k.w",
    "SELECT count(*) AS n FROM sp_orders o JOIN sp_items i ON i.n = o.cust WHERE o.total > 10",
    "SELECT count(*) AS n FROM sp_orders a FULL JOIN sp_kinds k ON k.kind = a.kind",
    "SELECT count(*) AS n FROM sp_orders WHERE id NOT IN (SELECT n FROM sp_items WHERE n > 3)",
    "SELECT a.v, b.v AS w FROM sp_padded a JOIN sp_padded b ON a.code = b.code WHERE a.v < 3",
    "SELECT count(*) AS n FROM sp_loose a WHERE a.k NOT IN (SELECT k FROM sp_loose WHERE k < 4)",
    "SELECT k.w, (SELECT max(o.total) FROM sp_orders o WHERE o.kind = k.kind) AS m FROM sp_kinds k",
    "SELECT q.total FROM sp_kinds k, LATERAL (SELECT o.total FROM sp_orders o "
    "WHERE o.kind = k.kind ORDER BY o.id LIMIT 2) q",
]
OTHERS = Path(__file__).with_name("split_queries.sql").read_text().splitlines()
UNION = {
    "SELECT * FROM sp_orders": "row-wise",
    "SELECT id, kind FROM sp_big": "row-wise",
    "SELECT o.id, i.n FROM sp_orders o LEFT JOIN sp_items i ON i.oid = o.id": "row-wise",
    "SELECT o.id FROM sp_orders o FULL JOIN sp_items i ON i.oid = o.id": "row-wise",
    "SELECT o.id, (SELECT max(n) FROM sp_items i WHERE i.oid = o.id) AS m FROM sp_orders o": (
        "row-wise"
    ),
    "SELECT id, sum(total) AS s FROM sp_orders GROUP BY id HAVING count(*) > 0": "whole-groups",
    "SELECT code, sum(v) AS s FROM sp_codes GROUP BY 1": "whole-groups",
    "SELECT i.oid, count(*) AS n FROM sp_orders o JOIN sp_items i ON i.oid = o.id GROUP BY 1": (
        "whole-groups"
    ),
    "SELECT k, count(*) AS n FROM sp_loose WHERE k = v GROUP BY 1": "whole-groups",
    "SELECT id FROM sp_orders UNION ALL SELECT n FROM sp_items": "row-wise",
    "SELECT oid, rank() OVER (PARTITION BY oid ORDER BY n, qty) AS r FROM sp_items": "whole-groups",
    "SELECT oid, sum(qty) OVER (PARTITION BY oid) AS s, count(*) FILTER (WHERE n > 9) OVER "
    "(PARTITION BY oid, qty) AS n FROM sp_items": "whole-groups",
    "SELECT oid, s FROM (SELECT oid, n, sum(qty) OVER (PARTITION BY oid) AS s FROM sp_items) q "
    "WHERE n > 9": "whole-groups",
    "SELECT DISTINCT oid, count(*) OVER (PARTITION BY oid) AS n FROM sp_items": "whole-groups",
    "SELECT DISTINCT oid FROM sp_items": "whole-groups",
    "SELECT DISTINCT qty, oid, oid % 3 AS r FROM sp_items WHERE n > 9": "whole-groups",
    "SELECT DISTINCT o.kind, i.oid FROM sp_orders o JOIN sp_items i ON i.oid = o.id": (
        "whole-groups"
    ),
    "SELECT DISTINCT * FROM sp_items": "whole-groups",
    "SELECT DISTINCT code FROM sp_codes": "whole-groups",
    "SELECT DISTINCT k FROM sp_loose WHERE k = v": "whole-groups",
    "SELECT DISTINCT oid, count(*) AS n FROM sp_items GROUP BY oid, qty": "whole-groups",
    "SELECT DISTINCT oid, rank() OVER (PARTITION BY oid ORDER BY qty) AS r FROM sp_items": (
        "whole-groups"
    ),
    "SELECT DISTINCT oid, unnest(ARRAY[n % 2, 1]) AS u FROM sp_items": "whole-groups",
    "SELECT DISTINCT ON (id) id, kind FROM sp_orders": "whole-groups",
    "SELECT q.oid, o.kind FROM (SELECT DISTINCT oid FROM sp_items) q JOIN sp_orders o "
    "ON o.id = q.oid": "row-wise",
    "SELECT q.oid, count(*) AS n FROM (SELECT DISTINCT oid, qty FROM sp_items) q GROUP BY 1": (
        "whole-groups"
    ),
    "SELECT id FROM sp_orders WHERE id IN (SELECT DISTINCT oid FROM sp_items WHERE n > 9)": (
        "row-wise"
    ),
    "SELECT DISTINCT oid FROM sp_items UNION ALL SELECT DISTINCT id FROM sp_orders": "row-wise",
    "WITH q AS (SELECT DISTINCT oid FROM sp_items) SELECT oid FROM q WHERE oid % 2 = 0": "row-wise",
    "SELECT id, (SELECT count(*) FROM (SELECT DISTINCT i.oid, i.qty FROM sp_items i) q "
    "WHERE q.oid = o.id) AS n FROM sp_orders o": "row-wise",
}
DISTINCT = {
    "SELECT DISTINCT k FROM sp_loose": "merge",
    "SELECT DISTINCT k, v FROM sp_loose": "merge",
    "SELECT DISTINCT code FROM sp_padded": "merge",
    "SELECT DISTINCT oid % 5 AS r FROM sp_items": "merge",
    "SELECT DISTINCT oid FROM sp_items ORDER BY oid DESC LIMIT 7": "merge",
    "SELECT DISTINCT oid, qty FROM sp_items ORDER BY oid, qty OFFSET 5": "merge",
    "SELECT DISTINCT ON (oid) oid, n FROM sp_items ORDER BY oid, n DESC": "merge",
    "SELECT DISTINCT ON (kind) kind FROM sp_orders": "merge",
    "SELECT DISTINCT o.id FROM sp_items i LEFT JOIN sp_orders o ON o.id = i.oid": "merge",
    "SELECT DISTINCT oid, qty FROM sp_items GROUP BY oid, qty HAVING count(*) > 1": "union",
    "SELECT DISTINCT oid, sum(count(*)) OVER (PARTITION BY oid) AS n FROM sp_items "
    "GROUP BY oid, qty": "merge",
    "SELECT DISTINCT oid, rank() OVER (ORDER BY oid) AS r FROM sp_items": "merge",
    "SELECT DISTINCT oid, count(*) OVER (PARTITION BY qty) AS n FROM sp_items": "merge",
    "SELECT sum(count(*)) OVER () AS n FROM sp_items": "merge",
    "SELECT sum(qty) OVER (PARTITION BY max(oid)) AS s FROM sp_items GROUP BY qty": "merge",
    "SELECT rank() OVER (ORDER BY max(oid)) AS r FROM sp_items": "merge",
    "SELECT count(*) OVER (PARTITION BY max(oid)) AS n FROM sp_items": "merge",
    "SELECT DISTINCT ON (oid, row_number() OVER (ORDER BY price) % 2) oid FROM sp_items": "merge",
    "SELECT count(*) AS n, sum(oid) AS s FROM (SELECT DISTINCT oid, qty FROM sp_items) q": "merge",
    "SELECT count(*) AS n FROM (SELECT DISTINCT k, v FROM sp_loose) q": "merge",
    "SELECT count(*) AS n FROM (SELECT DISTINCT oid FROM sp_items ORDER BY 1 LIMIT 9) q": "merge",
    "SELECT count(DISTINCT oid) AS n, count(DISTINCT qty) AS q FROM sp_items": "merge",
    "SELECT count(DISTINCT q.oid) AS n FROM (SELECT DISTINCT oid, qty FROM sp_items) q": "merge",
    "SELECT o.kind, count(*) AS n FROM (SELECT DISTINCT oid, qty FROM sp_items) q "
    "JOIN sp_orders o ON o.id = q.oid GROUP BY 1": "merge",
    "SELECT oid, qty, row_number() OVER (PARTITION BY qty ORDER BY oid) AS r "
    "FROM (SELECT DISTINCT oid, qty FROM sp_items) q": "merge",
    "SELECT oid FROM (SELECT DISTINCT oid FROM sp_items) q ORDER BY oid LIMIT 5": "merge",
    "SELECT DISTINCT oid FROM sp_items UNION SELECT DISTINCT id FROM sp_orders": "merge",
}


def same(sql, topology, servers):
    expected = dss.collect(sql, servers.reference)
    found = dss.collect(sql, topology, merge="global")
    assert found.schema.equals(expected.schema)
    rows = [[repr(row) for row in table.to_pylist()] for table in (found, expected)]
    if "ORDER BY" not in sql.rpartition(")")[2]:
        rows = [sorted(one) for one in rows]
    assert rows[0] == rows[1]


def way_of(sql, topology):
    found = dss.explain(sql, topology, merge="global")
    return found.strategy, found.reason


@pytest.mark.parametrize("sql", MERGED)
def test_partial_aggregates(sql, topology, loaded):
    same(sql, topology, loaded)
    strategy, _ = way_of(sql, topology)
    assert strategy == "merge"


@pytest.mark.parametrize("sql", ROWS)
def test_rows_are_ordered_cut_and_made_distinct(sql, topology, loaded):
    same(sql, topology, loaded)
    assert way_of(sql, topology) == ("merge", "rows")


@pytest.mark.parametrize("sql", COLUMNS)
def test_columns_of_rows_that_are_needed_in_one_place(sql, topology, loaded):
    same(sql, topology, loaded)
    assert way_of(sql, topology) == ("merge", "columns")


@pytest.mark.parametrize("sql", GATHERED)
def test_rows_of_several_shards_meet(sql, topology, loaded):
    same(sql, topology, loaded)
    assert way_of(sql, topology) in [("gather", "all-rows"), ("merge", "parts")]


@pytest.mark.parametrize("sql", UNION)
def test_answers_that_are_parts_of_the_answer(sql, topology, loaded):
    same(sql, topology, loaded)
    assert way_of(sql, topology) == ("union", UNION[sql])


@pytest.mark.parametrize("sql", DISTINCT)
def test_distinct_rows_of_one_shard_or_of_several(sql, topology, loaded):
    same(sql, topology, loaded)
    assert way_of(sql, topology)[0] == DISTINCT[sql]


@pytest.mark.parametrize("sql", OTHERS)
def test_whatever_the_way(sql, topology, loaded):
    same(sql, topology, loaded)


@pytest.mark.parametrize("sql", [sql for sql in OTHERS if "sp_orders" in sql][::3])
def test_whatever_the_way_where_the_sharding_function_is_known(sql, topology, loaded):
    names = [shard.name for shard in topology.shards][:-1]  # the last is empty
    how = {"function": "modulo", "shards": names}
    sharded = {**SHARDED, "sp_orders": {"key": "id", **how}, "sp_items": {"key": "oid", **how}}
    dsns = {shard.name: loaded.dsns[shard.name] for shard in topology.shards}
    same(sql, dss.Topology.from_dsns(dsns, sharded=sharded), loaded)


@pytest.mark.parametrize("number", [1, 7])
def test_any_number_of_shards(number, loaded):
    """Of all kinds of queries; beside the two and four shards of the other tests."""
    topology = filled(loaded, number)
    for sql in [*MERGED, *ROWS, *COLUMNS, *GATHERED, *UNION, *DISTINCT, *OTHERS][::2]:
        same(sql, topology, loaded)


def test_what_is_only_looked_up_is_sent_once(topology):
    looked_up = "SELECT w FROM sp_kinds k WHERE NOT EXISTS (SELECT FROM sp_orders o WHERE {})"
    (part,) = dss.explain(looked_up.format("o.cust = k.w"), topology, merge="global").gathered
    assert part["select"] == 'SELECT DISTINCT "o"."cust" FROM public.sp_orders AS "o"'
    # equal numbers may be written in two ways
    (part,) = dss.explain(looked_up.format("o.total = k.w"), topology, merge="global").gathered
    assert "DISTINCT" not in part["select"]
