"""What is said to who makes a mistake with merge="global", or asks for what no table can hold."""

from __future__ import annotations

import threading

import psycopg2
import pytest

import dask_shardsql as dss
from dask_shardsql.engine.drivers.postgresql_merge import PostgreSQLMerging
from dask_shardsql.testing import start_shards

SHARDED = {"mm_orders": "id", "mm_wide": "id", "mm_floats": "id", "mm_bulky": "id"}
FLOATS = ", ".join(f"f{n}" for n in range(700))
WIDE = ", ".join(f"c{n}" for n in range(1000))
SCHEMA = f"""
CREATE TABLE mm_orders (
    id int PRIMARY KEY, name text, code text COLLATE "C", sort text COLLATE "POSIX");
CREATE TABLE mm_kinds (kind text PRIMARY KEY);
CREATE TABLE mm_wide (id int PRIMARY KEY, {WIDE.replace(",", " int DEFAULT 1,")} int DEFAULT 2);
CREATE TABLE mm_floats (id int PRIMARY KEY, {FLOATS.replace(",", " float8 DEFAULT 1,")} float8);
CREATE TABLE mm_bulky (id int PRIMARY KEY, x text);
"""


@pytest.fixture(scope="module")
def three():
    with start_shards(3, sharded=SHARDED) as servers:
        servers.execute(SCHEMA)
        by_id = {"shard_of": lambda row: int(row[0]) % 3}
        servers.load("mm_orders", [(n, f"n{n}", f"c{n}", "s") for n in range(30)], **by_id)
        for name in ("mm_wide", "mm_floats"):
            for shard, _ in enumerate(servers.topology.shards):
                ids = f"SELECT n FROM generate_series(0, 29) AS n WHERE n % 3 = {shard}"
                with servers.session(servers.topology.shards[shard].name) as cursor:
                    cursor.execute(f"INSERT INTO {name} (id) {ids}")
            with servers.session("reference") as cursor:
                cursor.execute(f"INSERT INTO {name} (id) SELECT generate_series(0, 29)")
        servers.load("mm_bulky", [(n, "x" * 2000) for n in range(20_000)], **by_id)
        servers.execute("ANALYZE")
        yield servers


@pytest.mark.parametrize(
    "sql",
    [
        "WITH x AS (DELETE FROM mm_orders RETURNING *)\nSELECT count(*) FROM x",
        "WITH x AS (INSERT INTO mm_kinds VALUES ('k') RETURNING *) SELECT * FROM x",
    ],
)
@pytest.mark.parametrize("ask", [dss.collect, dss.read_sharded_sql, dss.stream, dss.explain])
def test_a_query_that_writes(ask, sql, three):
    with pytest.raises(dss.StatementError, match="a WITH of this one changes rows") as caught:
        ask(sql, three.topology, merge="global")
    assert "view" not in str(caught.value)
    with pytest.raises(dss.QueryError, match="leave out what changes or locks rows"):
        dss.collect(sql, three.topology)


@pytest.mark.parametrize(
    ("sql", "reason", "said"),
    [
        ("SELECT (id, name) AS r FROM mm_orders ORDER BY id", "column-type", '"r".*as to text'),
        ("SELECT sort || code AS c, 1 AS n FROM mm_orders", "column-type", '"c".*write COLLATE'),
        (f"SELECT a.*, b.c1 AS b, {', '.join(f'{n} AS n{n}' for n in range(620))} FROM mm_wide a "
         "JOIN mm_wide b USING (id) ORDER BY id LIMIT 2", "too-many-columns", "1600 columns"),
    ],
)  # fmt: skip
def test_columns_that_no_table_could_have(sql, reason, said, three):
    with pytest.raises(dss.MergeRefusedError, match=said) as caught:
        dss.collect(sql, three.topology, merge="global")
    assert caught.value.reason == reason
    assert "view" not in str(caught.value)
    assert dss.explain(sql, three.topology, merge="global").reason == reason
    assert len(dss.collect(sql, three.topology)) > 0


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT " + ", ".join(f"avg(c{n}) AS a{n}" for n in range(900)) + " FROM mm_wide",
        f"SELECT {WIDE}, {', '.join(f'c{n} + 1 AS d{n}' for n in range(600))} FROM mm_wide "
        "ORDER BY id LIMIT 3",
        f"SELECT a.id, a.f1, {', '.join(f'a.f{n} + b.f{n} AS d{n}' for n in range(699))}, "
        f"{', '.join(f'b.f{n} AS e{n}' for n in range(699))} "
        "FROM mm_floats a JOIN mm_floats b USING (id) ORDER BY id LIMIT 3",
    ],
    ids=["partial aggregates", "a hidden column", "a row larger than a page"],
)
def test_parts_that_no_table_could_hold_are_gathered(sql, three):
    assert dss.explain(sql, three.topology, merge="global").strategy == "gather"
    found = dss.collect(sql, three.topology, merge="global")
    assert found.equals(dss.collect(sql, three.reference))


def test_rows_that_turn_out_too_large_are_refused(three):
    long = ", ".join(f"c{n} * 1234567890123456789.5 AS x{n}" for n in range(900))
    with pytest.raises(dss.MergeRefusedError, match="row is too big") as caught:
        dss.collect(
            f"SELECT id, {long} FROM mm_wide ORDER BY id LIMIT 3", three.topology, merge="global"
        )
    assert caught.value.reason == "too-many-columns"


