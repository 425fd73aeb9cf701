"""Every type of PostgreSQL: what arrives is what the server holds, or an error that says so."""

from __future__ import annotations

import datetime as dt
import decimal
import math
import struct
import uuid

import psycopg2.errors
import pyarrow as pa
import pytest
import values
from conftest import first_shards
from hypothesis import given, seed, settings
from hypothesis import strategies as st

import dask_shardsql as dss
from dask_shardsql.config import Settings
from dask_shardsql.engine.text_values import decode_text
from dask_shardsql.query import ask, describe
from dask_shardsql.sql.types import Column

SCALARS = values.scalar_kinds()
KINDS = [*SCALARS, *values.array_kinds(SCALARS)]

# Input for the base types of pg_type that are not among KINDS, or why there is none.
ONE_VALUE = {
    "aclitem": "postgres=r/postgres",
    "box": "(1,2),(3,4)",
    "cid": "7",
    "circle": "<(1,2),3>",
    "gtsvector": None,  # its input function refuses everything
    "jsonpath": "$.a[*]",
    "line": "{1,2,3}",
    "lseg": "[(1,2),(3,4)]",
    "macaddr8": "08:00:2b:01:02:03:04:05",
    "path": "[(0,0),(1,1)]",
    "pg_brin_bloom_summary": None,
    "pg_brin_minmax_multi_summary": None,
    "pg_dependencies": None,
    "pg_lsn": "16/B374D848",
    "pg_mcv_list": None,
    "pg_ndistinct": None,
    "pg_node_tree": None,
    "pg_snapshot": "10:20:10,14,15",
    "refcursor": "a cursor",
    "regclass": "pg_type",
    "regcollation": '"C"',
    "regconfig": "simple",
    "regdictionary": "simple",
    "regnamespace": "pg_catalog",
    "regoper": "||/",
    "regoperator": "+(integer,integer)",
    "regproc": "now",
    "regprocedure": "abs(integer)",
    "regrole": "postgres",
    "regtype": "timestamp with time zone",
    "tid": "(0,1)",
    "tsquery": "'a' & 'b'",
    "txid_snapshot": "10:20:10,14,15",
    "xid": "42",
    "xid8": "42",
    "int8range": "[1,9)",
    "tsrange": "[2020-01-01,)",
    "int8multirange": "{[1,2)}",
    "nummultirange": "{[1,2)}",
    "datemultirange": "{[2020-01-01,2020-01-03)}",
    "tsmultirange": "{[2020-01-01,)}",
    "tstzmultirange": "{[2020-01-01,)}",
}
_OF_KINDS = {"bit": "bit(5)", "char": '"char"', "bpchar": "char(5)", "varchar": "varchar(5)"}


@pytest.fixture(scope="module")
def one(servers):
    return first_shards(servers, 1)


@pytest.fixture(scope="module")
def cursor(servers):
    """On the one shard that `one` reads, with the settings that the library pins."""
    connection = values.open_reference(servers, "s1")
    yield connection.cursor()
    connection.close()


@pytest.fixture
def shard_cursors(servers):
    """Cursors on s1 and s2."""
    connections = [values.open_reference(servers, name) for name in ("s1", "s2")]
    yield [connection.cursor() for connection in connections]
    for connection in connections:
        connection.close()


def column(sql, topology, **options):
    table = dss.collect(sql, topology, **options)
    table.validate(full=True)
    return table.column(0)


def as_one_value(topology, value, **options):
    return values.arrow_values(column(f"SELECT {value} AS v", topology, **options))[0]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.sql)
def test_values_are_the_servers_own(kind, one, cursor, table_name):
    if kind.sql == "xml" and not has_xml(cursor):
        pytest.skip("this PostgreSQL is built without libxml")
    examples = [None, *kind.extreme, *typical(kind)]
    cursor.execute(f"CREATE TABLE {table_name} (n int4, v {kind.sql})")
    for number, value in enumerate(examples):
        cursor.execute(f"INSERT INTO {table_name} VALUES (%s, %s)", (number, value))
    cursor.execute(f"SELECT {kind.reference('v')} FROM {table_name} ORDER BY n")
    expected = [kind.settle(text) for (text,) in cursor.fetchall()]
    assert len(set(expected)) > 2
    found = column(f"SELECT v FROM {table_name} ORDER BY n", one)
    assert found.type == kind.arrow
    assert [kind.canon(value) for value in values.arrow_values(found)] == expected


