"""Every type through both ways of COPY: the values are the server's own, whatever their form."""

from __future__ import annotations

import csv
import decimal
import io
import os
import random
import shutil
import struct
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import psycopg2
import psycopg2.errors
import pyarrow as pa
import pytest
import values
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from psycopg2.extensions import make_dsn
from test_copy_socket import connect, read

from dask_shardsql.testing import start_shards

SCALARS = [kind for kind in values.scalar_kinds() if kind.sql != "xml"]
KINDS = [*SCALARS, *values.array_kinds(SCALARS)]
NULL = "<a NULL>"


@pytest.fixture(scope="module")
def cursor(servers):
    with closing(values.open_reference(servers, "s1")) as connection:
        yield connection.cursor()


@pytest.fixture
def ways(servers):
    """A connection that is read from by its socket, and one by copy_expert."""
    with (
        closing(connect(servers.dsns["s1"])) as plain,
        closing(connect(servers.dsns["s1"])) as not_plain,
    ):
        not_plain.__dict__["is_plain"] = False
        assert plain.is_plain
        assert not not_plain.is_plain
        yield plain, not_plain


def both(ways, sql, **options):
    """Return the answer, which must be the same both ways."""
    first, second = (read(connection, sql, **options) for connection in ways)
    assert first.schema == second.schema
    assert first.num_rows == second.num_rows
    for one, other in zip(first.columns, second.columns, strict=True):
        # as texts, so that NaN is NaN and -0.0 is not 0.0
        assert repr(values.arrow_values(one)) == repr(values.arrow_values(other))
    return first


def shown(cursor, sql):
    """Return what the server's output functions write, by COPY CSV."""
    target = io.StringIO()
    cursor.copy_expert(f"COPY ({sql}) TO STDOUT (FORMAT csv, FORCE_QUOTE *, NULL '{NULL}')", target)
    rows = csv.reader(io.StringIO(target.getvalue(), newline=""))
    return [[None if value == NULL else value for value in row] for row in rows]


def table_of_all(cursor, name):
    """Create a table with a column of every type, and rows of extremes."""
    items = ", ".join(f"c{i} {kind.sql}" for i, kind in enumerate(KINDS))
    cursor.execute(f"CREATE TABLE {name} (n int4, {items})")
    for number in range(max(len(kind.extreme) for kind in KINDS) + 1):
        row = [kind.extreme[number] if number < len(kind.extreme) else None for kind in KINDS]
        marks = ", ".join(["%s"] * len(row))
        cursor.execute(f"INSERT INTO {name} VALUES ({number}, {marks})", row)
    return ", ".join(kind.reference(f"c{i}") for i, kind in enumerate(KINDS))


def canonical_on_server(cursor, references, name):
    cursor.execute(f"SELECT {references} FROM {name} ORDER BY n")
    return [tuple(k.settle(v) for k, v in zip(KINDS, row, strict=True)) for row in cursor]


def canonical(table):
    rows = zip(*(values.arrow_values(column) for column in table.columns[1:]), strict=True)
    return [tuple(k.canon(v) for k, v in zip(KINDS, row, strict=True)) for row in rows]


def test_every_type_both_ways(ways, cursor, table_name):
    references = table_of_all(cursor, table_name)
    expected = canonical_on_server(cursor, references, table_name)
    assert canonical(both(ways, f"SELECT * FROM {table_name} ORDER BY n")) == expected
    small = both(ways, f"SELECT * FROM {table_name} ORDER BY n", batch_bytes=1 << 10)
    assert canonical(small) == expected


def test_every_type_over_a_unix_socket_and_over_tls(tmp_path, table_name):
    settings = {"unix_socket_directories": ".", "unix_socket_permissions": "0777"}
    with (
        start_shards(1, reference=False, settings=settings) as servers,
        closing(values.open_reference(servers, "s1")) as connection,
    ):
        cursor = connection.cursor()
        references = table_of_all(cursor, table_name)
        expected = canonical_on_server(cursor, references, table_name)
        cursor.execute("SHOW data_directory")
        ((directory,),) = cursor.fetchall()
        sql, dsn = f"SELECT * FROM {table_name} ORDER BY n", servers.dsns["s1"]
        with closing(connect(make_dsn(dsn, host=directory))) as local:
            assert local.is_plain
            assert canonical(read(local, sql)) == expected
        with closing(connect(dsn)) as plain:
            assert plain.is_plain
            assert canonical(read(plain, sql)) == expected
        switch_tls_on(cursor, directory, tmp_path)
        with closing(connect(make_dsn(dsn, sslmode="require"))) as encrypted:
            assert encrypted.info.ssl_in_use
            assert not encrypted.is_plain
            assert canonical(read(encrypted, sql)) == expected


