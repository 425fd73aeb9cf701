"""Long lists of values with merge="global": each is one node, which is written back whole."""

from __future__ import annotations

import zlib

import pytest
from one_database import rows_of
from sqlglot import exp

import dask_shardsql as dss
from dask_shardsql.sharding import ShardByCallable
from dask_shardsql.sql.canonical import parse, written
from dask_shardsql.sql.lists import constants_in
from dask_shardsql.sql.route import possible_shards
from dask_shardsql.sql.semantics import why_not_a_union

SCHEMA = """
CREATE SCHEMA "Li, st";
CREATE TYPE "Li, st"."Mo::od ]" AS ENUM ('sad', 'o''k, [x]', 'Sad');
CREATE TABLE li_o (id int8 NOT NULL, cust int4, kind text, code varchar(40), n numeric(9,2),
    f float8, day date, at timestamptz, flag bool, mood "Li, st"."Mo::od ]");
CREATE TABLE li_c (code varchar(40) NOT NULL, v int4);
CREATE VIEW li_v AS SELECT id, kind FROM li_o WHERE cust IN (%s);
"""
SHARDED = {
    "li_o": {"key": "id", "function": "modulo"},
    "li_c": {"key": "code", "function": lambda code: f"s{len(code) % 3 + 1}"},
}
ODD = [
    *("it's", "''", "a, b", "[x]", "]", "), (", "'::text, ", "back\\slash", "E'\\''", "$$", "$1"),
    *("%s", "%(x)s", "new\nline", "ARRAY[1, 2]", '"', "-- no", "/* no", "äß€🙂", "", " ", "A", "a"),
    *("{}", "{0}", "\x01", "NULL", "::", "\\0", "0", ";"),
]


@pytest.fixture(scope="module")
def loaded(servers):
    servers.execute(SCHEMA % numbers(range(5, 60)))
    rows = [
        (
            i,
            i % 50 if i % 9 else None,
            ODD[i % len(ODD)],
            ODD[i % 11],
            i / 4,
            i / 8,
            f"2024-02-{i % 28 + 1:02}",
            f"2024-02-{i % 28 + 1:02} 05:00:00+00",
            (True, False, None)[i % 3],
            ("sad", "o'k, [x]", "Sad")[i % 3],
        )
        for i in range(300)
    ]
    servers.load("li_o", rows, shard_of=lambda row: row[0] % 3)
    codes = [(text, i) for i, text in enumerate(ODD * 3)]
    servers.load("li_c", codes, shard_of=lambda row: len(row[0]) % 3)
    yield servers
    servers.execute('DROP VIEW li_v; DROP TABLE li_o, li_c; DROP SCHEMA "Li, st" CASCADE')


@pytest.fixture(scope="module")
def topology(loaded):
    dsns = {name: loaded.dsns[name] for name in ("s1", "s2", "s3")}
    return dss.Topology.from_dsns(dsns, sharded=SHARDED)


def literal(text):
    return "'" + text.replace("'", "''") + "'"


def numbers(values):
    return ", ".join(map(str, values))


def texts(values):
    return ", ".join(map(literal, values))


DAYS = ", ".join(f"'2024-02-{day:02}'" for day in range(1, 20))
MANY = numbers(range(10, 40))
COLOURED = (
    f"SELECT kind IN ({texts(['a', *ODD[:17]])}) AS x, kind IN ({texts(['A', *ODD[:17]])}) AS y, "
    "count(*) AS n FROM li_o GROUP BY 1, 2"
)
ROWS = ", ".join(f"({i}, {literal(text)})" for i, text in enumerate(ODD))

