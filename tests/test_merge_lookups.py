"""merge="global": queries behind IN and EXISTS that count rows, and names that a shard hides."""

from __future__ import annotations

import psycopg2
import pytest
from one_database import rows_of

import dask_shardsql as dss
from dask_shardsql.engine import pools

NAMES = ["s1", "s2"]
KEYS = {"lk_o": {"key": "id", "function": "modulo", "shards": NAMES}}
SCHEMA = "CREATE TABLE lk_o (id int8 NOT NULL, n int4); CREATE TABLE lk_r (w int4)"


@pytest.fixture
def loaded(servers):
    servers.execute(SCHEMA)
    servers.load("lk_o", [(n, n % 4) for n in range(40)], shard_of=lambda row: row[0] % 2)
    servers.load("lk_r", [(n,) for n in range(4)])
    yield servers
    pools.close_all()
    servers.execute("DROP TABLE lk_o, lk_r; DROP SCHEMA IF EXISTS lk_first CASCADE")


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT w FROM lk_r WHERE 40 IN (WITH c AS (SELECT n FROM lk_o) SELECT count(*) FROM c)",
        "SELECT w FROM lk_r WHERE EXISTS (SELECT n FROM lk_o UNION ALL SELECT n FROM lk_o "
        "OFFSET 30)",
        "SELECT w FROM lk_r WHERE EXISTS ((SELECT n FROM lk_o) EXCEPT ALL "
        "(SELECT n FROM lk_o WHERE id < 20))",
        "SELECT w FROM lk_r WHERE 10 IN (SELECT count(*) OVER () FROM lk_o WHERE n = w)",
    ],
)
def test_rows_are_counted_behind_in_and_exists(loaded, sql):
    topology = dss.Topology.from_dsns({n: loaded.dsns[n] for n in NAMES}, sharded=KEYS)
    expected = rows_of(sql, dss.collect(sql, loaded.reference))
    assert expected
    assert rows_of(sql, dss.collect(sql, topology, merge="global")) == expected


def test_a_lookup_left_of_in_may_not_have_two_rows(loaded):
    topology = dss.Topology.from_dsns({n: loaded.dsns[n] for n in NAMES}, sharded=KEYS)
    sql = "SELECT w FROM lk_r WHERE (SELECT n FROM lk_o WHERE n = 3) IN (SELECT 3)"
    with pytest.raises(dss.QueryError, match="more than one row"):
        dss.collect(sql, topology, merge="global")


def test_a_table_of_the_name_earlier_in_the_search_path_of_one_shard_is_not_read(loaded):
    loaded.execute("CREATE SCHEMA lk_first")
    path = " options='-c search_path=lk_first,public'"
    dsns = {name: loaded.dsns[name] + path for name in NAMES}
    topology = dss.Topology.from_dsns(dsns, sharded=KEYS)
    with psycopg2.connect(loaded.dsns["s2"]) as connection, connection.cursor() as cursor:
        cursor.execute("CREATE TABLE lk_first.lk_r (w int4)")
    connection.close()
    sql = "SELECT id, w FROM lk_o JOIN lk_r ON w = n"
    expected = rows_of(sql, dss.collect(sql, loaded.reference))
    for text in (f"{sql} -- {n}" for n in range(8)):  # on each shard it is looked at
        try:
            found = dss.collect(text, topology, merge="global")
        except dss.SchemaMismatchError:
            continue
        assert rows_of(sql, found) == expected


@pytest.mark.parametrize(
    ("sql", "reason"),
    [
        ("SELECT lk_o FROM lk_o ORDER BY id", "column-type"),
        ("SELECT array_agg(lk_o) FROM lk_o", "column-type"),
        ("SELECT n, current_setting('search_path') AS path FROM lk_o", "function"),
        ("SELECT pg_backend_pid() FROM lk_o", "function"),
    ],
)
def test_what_is_refused(loaded, sql, reason):
    topology = dss.Topology.from_dsns({n: loaded.dsns[n] for n in NAMES}, sharded=KEYS)
    with pytest.raises(dss.MergeRefusedError) as caught:
        dss.collect(sql, topology, merge="global")
    assert caught.value.reason == reason


@pytest.mark.parametrize("where", ["", " WHERE id = 3", " WHERE id IN (3, 4)"])
def test_whole_rows_of_a_shard(loaded, where):
    topology = dss.Topology.from_dsns({n: loaded.dsns[n] for n in NAMES}, sharded=KEYS)
    sql = f"SELECT lk_o FROM lk_o{where}"
    expected = rows_of(sql, dss.collect(sql, loaded.reference))
    assert rows_of(sql, dss.collect(sql, topology, merge="global")) == expected