def has_xml(cursor):
    try:
        cursor.execute("SELECT '<a/>'::xml")
    except psycopg2.errors.FeatureNotSupported:
        return False
    return True


def typical(kind):
    """Return some of the values that hypothesis finds for `kind`, the same in every run."""
    found = []

    @settings(max_examples=25, database=None, deadline=None)
    @seed(0)
    @given(kind.plain)
    def take(value):
        found.append(value)

    take()
    return list(dict.fromkeys(found))


def test_every_built_in_type_is_described_and_read(one, cursor):
    """Walks pg_type, so that a type of a newer PostgreSQL cannot be forgotten."""
    cursor.execute(
        "SELECT t.typname, t.typarray <> 0 FROM pg_type t JOIN pg_namespace n "
        "ON n.oid = t.typnamespace WHERE n.nspname = 'pg_catalog' AND t.typtype IN ('b','r','m') "
        "AND t.typcategory <> 'A' ORDER BY 1"
    )
    examples = {kind.sql: (kind.extreme or (typical(kind)[-1],))[-1] for kind in SCALARS}
    examples |= {name: examples[sql] for name, sql in _OF_KINDS.items()}
    examples |= {"numeric": "1.5"} | ONE_VALUE
    unknown = []
    for name, has_array in cursor.fetchall():
        quoted = f'pg_catalog."{name}"'
        assert column(f"SELECT NULL::{quoted}", one).to_pylist() == [None]
        if name not in examples:
            unknown.append(name)
            continue
        value = examples[name]
        if value is None or (name == "xml" and not has_xml(cursor)):
            continue
        typmod = "(5)" if name == "bit" else ""
        cursor.execute(f"SELECT format('%%s', %s::{quoted}{typmod})", (value,))
        ((shown,),) = cursor.fetchall()
        found = column(f"SELECT %s::{quoted}{typmod}", one, params=[value])
        if pa.types.is_string(found.type):
            assert found.to_pylist() == [shown], name
        elif name not in ("float4", "float8", "date", "timestamp", "timestamptz"):
            assert found.null_count == 0
        if has_array:
            cursor.execute(f"SELECT ARRAY[%s::{quoted}, NULL]::text", (value,))
            ((shown,),) = cursor.fetchall()
            found = column(f"SELECT ARRAY[%s::{quoted}, NULL]", one, params=[value])
            if pa.types.is_string(found.type):
                assert found.to_pylist() == [shown]
            else:
                (items,) = values.arrow_values(found)
                assert len(items) == 2
                assert items[0] is not None
                assert items[1] is None
    assert unknown == [], "types without an example value"


def test_psycopg2s_own_values(one, cursor):
    """For the types where psycopg2's Python value and Arrow's are of one kind."""
    sql = """
        SELECT true AS a, 7::int2 AS b, -8::int4 AS c, 9007199254740993 AS d, 4294967295::oid AS e,
          0.1::float4 AS f, 0.1::float8 AS g, 12.50::numeric(10,2) AS h,
          1234567890123456789012345678901234567.8::numeric(38,1) AS i, DATE '2024-02-29' AS j,
          TIME '23:59:59.999999' AS k, TIMESTAMP '1500-01-01 01:02:03.000004' AS l,
          TIMESTAMPTZ '2024-06-01 12:00:00.5+02' AS m, 'é𝄞'::text AS n, 'ab'::char(5) AS o,
          ARRAY[1,NULL,3] AS p, ARRAY['x','',NULL,'NULL','a,b','{','"','\\'] AS q,
          ARRAY[1.50,NULL]::numeric[] AS r, ARRAY[DATE '2024-02-29'] AS s, '{}'::text[] AS t
    """
    cursor.execute(sql)
    (expected,) = cursor.fetchall()
    (found,) = dss.collect(sql, one).to_pylist()
    found["f"] = struct.unpack("f", struct.pack("f", found["f"]))[0]
    expected = dict(zip("abcdefghijklmnopqrst", expected, strict=True))
    expected["f"] = struct.unpack("f", struct.pack("f", expected["f"]))[0]
    assert found == expected