MERGED = [
    f"SELECT count(*) AS n FROM li_o WHERE cust IN ({MANY})",
    f"SELECT count(*) AS n FROM li_o WHERE cust NOT IN ({MANY})",
    f"SELECT count(*) AS n FROM li_o WHERE cust NOT IN ({MANY}, NULL)",
    f"SELECT count(*) AS n FROM li_o WHERE kind IN ({texts(ODD[::2])})",
    f"SELECT count(*) AS n FROM li_o WHERE code IN ({texts(ODD[:9] + ODD[11:])})",
    f"SELECT count(*) AS n FROM li_o WHERE code NOT IN ({texts(ODD[3:])})",
    f"SELECT count(*) AS n FROM li_o WHERE n IN ({MANY}, -1, 1.5, 1e3, 'NaN')",
    f"SELECT count(*) AS n FROM li_o WHERE f IN ({MANY}, -1, 1.5, 1e300)",
    f"SELECT count(*) AS n FROM li_o WHERE day IN ({DAYS})",
    f"SELECT count(*) AS n FROM li_o WHERE at IN ({DAYS}, timestamp(3) '2024-02-21 05:00')",
    f"SELECT count(*) AS n FROM li_o WHERE flag IN ({', '.join(['true', 'NULL'] * 10)})",
    "SELECT count(*) AS n FROM li_o WHERE mood IN (" + texts(["o'k, [x]", "sad"] * 10) + ")",
    f"SELECT cust % 3 AS g, sum(n) FILTER (WHERE kind IN ({texts(ODD[:20])})) AS s, count(*) AS c "
    "FROM li_o GROUP BY 1",
    f"SELECT sum(CASE WHEN kind IN ({texts(ODD[5:])}) THEN n ELSE 0 END) AS s FROM li_o",
    f"SELECT id FROM li_o WHERE kind = ANY (ARRAY[{texts(ODD[:18])}]) ORDER BY n DESC, id LIMIT 9",
    f"SELECT count(*) AS n FROM li_o WHERE cust IN (VALUES ({MANY.replace(', ', '), (')}))",
    f"SELECT count(*) AS n FROM li_o WHERE id IN (VALUES ({MANY.replace(', ', '), (')}))",
    f"SELECT v.b, count(*) AS n FROM li_o JOIN (VALUES {ROWS}) v(a, b) ON kind = v.b GROUP BY 1",
    f"SELECT count(*) AS n FROM li_o WHERE kind IN (SELECT b FROM (VALUES {ROWS}) v(a, b))",
    f"SELECT count(*) AS n FROM li_v WHERE kind IN ({texts(ODD[4:])})",
    f"WITH q AS (SELECT cust FROM li_o WHERE kind IN ({texts(ODD[4:])})) "
    f"SELECT a.cust, count(*) AS n FROM q a JOIN q b USING (cust) WHERE a.cust IN ({MANY}) "
    "GROUP BY 1",
    f"SELECT count(*) AS n FROM li_o a JOIN li_o b ON a.cust = b.id WHERE a.kind IN "
    f"({texts(ODD[:18])}) AND b.kind NOT IN ({texts(ODD[9:])})",
    COLOURED,
    # what looks like a list, or stands beside one
    f"SELECT count(*) AS n FROM li_o WHERE kind = 'ARRAY[{MANY}]' OR cust IN ({MANY})",
    f'SELECT min(kind) AS "it\'s ARRAY[{MANY[:20]}]", max(cust) AS x FROM li_o '
    f"WHERE cust IN ({MANY})",
    # of which not all is constant
    f"SELECT count(*) AS n FROM li_o WHERE cust IN ({MANY}, id - 40)",
    f"SELECT count(*) AS n FROM li_o WHERE cust IN ({MANY}, 40 + 1)",
    f"SELECT count(*) AS n FROM li_o WHERE kind IN ({texts(ODD[:20])}, code)",
    f"SELECT count(*) AS n FROM li_o, LATERAL (VALUES {ROWS}, (cust, code)) v(a, b) WHERE b = kind",
]