def switch_tls_on(cursor, directory, tmp_path):
    if shutil.which("openssl") is None:
        pytest.skip("TLS not tested: there is no openssl to make a certificate with")
    key, certificate = tmp_path / "server.key", tmp_path / "server.crt"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"),
            *("-subj", "/CN=localhost", "-keyout", key, "-out", certificate),
        ],
        check=True,
        capture_output=True,
    )
    owner = os.stat(directory)
    for path in (key, certificate):
        target = os.path.join(directory, path.name)
        shutil.copy(path, target)
        os.chmod(target, 0o600)
        os.chown(target, owner.st_uid, owner.st_gid)
    try:
        cursor.execute("ALTER SYSTEM SET ssl = on")
    except psycopg2.Error as error:
        pytest.skip(f"TLS not tested: {str(error).strip()}")
    cursor.execute("SELECT pg_reload_conf(), pg_sleep(0.5)")
    cursor.execute("SHOW ssl")
    if cursor.fetchall() != [("on",)]:
        pytest.skip("TLS not tested: the server does not switch it on")


AS_TEXT = [
    *("'10.0.0.1/32'::inet", "'10.0.0.0/8'::inet", "'10.0.0.0/8'::cidr", "'::1/128'::inet"),
    *(
        "'ab'::char(5)",
        "''::char(3)",
        "ARRAY['ab'::char(5), NULL, '']",
        "'x'::\"char\"",
        "'n'::name",
    ),
    *("ROW(1, 'a,b', NULL)", "ROW(NULL, NULL)", "ROW('', NULL)", "ROW()", "ARRAY[ROW(NULL)]"),
    *("NULL::int4range", "'[1,5]'::int4range", "'{[1,3)}'::int4multirange", "'empty'::daterange"),
    *("B'0101'", "'1'::bit(3)", "''::varbit", "'12.5'::money", "'-0.01'::money"),
    *("'12:00:00.5+05:30'::timetz", "'24:00:00'::timetz", "'pg_class'::regclass", "0::regclass"),
    *("'int4'::regtype", '\'{"a":1, "a":2}\'::json', '\'{"a":1, "a":2}\'::jsonb', "'x'"),
    *("'null'::json", "'null'::jsonb", "NULL::json", "NULL", "pg_sleep(0)", "'<,>'::text"),
    *("'1 2'::int2vector", "'{{1,2},{3,4}}'::text", "'(1,2),(0,0)'::box", "'a=>b'::text"),
    *("ARRAY['[1,2)'::int4range, NULL]::text", "'1 2'::oidvector", "'0/0'::pg_lsn", "'(0,1)'::tid"),
    *("''", "ARRAY['(1,2),(0,0)'::box]::text", "'192.168.0.1/24'::inet", "'a'::tsvector"),
]


@pytest.mark.parametrize("value", AS_TEXT)
def test_what_arrives_as_text_is_what_the_server_writes(value, ways, cursor):
    """Arrays that become lists are compared item by item."""
    table = both(ways, f"SELECT {value} AS v")
    if pa.types.is_list(table.schema.types[0]):
        cursor.execute(f"SELECT to_json(ARRAY(SELECT format('%s', e) FROM unnest({value}) AS e))")
        ((expected,),) = cursor.fetchall()
        assert [item or "" for item in table["v"].to_pylist()[0]] == expected
        return
    assert table["v"].to_pylist() == [row[0] for row in shown(cursor, f"SELECT {value} AS v")]


def test_anyarray_is_read(ways, cursor):
    cursor.execute("ANALYZE pg_catalog.pg_type")
    sql = (
        "SELECT attname::text AS a, most_common_vals AS m FROM pg_stats "
        "WHERE tablename = 'pg_type' ORDER BY 1"
    )
    expected = shown(cursor, sql)
    assert any(row[1] for row in expected)
    assert [list(row.values()) for row in both(ways, sql).to_pylist()] == expected


def test_null_empty_text_and_rows_of_nulls_stay_apart(ways, cursor):
    cursor.execute("CREATE TYPE pg_temp.pair AS (a int4, b text)")
    sql = (
        "SELECT * FROM (VALUES (1, NULL::text, NULL::int4range, NULL::bytea), (2, '', "
        "'empty', ''), (3, '\\N', '(,)', '\\x00')) AS v (n, t, r, b) ORDER BY n"
    )
    assert [list(row.values()) for row in both(ways, sql).to_pylist()] == [
        [1, None, None, None],
        [2, "", "empty", b""],
        [3, "\\N", "(,)", b"\0"],
    ]


NUMERICS = ["numeric", "numeric(38,38)", "numeric(76,76)", "numeric(76,0)", "numeric(5,-2)"]
NUMERICS += ["numeric(3,5)", "numeric(38,0)", "numeric(39,20)", "numeric(1,0)", "numeric(76,38)"]