@pytest.mark.parametrize(
    ("value", "sql_type"),
    [
        *[(v, t) for v in ("infinity", "-infinity") for t in ("date", "timestamp", "timestamptz")],
        *[("294247-01-10 04:00:54.775808", t) for t in ("timestamp", "timestamptz")],
        *[("294276-12-31 23:59:59.999999", t) for t in ("timestamp", "timestamptz")],
        ("24:00:00", "time"),
        *[(v, "numeric") for v in ("NaN", "1e38", "-1e38", "1e-39", "1e1000")],
        *[(v, "numeric") for v in ("1e48", "-1e48", "1e69", "-1e69", "1e300")],
        *[(v, "numeric") for v in ("Infinity", "-Infinity")],
        *[("NaN", t) for t in ("numeric(10,2)", "numeric(50,2)")],
        *[("2562047:47:16.854776", "interval"), ("-2562047788:00:54.775807", "interval")],
        ("{{1,2},{3,4}}", "int4[]"),
        ("{{a},{NULL}}", "text[]"),
        ("[0:0][1:2]={{1,2}}", "int4[]"),
        *[("{NaN}", "numeric[]"), ("{2020-01-01,infinity}", "date[]"), ("{24:00}", "time[]")],
    ],
)
def test_what_arrow_cannot_hold_is_an_error_that_names_it_or_null(value, sql_type, servers, cursor):
    topology = first_shards(servers, 2)
    cursor.execute(f"SELECT ('{value}'::{sql_type})::text")
    ((shown,),) = cursor.fetchall()
    sql = f"SELECT 1 AS n, '{value}'::{sql_type} AS amount"
    with pytest.raises(dss.UnrepresentableValueError) as caught:
        dss.collect(sql, topology)
    error = caught.value
    assert error.column == "amount"
    assert error.shard in ("s1", "s2")
    array_item = sql_type.endswith("[]") and not shown.startswith(("{{", "["))
    if sql_type.endswith("[]") and not array_item:
        shown = "an array of 2 dimensions"
    assert error.value in shown if array_item else error.value == shown[:80]
    assert repr(error.shard) in str(error)
    assert error.value in str(error)
    found = column(f"SELECT '{value}'::{sql_type} AS amount", topology, unrepresentable="null")
    if array_item:
        assert found.null_count == 0
        assert all(items[-1] is None for items in found.to_pylist())
    else:
        assert found.to_pylist() == [None, None]


def test_intervals_at_infinity(one, cursor):
    cursor.execute("SHOW server_version_num")
    if int(cursor.fetchone()[0]) < 170000:
        pytest.skip("intervals have an infinity since PostgreSQL 17")
    for value in ("infinity", "-infinity"):
        with pytest.raises(dss.UnrepresentableValueError) as caught:
            as_one_value(one, f"'{value}'::interval")
        assert caught.value.value == value
        assert as_one_value(one, f"'{value}'::interval", unrepresentable="null") is None


def test_values_beside_one_that_does_not_fit_are_kept(one):
    sql = "SELECT * FROM unnest(ARRAY['2020-01-01', 'infinity', '0044-03-15 BC', NULL]::date[]) d"
    found = values.arrow_values(column(sql, one, unrepresentable="null"))
    assert found == [(dt.date(2020, 1, 1) - dt.date(1970, 1, 1)).days, None, -735160, None]