@pytest.mark.parametrize("sql", MERGED)
def test_the_answer_is_one_databases(sql, topology, loaded):
    found = dss.collect(sql, topology, merge="global")
    expected = dss.collect(sql, loaded.reference)
    assert found.schema.equals(expected.schema)
    assert rows_of(sql, found) == rows_of(sql, expected)
    assert any(rows_of(sql, found))
    how = dss.explain(sql, topology, merge="global")
    assert how.strategy == ("gather" if "li_o b" in sql or "LATERAL" in sql else "merge")


@pytest.mark.parametrize(
    ("condition", "shards"),
    [
        (f"id IN ({numbers(range(0, 9000, 3))})", {"s1"}),
        (f"id IN ({numbers(range(-8999, 9000, 3))}, NULL)", {"s2"}),
        (f"id IN ({numbers(i for i in range(9000) if i % 3)})", {"s2", "s3"}),
        (f"id IN ({numbers(range(9000))}) AND id = 4", {"s2"}),
        (f"id IN ({numbers(range(0, 9000, 3))}, 1.5)", {"s1", "s2", "s3"}),
        (f"id NOT IN ({numbers(range(0, 9000, 3))})", {"s1", "s2", "s3"}),
        (f"id = ANY ('{{{','.join(map(str, range(0, 9000, 3)))}}}')", {"s1"}),
        (f"id = ANY (ARRAY[{numbers(range(0, 9000, 3))}])", {"s1"}),
    ],
)
def test_values_of_the_shard_key_say_where_to_look(condition, shards, topology, loaded):
    sql = f"SELECT count(*) AS n FROM li_o WHERE {condition}"
    assert set(dss.explain(sql, topology, merge="global").visited) == shards
    found = dss.collect(sql, topology, merge="global")
    assert found == dss.collect(sql, loaded.reference)


@pytest.mark.parametrize("rest", [0, 1, 2])
def test_texts_of_the_shard_key_say_where_to_look(rest, topology, loaded):
    known = [text for text in ODD if len(text) % 3 == rest and "\\" not in text]
    values = [*known, *("x" * (rest + 3 * i) for i in range(1, 30))]
    sql = f"SELECT v, code FROM li_c WHERE code IN ({texts(values)})"
    assert set(dss.explain(sql, topology, merge="global").visited) == {f"s{rest + 1}"}
    expected = dss.collect(sql, loaded.reference)
    assert expected.num_rows == 3 * len(known)
    assert rows_of(sql, dss.collect(sql, topology, merge="global")) == rows_of(sql, expected)


def test_a_list_of_many_long_texts_is_split_too(topology, loaded):
    values = [f"{text}{i}" for i, text in enumerate([*ODD, "x" * 999] * 300)] + ["it's"]
    sql = f"SELECT count(*) AS n FROM li_o WHERE kind IN ({texts(values)})"
    assert len(sql) > 1 << 18
    found = dss.explain(sql, topology, merge="global")
    assert (found.strategy, found.reason) == ("merge", "aggregates")
    one = dss.collect(sql, loaded.reference)
    assert dss.collect(sql, topology, merge="global") == one


def test_a_long_list_is_one_node_and_written_as_it_was():
    values = ", ".join(f"({n})::bigint" for n in range(20)) + ", ('-2'::integer)::bigint"
    text = f"SELECT 1 AS x FROM t WHERE (id = ANY (ARRAY[{values}]))"
    tree = parse(text)
    (array,) = tree.find_all(exp.Array)
    (node,) = array.expressions
    assert f"ARRAY[{values}]" in written(tree)
    assert f"ARRAY[{values}]" in written(parse(written(tree)))
    found = [(one, [to.sql("postgres") for to in types]) for one, types in constants_in(node)]
    assert found[3] == ("3", ["BIGINT"])
    assert found[-1] == ("'-2'", ["INT", "BIGINT"])