@given(name=st.sampled_from(NUMERICS), seed=st.integers(0, 2**32))
@settings(
    max_examples=values.EXAMPLES,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
def test_random_numerics(name, seed, ways, cursor):
    rng = random.Random(seed)  # noqa: S311
    digits, _, places = name.partition("(")[2].rstrip(")").partition(",")
    digits, places = (int(digits), int(places)) if digits else (76, 38)
    units = [
        rng.choice([0, 10**digits - 1, rng.randrange(10 ** rng.randint(0, digits))])
        for _ in range(30)
    ]
    texts = [f"{rng.choice(['', '-'])}{unit}e{-places}" for unit in units]
    items = ", ".join(f"('{text}'::{name}, {n})" for n, text in enumerate(texts))
    sql = f"SELECT v FROM (VALUES {items}, (NULL::{name}, 99)) AS q (v, n) ORDER BY n"
    cursor.execute(sql)
    expected = [value for (value,) in cursor.fetchall()]
    found = both(ways, sql)["v"].to_pylist()
    assert found == expected
    with decimal.localcontext(prec=200):
        for value, unit in zip(found, units, strict=False):
            assert abs(value).scaleb(places) == unit
    array = both(
        ways,
        f"SELECT array_agg(v ORDER BY n) AS v FROM (VALUES {items}) AS q (v, n)",
        unrepresentable="null",
    )
    kept = [v if abs(v) < 10**38 and v.as_tuple().exponent >= -38 else None for v in expected[:-1]]
    if all(v is not None for v in kept):
        assert array["v"].to_pylist() == [kept]


def test_random_floats(ways, cursor):
    rng = random.Random(5)  # noqa: S311
    for sql_type, form in (("float4", "f"), ("float8", "d")):
        numbers = [
            struct.unpack(form, rng.randbytes(4 if form == "f" else 8))[0] for _ in range(500)
        ]
        sql = (
            f"SELECT v::{sql_type} AS v FROM unnest(%s::text[]) WITH ORDINALITY u (v, n) ORDER BY n"
        )
        params = [[repr(number) for number in numbers]]
        cursor.execute(f"SELECT {sql_type}send(v) FROM ({sql}) AS q", params)
        expected = [bytes(value) for (value,) in cursor.fetchall()]
        found = both(ways, sql, params=params)["v"].to_pylist()
        assert [struct.pack(f">{form}", value) for value in found] == expected


def test_all_of_unicode(ways, cursor):
    every = [*range(1, 0xD800), *range(0xE000, 0x110000)]
    texts = ["".join(map(chr, every[i : i + 5000])) for i in range(0, len(every), 5000)]
    sql = "SELECT v FROM unnest(%s::text[]) WITH ORDINALITY u (v, n) ORDER BY n"
    assert both(ways, sql, params=[texts], batch_bytes=1 << 16)["v"].to_pylist() == texts
    assert both(ways, "SELECT %s::text[] AS v", params=[texts])["v"].to_pylist() == [texts]


def test_long_values(ways):
    sql = (
        "SELECT n, CASE n WHEN 2 THEN repeat('é', 10000000) ELSE 'x' END AS t, "
        "CASE n WHEN 3 THEN ARRAY['a', repeat('b', 50000000), NULL] ELSE '{c}' END AS a "
        "FROM generate_series(1, 4) AS n"
    )
    table = both(ways, sql)
    assert table["n"].to_pylist() == [1, 2, 3, 4]
    assert table["t"].to_pylist() == ["x", "é" * 10_000_000, "x", "x"]
    assert table["a"].to_pylist() == [["c"], ["c"], ["a", "b" * 50_000_000, None], ["c"]]


def test_a_row_of_a_thousand_columns_and_a_list_of_a_million(ways):
    items = ", ".join(f"n + {i} AS i{i}, repeat('t', n * {i}) AS t{i}" for i in range(500))
    table = both(ways, f"SELECT {items} FROM generate_series(1, 3) AS n")
    assert table["i499"].to_pylist() == [500, 501, 502]
    assert table["t499"].to_pylist() == ["t" * 499 * n for n in (1, 2, 3)]
    for connection in ways:
        table = read(
            connection,
            "SELECT array_agg(n) AS a, array_agg(n::text) AS t, array_agg(n::numeric / 4) AS d "
            "FROM generate_series(1, 1000000) AS n",
        )
        assert table["a"].chunk(0).values.equals(pa.array(range(1, 1_000_001), pa.int32()))
        assert table["t"].chunk(0).values[999_999].as_py() == "1000000"
        assert table["d"].chunk(0).values[999_998].as_py() == decimal.Decimal("249999.75")


LARGE = """
import resource, sys
sys.path.insert(0, sys.argv[1])
from test_copy_socket import connect, read
connection = connect(sys.argv[2])
read(connection, "SELECT 1 AS v")
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + int(sys.argv[3]), resource.RLIM_INFINITY))
table = read(connection, "SELECT repeat('x', 300000000) AS v")
assert table["v"].chunk(0).nbytes >= 300_000_000
"""


@pytest.mark.slow
def test_a_text_of_300_mb_takes_no_more_than_four_times_its_size(servers):
    """With room for 1.2 GB; with room for less than the text itself it must fail."""
    for room, enough in ((1_200_000_000, True), (500_000_000, False)):
        arguments = [str(Path(__file__).parent), servers.dsns["s1"], str(room)]
        command = [sys.executable, "-c", LARGE, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert (done.returncode == 0) == enough, done.stderr
