"""A query that gathers runs as the server has written it down: that must mean what the user wrote.

``pg_get_viewdef`` prints every construct again in its own way; here each is read back, and must
give what the user's own text gives in one database.
"""

from __future__ import annotations

import pytest

import dask_shardsql as dss
from dask_shardsql.engine import pools

SHARDED = {"mr_t": "a", "mr_seen": "id", "mr_cut": "id"}
SCHEMA = """
CREATE SCHEMA mr_ops;
CREATE TYPE mr_complex AS (re float8, im float8);
CREATE DOMAIN mr_text AS text CHECK (value <> 'q');
CREATE TABLE mr_t (a int, b int, c text);
CREATE TABLE mr_seen (
    id int PRIMARY KEY, d date, ts timestamp, who varchar(10), c char(4), n numeric(6,2), j jsonb,
    ar int[], z mr_complex, "Odd %s ""c" int);
CREATE TABLE mr_cut (a int, id int, b int, c text);
ALTER TABLE mr_cut DROP a;
ALTER TABLE mr_cut ADD e int DEFAULT 7;
CREATE TABLE mr_some (k int, v text);
CREATE FUNCTION mr_ops.plus(a int, b int) RETURNS int LANGUAGE sql IMMUTABLE AS 'SELECT a * 10 + b';
CREATE OPERATOR mr_ops.+ (FUNCTION = mr_ops.plus, LEFTARG = int, RIGHTARG = int);
CREATE FUNCTION mr_vari(VARIADIC x int[]) RETURNS int LANGUAGE sql IMMUTABLE
    AS 'SELECT cardinality($1)';
CREATE FUNCTION mr_named(a int, b int DEFAULT 5) RETURNS int LANGUAGE sql IMMUTABLE
    AS 'SELECT a - b';
CREATE FUNCTION mr_two(x int, OUT p int, OUT q int) LANGUAGE sql IMMUTABLE AS 'SELECT x, x + 1';
CREATE FUNCTION mr_sety(x int) RETURNS TABLE (p int, q text) LANGUAGE sql IMMUTABLE
    AS $$ SELECT g, 'g' || g FROM generate_series(1, x) g $$;
"""
# Names of output columns that are also names of input columns come first; ORDER BY, GROUP BY,
# DISTINCT ON and windows take them for one or for the other.
QUERIES = [
    "SELECT -a AS a FROM mr_t t ORDER BY t.a",
    "SELECT -a AS a, b FROM mr_t t ORDER BY t.a LIMIT 3",
    "SELECT b AS a, count(*) FROM mr_t t GROUP BY t.b ORDER BY t.b",
    "SELECT a%2 AS b, count(*) AS n FROM mr_t t GROUP BY t.b, a%2 ORDER BY 1,2",
    "SELECT count(*) AS b FROM mr_t t GROUP BY b ORDER BY 1",
    "SELECT max(b) AS a FROM mr_t t GROUP BY t.a%2 ORDER BY 1",
    "SELECT -b AS b, max(a) FROM mr_t t GROUP BY t.b ORDER BY t.b",
    "SELECT DISTINCT ON (t.b) -b AS b, a FROM mr_t t ORDER BY t.b, a",
    "SELECT DISTINCT ON (t.b) a%2 AS b, a FROM mr_t t ORDER BY t.b, t.a",
    "SELECT DISTINCT ON (t.b) -b AS b, -a AS a FROM mr_t t ORDER BY t.b, t.a",
    "SELECT -a AS a, rank() OVER (ORDER BY t.a) AS r FROM mr_t t ORDER BY r",
    "SELECT -a AS a, row_number() OVER w AS r FROM mr_t t WINDOW w AS (ORDER BY t.a) ORDER BY r",
    "SELECT -a AS a FROM mr_t t ORDER BY t.a + 0",
    "SELECT -a AS a FROM mr_t t ORDER BY abs(t.a)",
    "SELECT q.a FROM (SELECT -a AS a, b FROM mr_t t ORDER BY t.a LIMIT 3) q ORDER BY 1",
    "WITH q AS (SELECT -a AS a FROM mr_t t ORDER BY t.a LIMIT 2) SELECT * FROM q ORDER BY 1",
    "SELECT (SELECT -a AS a FROM mr_t t ORDER BY t.a LIMIT 1) AS z",
    "SELECT -a AS a FROM (SELECT a FROM mr_t t) q ORDER BY q.a LIMIT 3",
    "SELECT a AS b, b AS a FROM mr_t t ORDER BY t.a LIMIT 3",
    "SELECT upper(c) AS c, count(*) FROM mr_t t GROUP BY t.c ORDER BY t.c DESC",
    "SELECT a+b AS c FROM mr_t t ORDER BY t.c, t.a LIMIT 4",
    "SELECT -a AS a FROM mr_t t GROUP BY t.a HAVING t.a > 3 ORDER BY t.a LIMIT 2",
    "SELECT b AS x, -sum(a) AS a FROM mr_t t GROUP BY b ORDER BY sum(t.a), 1",
    "SELECT -sum(a) AS sum FROM mr_t t GROUP BY b ORDER BY sum(a)",
    "SELECT DISTINCT -a AS a FROM mr_t t ORDER BY -t.a LIMIT 3",
    "SELECT DISTINCT -a AS a, a AS z FROM mr_t t ORDER BY t.a LIMIT 3",
    "SELECT -a AS a FROM mr_t t ORDER BY t.a FETCH FIRST 3 ROWS WITH TIES",
    "SELECT b%2 AS b, a FROM mr_t t GROUP BY CUBE(t.b, t.a) ORDER BY t.b NULLS FIRST, t.a"
    " NULLS FIRST",
    "SELECT * FROM mr_cut ORDER BY id",
    "SELECT d::text, to_json(d)::text AS j FROM mr_cut d ORDER BY id",
    "SELECT b, count(*) FROM mr_cut GROUP BY b ORDER BY b",
    "SELECT id OPERATOR(mr_ops.+) 1 AS x FROM mr_seen ORDER BY 1",
    "SELECT mr_vari(id, 2, 3) AS x, mr_vari(VARIADIC ar) AS y, mr_named(b => id, a => 3) "
    "AS z, mr_named(id) AS w FROM mr_seen ORDER BY id",
    "SELECT (mr_two(id)).*, (mr_two(id)).q AS qq FROM mr_seen ORDER BY 1",
    "SELECT f.* FROM mr_seen, LATERAL mr_sety(id % 3) f ORDER BY 1,2",
    "SELECT o.id, f.q FROM mr_seen o LEFT JOIN LATERAL mr_sety(o.id % 3) AS f(p, q) ON "
    "f.p > 1 ORDER BY 1, 2",
    "SELECT x.* FROM mr_seen, jsonb_to_record(j) AS x(s text, a jsonb) ORDER BY id",
    """SELECT x.* FROM mr_seen, ROWS FROM (jsonb_to_recordset('[{"p":1},{"p":2}]') AS (p """
    "int), generate_series(1,3)) WITH ORDINALITY AS x(p, g, o) ORDER BY id, o",
    "SELECT j['a']['b'][0] AS x, ar[2:] AS y, ar[:1]::text AS z, (ARRAY[ar, "
    "ar])[1:1][2:2]::text AS w FROM mr_seen ORDER BY id",
    "SELECT (z).re + (z).im AS x, z::text AS y, ROW(id, who)::text AS w, (ROW(1, id)).f2 "
    "AS f FROM mr_seen ORDER BY id",
    "SELECT count(*) AS n FROM mr_seen WHERE ROW(id, who) >= ROW(3, 'w1') AND (id, n) IN "
    "((3, 3.75), (4, 5.00))",
    "SELECT sum(n) OVER (ORDER BY d RANGE BETWEEN interval '1 day' PRECEDING AND interval"
    " '2 days' FOLLOWING EXCLUDE CURRENT ROW) AS x FROM mr_seen ORDER BY id",
    "SELECT sum(id) OVER (w ROWS 1 PRECEDING) AS a, sum(id) OVER (PARTITION BY who ORDER "
    "BY c GROUPS BETWEEN 1 PRECEDING AND UNBOUNDED FOLLOWING) AS b, first_value(id) OVER "
    "w AS f FROM mr_seen WINDOW w AS (PARTITION BY who ORDER BY id DESC) ORDER BY id",
    "SELECT count(*) FILTER (WHERE id > 3) OVER (PARTITION BY who) AS a FROM mr_seen ORDER BY id",
    "SELECT array_agg(DISTINCT who ORDER BY who DESC) AS a, json_object_agg(id, who ORDER"
    " BY id)::text AS b FROM mr_seen",
    "SELECT CASE who WHEN 'w1' THEN 1 WHEN 'w2' THEN 2.5 END AS x, CASE WHEN c = 'c1' "
    "THEN 'a' ELSE who END AS y, CASE c WHEN 'c1  ' THEN 1 ELSE 0 END AS z FROM mr_seen "
    "ORDER BY id",
    "SELECT who::varchar(1) AS a, c::varchar AS b, c || '!' AS d, n::numeric(4,1) AS e, "
    "ts::timestamp(0) AS f, interval '1.5 days' day AS g, 'abcdef'::char(3)::text AS h, "
    "id::bit(3) & b'101' AS i, n::int AS k, 1.5::int AS l, 2.5::float8::int AS m FROM "
    "mr_seen ORDER BY id",
    "SELECT 'x'::mr_text || who AS a, who::mr_text AS b FROM mr_seen ORDER BY id",
    "SELECT id FROM mr_seen WHERE who LIKE ANY (ARRAY['w1%','w2']) AND c NOT LIKE ALL "
    "('{c3%,d}') AND id <> ALL (SELECT k FROM mr_some r) AND id NOT BETWEEN SYMMETRIC 9 "
    "AND 7 ORDER BY id",
    "SELECT id FROM mr_seen WHERE (who, c) IS DISTINCT FROM ('w1', 'c1') AND (n > 3) IS "
    """NOT UNKNOWN AND j @> '{"s":"1"}' AND j ? 's' AND j ?| ARRAY['s','t'] ORDER BY id""",
    "SELECT * FROM mr_seen NATURAL JOIN mr_cut ORDER BY id",
    "SELECT * FROM mr_seen o FULL JOIN mr_cut USING (id, c) ORDER BY 1, 2",
    "SELECT a.id, b.id AS bid, c.id AS cid FROM mr_seen a JOIN (mr_seen b CROSS JOIN "
    "mr_cut c) ON a.id = b.id AND b.id = c.id + 1 ORDER BY 1",
    "SELECT x FROM (SELECT id, id AS x FROM mr_seen) o(y, x) ORDER BY 1",
    "WITH q(x, y) AS NOT MATERIALIZED (SELECT id, who FROM mr_seen) SELECT y, sum(x) FROM"
    " q GROUP BY y ORDER BY y",
    "WITH q AS (SELECT id FROM mr_seen), q2 AS (SELECT id FROM q WHERE id > (SELECT "
    "avg(id) FROM q)) SELECT * FROM q2 ORDER BY 1",
    "SELECT id FROM mr_seen UNION ALL SELECT NULL UNION SELECT '3' ORDER BY 1 NULLS FIRST LIMIT 4",
    "SELECT 'a' AS x, id FROM mr_seen UNION SELECT NULL, 5 ORDER BY 2, 1",
    "SELECT n FROM mr_seen UNION SELECT 1.255 ORDER BY 1",
    "SELECT count(*) AS x FROM mr_seen HAVING count(*) > 3",
    "SELECT count(*) AS x FROM mr_seen GROUP BY ()",
    "SELECT 1 AS x FROM mr_seen GROUP BY GROUPING SETS ((), ())",
    "SELECT who, c, count(*) FROM mr_seen GROUP BY DISTINCT ROLLUP (who, c), ROLLUP (who)"
    " ORDER BY 1,2,3",
    "SELECT id, who, n FROM mr_seen GROUP BY id ORDER BY id",
    "SELECT o.id, o.n, count(r.k) FROM mr_seen o LEFT JOIN mr_some r ON r.k = o.id GROUP "
    "BY o.id ORDER BY 1",
    "SELECT extract(epoch FROM ts) AS a, ts AT TIME ZONE 'Asia/Tokyo' AS b, date_bin('1 "
    "day', ts, 'epoch') AS c, age(ts, '2023-01-01')::text AS d, ts - d AS e, d + id AS f,"
    " d - date '2024-01-01' AS g, ts + '1 mon' AS h FROM mr_seen ORDER BY id",
    r"SELECT to_char(n, 'FM990.00') AS a, format('%s-%I-%L', who, c, id) AS b, 'it''s \n %"
    r" %%' AS e, E'tab\t' AS f, regexp_replace(who, '(\d)', '<\1>') AS g, who ~ '^w[12]$' "
    "AS h FROM mr_seen ORDER BY id",
    "SELECT JSON_ARRAY(id, who RETURNING jsonb) AS a, JSON_OBJECT('k': id ABSENT ON "
    "NULL)::text AS b, JSON_QUERY(j, '$.a.b[*]' WITH WRAPPER)::text AS d, JSON_VALUE(j, "
    "'$.s' RETURNING int DEFAULT 9 ON EMPTY) AS e, j IS JSON OBJECT AS f FROM mr_seen "
    "ORDER BY id",
    "SELECT t.* FROM mr_seen, JSON_TABLE(j, '$.a.b[*]' COLUMNS (o FOR ORDINALITY, v text "
    "PATH '$')) AS t ORDER BY mr_seen.id, t.o",
    "SELECT JSON_ARRAYAGG(id ORDER BY id DESC)::text AS a, JSON_OBJECTAGG(id: who "
    "RETURNING text) IS NOT NULL AS b, JSON_ARRAY(SELECT who FROM mr_seen ORDER BY id "
    "LIMIT 2)::text AS d FROM mr_seen",
    """SELECT x.* FROM mr_seen, XMLTABLE('/a/b' PASSING xmlparse(document '<a><b c="1">' ||"""
    " id || '</b></a>') COLUMNS v int PATH '.', c int PATH '@c') x ORDER BY 1",
    "SELECT random(1,1) AS a, any_value(1) AS b, max(ts) AT LOCAL AS c FROM mr_seen",
    "SELECT overlay(who PLACING 'X' FROM 1), normalize(who, NFC) AS b, who IS NORMALIZED "
    """AS c, ltrim(who, 'w') AS d, substring(who SIMILAR 'w#"_#"' ESCAPE '#') AS e, (d, ts)"""
    " OVERLAPS (date '2024-01-01', interval '3 days') AS f FROM mr_seen ORDER BY id",
    "SELECT unnest(ar) AS a, generate_series(1, 2) AS g, id FROM mr_seen ORDER BY id, 1, 2",
    "SELECT DISTINCT unnest(ar) AS a FROM mr_seen ORDER BY a DESC LIMIT 3",
    "SELECT (SELECT o2.who FROM mr_seen o2 WHERE o2.id = o.id + 1) AS a, ARRAY(SELECT id "
    "FROM mr_seen WHERE who = o.who ORDER BY id) AS b, EXISTS (TABLE mr_some) AS c FROM "
    "mr_seen o ORDER BY id",
    "TABLE mr_seen ORDER BY id LIMIT 3",
    "SELECT * FROM (VALUES (1, 'x'), (2, NULL)) v(id, s) LEFT JOIN mr_seen USING (id) ORDER BY 1",
    """SELECT max(id) FILTER (WHERE who = 'w1') AS "a.b", count(*) AS "c d" FROM mr_seen""",
    'SELECT sum("Odd %s ""c") AS "Sum %", max(id) AS "select" FROM mr_seen',
]