@pytest.mark.parametrize(
    "element",
    [
        *("x", "now()", "(1 + 1)", "(x)::bigint", "'a'::text || y", '"NULL"', "ARRAY[1]", "(+ 3)"),
        *("('a'::text COLLATE \"C\")", "(('1'::integer = x))", "('t'::boolean AND x)", "f('a')"),
    ],
)
@pytest.mark.parametrize("place", [0, 9, 30])
def test_a_list_with_another_element_stays_as_it_is(element, place):
    values = [str(n) for n in range(30)]
    values.insert(place, element)
    (array, *_) = parse(f"SELECT (y = ANY (ARRAY[{', '.join(values)}])) AS x").find_all(exp.Array)
    assert len(array.expressions) == 31


CONSTANTS = [
    *("7", "'7'::integer", "(7)::bigint", "('-7'::integer)::bigint", "'99999999999'::bigint"),
    *("'99999999999'::integer", "NULL::bigint", "(NULL::integer)::bigint", "(7)::numeric", "7.50"),
    *("'-7.5'::numeric", "'NaN'::numeric", "((7)::smallint)::integer", "('7'::text)::integer"),
    *(
        "'it''s'::text",
        "('a'::character varying)::text",
        "'a'::character varying(1)",
        "'a\\b'::text",
    ),
    *("true", "'a'::bpchar", "'2024-02-29'::date", "('2024-02-29'::date)::timestamp"),
    *("'2024-02-29 05:00:00'::timestamp without time zone", '\'a\'::"x::y"."z, ]"', "''::text"),
    "'2024-02-29 05:00:00+00'::timestamp with time zone",
    "'a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11'::uuid",
]
KEYS = ["bigint", "numeric", "text", "date", "timestamp without time zone", "uuid"]


SHARDS = [f"s{n}" for n in range(1000)]


@pytest.mark.parametrize("key_type", KEYS)
@pytest.mark.parametrize("array", ["ARRAY[%s]", "(ARRAY[%s])::text[]", "(ARRAY[%s])::numeric[]"])
def test_constants_have_the_same_values_in_long_lists(array, key_type):
    function = ShardByCallable(lambda key: SHARDS[zlib.crc32(repr(key).encode()) % 1000])

    def shards_of(elements):
        tree = parse(f"SELECT 1 AS x WHERE (k = ANY ({array % ', '.join(elements)}))")
        condition, is_key = tree.args["where"].this, exp.column("k").__eq__
        return possible_shards(condition, is_key, function, SHARDS, key_type)

    found = {constant: shards_of([constant]) for constant in CONSTANTS}
    assert min(map(len, found.values())) <= 1
    for constant, of_one in found.items():
        assert shards_of([constant] * 20) == of_one, constant


@pytest.mark.parametrize("constant", CONSTANTS)
def test_every_kind_of_constant_is_found(constant):
    (array,) = parse(f"SELECT ARRAY[{', '.join([constant] * 20)}] AS x").find_all(exp.Array)
    assert len(array.expressions) == 1
    rows = ", ".join([f"({constant},{constant})"] * 20)
    tree = parse(f"SELECT v.a FROM ( VALUES {rows}) v(a, b)")
    assert written(tree) == f"SELECT v.a FROM (VALUES {rows}) AS v(a, b)"
    (row,) = tree.find(exp.Values).expressions
    assert len(row.expressions) == 1


def test_lists_are_not_looked_for_in_strings_and_names():
    values = numbers(range(30))
    for quote in "'\"":
        text = f"SELECT {quote}it, ARRAY[{values}]{quote} AS a, ' ARRAY[' AS b, t.c AS d FROM t"
        assert written(parse(text)) == written(parse(text, is_canonical=False)) == text


def test_lists_are_not_looked_for_in_what_users_write():
    sql = f"SELECT count(*) FROM li_o /* it's */ WHERE kind IN ('ARRAY[{numbers(range(30))}]')"
    assert why_not_a_union(sql, (("li_o", "id"),)) == "it aggregates the rows of each shard alone"