def test_intervals_of_every_combination_of_signs(one, cursor):
    parts = [
        f"{y} years {m} mons {d} days {s} seconds"
        for y in (-1, 0, 1)
        for m in (-2, 0, 2)
        for d in (-3, 0, 3)
        for s in ("-3661.5", "0", "-0.000001", "59.999999")
    ]
    kind = next(kind for kind in SCALARS if kind.sql == "interval")
    sql = f"SELECT {{}} FROM unnest(ARRAY{parts}::interval[]) WITH ORDINALITY u (v, n) ORDER BY n"
    cursor.execute(sql.format(kind.reference("v")))
    expected = [text for (text,) in cursor.fetchall()]
    assert len(set(expected)) > 90
    assert [kind.canon(v) for v in column(sql.format("v"), one).to_pylist()] == expected


def test_an_array_keeps_its_elements_whatever_its_bounds(one):
    """Documented in dask_shardsql.sql.types: the lower bound is not kept."""
    assert as_one_value(one, "'[2:3]={a,b}'::text[]") == ["a", "b"]
    assert as_one_value(one, "'[-7:-7]={1}'::int4[]") == [1]


def test_arrays_of_awkward_texts(one, cursor):
    awkward = ["", " ", "NULL", "null", "a,b", '"', "\\", '\\"', "{}", "{", "\n\r\t", "é𝄞", "'"]
    awkward += ["[1:2]={x}", "\\.", "\\N", None, "x" * 100_000]
    sql = "SELECT %s::text[] AS a"
    text = values.array_text(awkward)
    cursor.execute("SELECT to_json(%s::text[])", (text,))
    ((expected,),) = cursor.fetchall()
    assert expected == awkward
    assert column(sql, one, params=[text]).to_pylist() == [awkward]


def test_domains_count_as_the_types_under_them(servers, one, cursor):
    schema = f"d_{uuid.uuid4().hex[:8]}"
    cursor.execute(f"CREATE SCHEMA {schema}")
    cursor.execute(
        f"SET search_path = {schema}; CREATE DOMAIN whole AS int4 CHECK (value > 0); "
        "CREATE DOMAIN price AS numeric(10,2); CREATE DOMAIN list AS int4[]; "
        "CREATE TYPE mood AS ENUM ('sad', 'ok'); CREATE DOMAIN feeling AS mood; "
        "CREATE DOMAIN again AS whole; CREATE DOMAIN thrice AS again; "
        f"CREATE TYPE date AS ENUM ('x'); CREATE DOMAIN no_date AS {schema}.date; "
        "SET search_path = public"
    )
    cases = {
        "whole": ("7", pa.int32(), 7),
        "price": ("1.5", pa.decimal128(10, 2), decimal.Decimal("1.50")),
        "list": ("{1,NULL}", pa.list_(pa.int32()), [1, None]),
        "mood": ("ok", pa.string(), "ok"),
        "feeling": ("ok", pa.string(), "ok"),
        "thrice": ("7", pa.int32(), 7),
        "no_date": ("x", pa.string(), "x"),
        "whole[]": ("{7}", pa.list_(pa.int32()), [7]),
        "price[]": ("{1.5}", pa.list_(pa.decimal256(76, 38)), [decimal.Decimal("1.5")]),
        "feeling[]": ("{sad,NULL}", pa.list_(pa.string()), ["sad", None]),
        "thrice[]": ("{7}", pa.list_(pa.int32()), [7]),
        "no_date[]": ("{x}", pa.list_(pa.string()), ["x"]),
        "list[]": ('{"{1,2}",NULL}', pa.list_(pa.string()), ["{1,2}", None]),
    }
    for name, (text, kind, expected) in cases.items():
        for cast, wanted in ((f"%s::{schema}.{name}", expected), (f"NULL::{schema}.{name}", None)):
            params = [text] if "%s" in cast else []
            found = column(f"SELECT {cast}", one, params=params)
            assert found.type == kind, name
            assert found.to_pylist() == [wanted], name