def test_the_position_is_that_in_the_users_text(three):
    """Also where only the database that merges does not understand it."""
    sql = "SELECT name,\n  kind FROM mm_orders, mm_kinds ORDER BY 1"
    elsewhere = three.reference_dsn
    with three.session("reference") as cursor:
        cursor.execute("ALTER TABLE mm_kinds RENAME kind TO sort")
    topology = dss.Topology.from_dsns(
        {shard.name: three.dsns[shard.name] for shard in three.topology.shards},
        sharded=SHARDED,
        merge_dsn=elsewhere,
    )
    try:
        with pytest.raises(dss.QueryError, match="shard 'merge': column \"kind\"") as caught:
            dss.collect(sql, topology, merge="global")
    finally:
        with three.session("reference") as cursor:
            cursor.execute("ALTER TABLE mm_kinds RENAME sort TO kind")
    assert (caught.value.query, caught.value.position) == (sql, sql.index("kind") + 1)
    assert "\nLINE 2:   kind FROM" in str(caught.value)


@pytest.mark.parametrize(
    ("sql", "params", "said"),
    [
        ("SELECT %s AS a, %s AS b", [1], "there are fewer of them"),
        ("SELECT %s AS a", [1, 2], "there are more of them"),
        ("SELECT %(a)s AS a", [1], "the placeholders have names, and they have none"),
        ("SELECT %s AS a", {"a": 1}, "they have names, and the placeholders have none"),
        ("SELECT id FROM mm_orders WHERE id = %s", None, "only where these are given, as params"),
        ("SELECT id FROM mm_orders WHERE id = %(a)s", None, "only where these are given"),
        ("SELECT id FROM mm_orders WHERE id IN %s", None, "only where these are given"),
        ("SELECT id FROM mm_orders WHERE idd = 1", None, 'perhaps you meant .* "mm_orders.id"'),
    ],
)
@pytest.mark.parametrize("merge", ["global", "union"])
def test_parameters_and_placeholders(sql, params, said, merge, three):
    with pytest.raises(dss.QueryError, match=f"(?i){said}"):
        dss.collect(sql, three.topology, params, merge=merge)


def test_explain_is_no_query(three):
    with pytest.raises(dss.StatementError, match="give the query to dask_shardsql.explain"):
        dss.collect("EXPLAIN SELECT count(*) FROM mm_orders", three.topology, merge="global")


def test_columns_without_a_name_or_at_all(three):
    for sql, said in (
        ("SELECT count(*) + 1, 1 + count(*) FROM mm_orders", r"SELECT \.\.\. AS name"),
        ("SELECT id, name AS id FROM mm_orders", "SELECT a.id AS a_id"),
        ("SELECT * INTO mm_new FROM mm_orders", r"nor does SELECT \.\.\. INTO"),
    ):
        with pytest.raises(dss.ColumnError, match=said):
            dss.collect(sql, three.topology, merge="global")


@pytest.mark.parametrize("victim", ["source", "target"])
def test_a_server_that_is_lost_while_rows_are_copied(victim, three, monkeypatch):
    sql = "SELECT percentile_disc(0.5) WITHIN GROUP (ORDER BY x) AS x FROM mm_bulky"
    (at,) = dss.explain(sql, three.topology, merge="global").shards
    lost, lock = [], threading.Lock()
    as_it_was = PostgreSQLMerging.receive

    def receive(self, extract, stream):
        with lock:
            if not lost:
                on = next(s.name for s in three.topology.shards if (s.name == at) == is_target)
                lost.append(on)
                stream.read = end_backend(stream.read, on)
        return as_it_was(self, extract, stream)

    is_target = victim == "target"

    def end_backend(read, on):
        numbers = iter(range(1 << 30))

        def read_some(size):
            if next(numbers) == 3:
                with three.session(on) as cursor:
                    pattern = "COPY pg_temp%" if is_target else "COPY (%TO STDOUT%"
                    cursor.execute(
                        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE query "
                        "LIKE %s AND pid <> pg_backend_pid()",
                        (pattern,),
                    )
                    assert cursor.fetchall() == [(True,)]
            return read(size)

        return read_some

    monkeypatch.setattr(PostgreSQLMerging, "receive", receive)
    with pytest.raises(dss.ConnectionLostError, match="lost while rows were copied") as caught:
        dss.collect(sql, three.topology, merge="global")
    assert caught.value.shard == lost[0]
    assert "libpq" not in str(caught.value)
    assert "socket" not in str(caught.value)
    monkeypatch.undo()
    assert len(dss.collect(sql, three.topology, merge="global")) == 1
    with psycopg2.connect(three.dsns[at]) as connection, connection.cursor() as cursor:
        cursor.execute("SELECT count(*) FROM pg_stat_activity WHERE query LIKE 'COPY pg_temp%'")
        assert cursor.fetchone() == (0,)


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT reltuples FROM pg_class WHERE relname = 'mm_orders'",
        "SELECT n_live_tup FROM pg_stat_user_tables",
        "SELECT count(*) FROM mm_orders, information_schema.tables",
        "SELECT (SELECT count(*) FROM pg_stats WHERE tablename = k.kind) AS n FROM mm_kinds k",
        "WITH types AS (TABLE pg_type) SELECT count(*) FROM types",
    ],
)
def test_what_a_server_says_of_one_database(sql, three):
    with pytest.raises(dss.MergeRefusedError, match="says something of one database") as caught:
        dss.collect(sql, three.topology, merge="global")
    assert caught.value.reason == "system-table"


def test_a_shard_key_that_is_no_column(three):
    topology = dss.Topology(three.topology.shards, (dss.ShardedTable("mm_orders", "idd"),))
    with pytest.raises(dss.MergeRefusedError, match="'idd' .* has id, name, code, sort") as caught:
        dss.collect("SELECT count(*) FROM mm_orders", topology, merge="global")
    assert caught.value.reason == "unknown-key"