@pytest.fixture(scope="module")
def two(servers):
    """Two shards, with rows."""
    servers.execute(SCHEMA)
    servers.load("mr_t", [(i, i % 3, f"x{i * 7 % 5}") for i in range(20)], shard_of=of_two)
    rows = [
        (
            i,
            f"2024-01-{i + 1:02}",
            f"2024-01-{i + 1:02} 0{i % 10}:00",
            f"w{i % 3}",
            f"c{i % 4}",
            i * 1.25,
            f'{{"a": {{"b": [{i}, "x"]}}, "s": "{i % 3}"}}',
            f"{{{i},{i + 1},9}}",
            f"({i},{i % 2})",
            i % 5,
        )
        for i in range(14)
    ]
    servers.load("mr_seen", rows, shard_of=of_two)
    servers.load("mr_cut", [(i, i % 3, f"%s{i}", 7) for i in range(6)], shard_of=of_two)
    servers.load("mr_some", [(i, f"v{i}") for i in range(4)])
    yield dss.Topology.from_dsns({n: servers.dsns[n] for n in ("s1", "s2")}, sharded=SHARDED)
    pools.close_all()
    servers.execute(
        "DROP SCHEMA mr_ops CASCADE; DROP TABLE mr_t, mr_seen, mr_cut, mr_some; "
        "DROP TYPE mr_complex, mr_text; DROP FUNCTION mr_vari, mr_named, mr_two, mr_sety"
    )


def of_two(row):
    return row[0] % 2


@pytest.mark.parametrize("sql", QUERIES)
def test_it_means_the_same_when_it_is_read_again(sql, two, servers):
    try:
        expected = dss.collect(sql, servers.reference)
    except dss.QueryError as error:
        if error.sqlstate not in ("0A000", "42601"):
            raise
        pytest.skip(f"this PostgreSQL has it not: {error.args[0]}")
    found = dss.collect(sql, two, merge="global")
    assert dss.explain(sql, two, merge="global").strategy in ("gather", "merge")
    assert found.schema.equals(expected.schema)
    rows = [[repr(row) for row in table.to_pylist()] for table in (found, expected)]
    if "ORDER BY" not in sql:
        rows = [sorted(one) for one in rows]
    assert rows[0] == rows[1]