def test_enums_domains_and_composites_match_by_name_when_oids_differ(
    servers, shard_cursors, table_name
):
    schema = f"e_{table_name}"
    shard_cursors[1].execute("CREATE TYPE pg_temp.makes_oids_differ AS ENUM ('x')")
    for cursor in shard_cursors:
        cursor.execute(f"CREATE SCHEMA {schema}")
        cursor.execute(f"CREATE TYPE {schema}.mood AS ENUM %s", (values.MOODS,))
        cursor.execute(f"CREATE TYPE {schema}.pair AS (a int4, b {schema}.mood)")
        cursor.execute(f"CREATE DOMAIN {schema}.dom AS {schema}.mood")
        cursor.execute(
            f"CREATE TABLE {table_name} (m {schema}.mood, ms {schema}.mood[], p {schema}.pair, "
            f"ps {schema}.pair[], ds {schema}.dom[])"
        )
    oids = []
    for cursor in shard_cursors:
        cursor.execute("SELECT %s::regtype::oid", (f"{schema}.mood",))
        oids.append(cursor.fetchone()[0])
    assert oids[0] != oids[1]
    for mood in values.MOODS:
        shard_cursors[0].execute(
            f"INSERT INTO {table_name} VALUES (%s, ARRAY[%s, NULL]::{schema}.mood[], "
            f"ROW(1, %s)::{schema}.pair, ARRAY[ROW(1, %s)::{schema}.pair], ARRAY[%s]::"
            f"{schema}.dom[])",
            [mood] * 5,
        )
    shard_cursors[0].execute(
        f"SELECT m::text, to_json(ms), p::text, to_json(ps::text[]), to_json(ds::text[]) "
        f"FROM {table_name}"
    )
    expected = shard_cursors[0].fetchall()
    found = dss.collect(f"TABLE {table_name}", first_shards(servers, 2))
    assert [tuple(row.values()) for row in found.to_pylist()] == expected
    texts = pa.list_(pa.string())
    assert found.schema.types == [pa.string(), texts, pa.string(), texts, texts]
    ddf = dss.read_sharded_sql(f"TABLE {table_name}", first_shards(servers, 2))
    assert ddf.partitions[1].compute().dtypes.equals(ddf.dtypes)


@pytest.mark.parametrize("extension", ["citext", "hstore", "ltree", "cube"])
def test_types_of_extensions_arrive_as_text(servers, shard_cursors, extension):
    example = {"citext": "Ab", "hstore": '"a"=>"1", "b"=>NULL', "ltree": "a.b", "cube": "(1, 2)"}
    for cursor in shard_cursors:
        cursor.execute("SELECT 1 FROM pg_available_extensions WHERE name = %s", (extension,))
        if not cursor.fetchall():
            pytest.skip(f"this PostgreSQL has no {extension}")
        cursor.execute(f"CREATE EXTENSION IF NOT EXISTS {extension}")
    value = f"'{example[extension]}'::{extension}"
    topology = first_shards(servers, 2)
    shard_cursors[0].execute(f"SELECT {value}::text")
    ((shown,),) = shard_cursors[0].fetchall()
    assert column(f"SELECT {value}", topology).to_pylist() == [shown, shown]
    assert column(f"SELECT ARRAY[{value}, NULL]", topology).to_pylist() == [[shown, None]] * 2


def test_pseudo_types_that_a_query_can_return_arrive_as_text(one):
    sql = "SELECT ROW(1, 'a,b') AS r, ARRAY[ROW(1, NULL)] AS rs, 'x' AS unknown, pg_sleep(0) AS v"
    table = dss.collect(sql, one)
    assert set(table.schema.types) == {pa.string()}
    assert table.to_pylist() == [{"r": '(1,"a,b")', "rs": '{"(1,)"}', "unknown": "x", "v": ""}]


AWKWARD = [
    *("", " ", "\\.", "\\N", "NULL", "null", '"', '""', "'", ",", "\n", "\r", "\r\n", "\t", "\\"),
    *("a\n\\.\nb", "\n\n", ",,", '",', ' " ', "é", "𝄞", "\u2028", "\ufeff", "\x01\x1f\x7f", "NaN"),
    *("t", "f", "0", "-", "#", "--", ";", "%s", "%(x)s", "{}", "a" * 70_000),
]


def test_texts_of_one_column_survive_csv(one, cursor):
    """One column is CSV's hard case: NULL is an empty line, and a line of \\. ends the data."""
    texts = [item for text in AWKWARD for item in (text, None)]
    sql = "SELECT * FROM unnest(%s::text[]) WITH ORDINALITY AS u (v, n) ORDER BY n"
    cursor.execute(sql, (texts,))
    assert [row[0] for row in cursor.fetchall()] == texts
    found = column(f"SELECT v FROM ({sql}) AS q", one, params=[texts])
    assert found.to_pylist() == texts
    for text in (*AWKWARD, None):
        assert column("SELECT %s::text", one, params=[text]).to_pylist() == [text]
        two = dss.collect("SELECT %s::text AS a, %s::text AS b", one, [text, text]).to_pylist()
        assert two == [{"a": text, "b": text}]


@pytest.mark.parametrize("sql_type", ["int4", "bool", "float8", "date", "numeric", "bytea", "text"])
def test_a_column_of_nothing_but_nulls(one, sql_type):
    sql = f"SELECT NULL::{sql_type} AS v FROM generate_series(1, 3)"
    assert column(sql, one).to_pylist() == [None] * 3
    none = column(f"{sql} WHERE false", one)
    assert none.type == column(sql, one).type
    assert none.to_pylist() == []


def test_a_value_larger_than_a_batch(one):
    """A batch is 8 MiB; the quotes double in CSV."""
    sql = "SELECT n, repeat('é\"\n', 3000000) AS v FROM generate_series(1, 2) AS n"
    table = dss.collect(sql, one)
    assert table["v"].to_pylist() == ['é"\n' * 3_000_000] * 2
    assert table["n"].to_pylist() == [1, 2]


def test_every_byte_in_a_large_bytea(one):
    sql = f"SELECT decode(repeat('{bytes(range(256)).hex()}', 10000), 'hex')"
    assert column(sql, one).to_pylist() == [bytes(range(256)) * 10_000]


def test_two_hundred_columns(one):
    items = ", ".join(f"{n} AS c{n}, NULL::text AS t{n}" for n in range(100))
    table = dss.collect(f"SELECT {items} FROM generate_series(1, 3)", one)
    assert table.num_columns == 200
    assert table.to_pylist()[2] == {
        name: value for n in range(100) for name, value in ((f"c{n}", n), (f"t{n}", None))
    }


NAMES = ['"', "é 𝄞", "a%b", "%s", "a,b", "self", "index", "0", " ", "'", "{x}", "SELECT", "x;--"]


@pytest.mark.parametrize("dtype_backend", ["pyarrow", "numpy_nullable", "numpy"])
def test_column_names_of_every_kind(one, dtype_backend):
    names = [*NAMES, "x" * 63]
    quoted = ['"' + name.replace('"', '""') + '"' for name in names]
    items = ", ".join(
        f"{n} AS {name}" if n % 2 else f"ARRAY[{n}] AS {name}" for n, name in enumerate(quoted)
    )
    assert dss.collect(f"SELECT {items}", one).column_names == names
    frame = dss.read_sharded_sql(f"SELECT {items}", one, dtype_backend=dtype_backend).compute()
    assert list(frame.columns) == names
    found = [frame[name].iloc[0] for name in names]
    assert [int(v) if n % 2 else list(v) for n, v in enumerate(found)] == [
        n if n % 2 else [n] for n in range(len(names))
    ]


@pytest.mark.parametrize(
    ("value", "kind", "expected"),
    [
        ("1.5::numeric", "float64", 1.5),
        ("1.5::numeric(10,2)", "float64", 1.5),
        ("'Infinity'::numeric", "float64", math.inf),
        ("0.1::numeric", "float32", struct.unpack("f", struct.pack("f", 0.1))[0]),
        ("1.50::numeric(10,2)", "string", "1.50"),
        ("'NaN'::numeric", "string", "NaN"),
        ("7::int4", "float64", 7.0),
        ("7::int8", "int8", 7),
        ("7::int4", "decimal128(10, 2)", decimal.Decimal("7.00")),
        ("1.5::numeric", "decimal128(38,4)", decimal.Decimal("1.5000")),
        ("1.5::float8", "decimal128(5, 1)", decimal.Decimal("1.5")),
        ("'2020-02-29'::date", "timestamp[us]", 1582934400000000),
        ("'0044-03-15 BC'::date", "timestamp[us]", -63517824000000000),
        ("'2020-02-29 00:00:01.5'::timestamp", "timestamp[ms]", 1582934401500),
        ("'2020-02-29 02:00+02'::timestamptz", pa.timestamp("us", "Asia/Tokyo"), 1582934400000000),
        ("'10:00'::time", "time32[ms]", dt.time(10)),
        ("'\\x00'::bytea", "string", "\\x00"),
        ("'\\x00'::bytea", "large_binary", b"\0"),
        ("true", "string", "t"),
        ("'{1,2}'::int4[]", pa.list_(pa.float64()), [1.0, 2.0]),
        ("'{1,2}'::int4[]", "string", "{1,2}"),
        ("'{\"a\": 1}'::json", "large_string", '{"a": 1}'),
        ("'t'::text", "bool", True),
    ],
)
def test_types_gives_a_column_another_type(one, value, kind, expected):
    found = column(f"SELECT {value} AS v", one, types={"v": kind})
    if isinstance(kind, pa.DataType):
        assert found.type == kind
    assert values.arrow_values(found) == [expected]
    none = column("SELECT NULL AS v", one, types={"v": kind})
    assert none.type == found.type
    assert none.to_pylist() == [None]


@st.composite
def numbers(draw):
    whole = draw(st.text("0123456789", max_size=draw(st.sampled_from([3, 40, 90, 400]))))
    places = draw(st.text("0123456789", max_size=90) | st.text("0", max_size=90))
    return draw(st.sampled_from(["", "-"])) + (whole.lstrip("0") or "0") + f".{places}".rstrip(".")


@given(
    text=numbers(),
    kind=st.sampled_from(
        [
            *(pa.decimal256(76, 38), pa.decimal256(76, 76), pa.decimal256(50, 0)),
            *(pa.decimal128(10, 2), pa.decimal128(38, 10), pa.decimal128(38, 38)),
            *(pa.decimal128(38, 0), pa.decimal128(5, -2)),
        ]
    ),
)
@settings(max_examples=values.EXAMPLES * 10, deadline=None, derandomize=True)
def test_numbers_of_any_length_are_exact_or_do_not_fit(text, kind):
    """Arrow's own cast from text wraps round: it makes 4.6e37 of 1e69."""
    with decimal.localcontext(prec=1000):
        number = decimal.Decimal(text)
        units = number.scaleb(kind.scale)
        fits = units == units.to_integral_value() and abs(units) < 10**kind.precision
    texts, numeric = pa.array([text, None]), Column("n", "numeric", kind)
    found = decode_text(texts, numeric, "null").to_pylist()
    assert found == [number if fits else None, None]
    if not fits:
        with pytest.raises(dss.UnrepresentableValueError):
            decode_text(texts, numeric)


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        *[("1e60::float8", "decimal128(38, 0)"), ("'1_000'::text", "decimal128(38, 0)")],
        *[("1.5::numeric", "int64"), ("300::int4", "int8"), ("-1::int4", "uint32")],
        *[("1.005::numeric", "decimal128(10, 2)"), ("12345::int4", "decimal128(4, 0)")],
        *[("'x'::text", "float64"), ("'x'::text", "int32"), ("'x'::text", "date32")],
        *[("7::int4", "bool"), ("'yes'::text", "bool"), ("'x'::text", "binary")],
        *[("'x'::text", pa.list_(pa.int32())), ("'{x}'::text[]", pa.list_(pa.int32()))],
        ("'2020-01-01 00:00:00.5'::timestamp", "timestamp[s]"),
        ("'1500-01-01'::timestamp", "timestamp[ns]"),
        ("'1 day'::interval", "time64[us]"),
    ],
)
def test_a_value_that_the_wanted_type_cannot_hold(one, value, kind):
    with pytest.raises(dss.UnrepresentableValueError) as caught:
        column(f"SELECT {value} AS v", one, types={"v": kind})
    assert (caught.value.column, caught.value.shard) == ("v", "s1")
    found = column(f"SELECT {value} AS v", one, types={"v": kind}, unrepresentable="null")
    assert found.to_pylist() in ([None], [[None]])


@pytest.mark.parametrize("kind", ["struct", "decimal", "decimal128(99, 2)", "", "numeric", 7])
def test_a_type_without_such_a_name_is_refused(one, kind):
    with pytest.raises(dss.ConfigurationError, match="'v'"):
        column("SELECT 1 AS v", one, types={"v": kind})


def test_types_of_a_column_that_is_not_there_is_refused(one):
    with pytest.raises(dss.ColumnError, match="nope") as caught:
        column("SELECT 1 AS v", one, types={"nope": "float64"})
    assert caught.value.columns == ("nope",)


@pytest.mark.parametrize(
    "kind", [pa.duration("us"), pa.struct([("a", pa.int32())]), pa.dictionary(pa.int8(), "string")]
)
def test_a_type_that_no_text_leads_to_is_refused(one, kind):
    with pytest.raises(dss.ColumnError, match="'v'"):
        column("SELECT 1 AS v", one, types={"v": kind})


def test_unrepresentable_must_be_one_of_two_words(one):
    with pytest.raises(dss.ConfigurationError, match="unrepresentable"):
        column("SELECT 1", one, unrepresentable="ignore")


def test_the_shards_types_are_named_as_the_database_writes_them(one):
    sql = (
        "SELECT 1.5::numeric(10,2) AS a, 1::numeric(5,-2) AS b, NULL::numeric(2,5) AS c, 1.5 AS d, "
        "ARRAY[1.5::numeric(10,2)] AS e, 'x'::char(3) AS f, '{}'::int4multirange AS g, "
        "'{}'::regtype[] AS h, '{}'::box[] AS i, '1 2'::int2vector AS j"
    )
    columns = describe(ask(sql, one, None, settings=Settings.current())).answer.columns
    assert [column.type_name for column in columns] == [
        *("numeric(10,2)", "numeric(5,-2)", "numeric(2,5)", "numeric", "numeric[]", "bpchar"),
        *("int4multirange", "regtype[]", "_box", "int2vector"),
    ]


def test_a_database_of_another_encoding_arrives_as_unicode(servers, one, cursor, table_name):
    cursor.execute(f"CREATE DATABASE {table_name} ENCODING 'LATIN1' LOCALE 'C' TEMPLATE template0")
    dsn = servers.dsns["s1"].replace("dbname=postgres", f"dbname={table_name}")
    topology = dss.Topology.from_dsns({"latin": dsn})
    found = dss.collect("SELECT chr(233) || %s AS v, ARRAY[chr(233)] AS a", topology, ["ü"])
    assert found.to_pylist() == [{"v": "éü", "a": ["é"]}]


def test_bytes_that_are_no_unicode_are_an_error_that_says_why(servers, cursor, table_name):
    cursor.execute(
        f"CREATE DATABASE {table_name} ENCODING 'SQL_ASCII' LOCALE 'C' TEMPLATE template0"
    )
    dsn = servers.dsns["s1"].replace("dbname=postgres", f"dbname={table_name}")
    topology = dss.Topology.from_dsns({"bytes": dsn})
    assert column("SELECT 'ok'", topology).to_pylist() == ["ok"]
    with pytest.raises(dss.QueryError, match="invalid byte sequence") as caught:
        column("SELECT E'\\xe9' AS v", topology)
    assert caught.value.sqlstate == "22021"
