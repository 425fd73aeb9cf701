"""merge="global" over shards whose schemas have drifted apart: right all the same, or refused."""

from __future__ import annotations

import psycopg2
import pytest
from one_database import rows_of

import dask_shardsql as dss
from dask_shardsql.engine import pools

SCHEMA = """
CREATE TABLE dr_o (id int8 NOT NULL, n int4, note text);
CREATE TABLE dr_ref (w int4, label text);
CREATE VIEW dr_some AS SELECT id, n FROM dr_o WHERE n > 1;
CREATE VIEW dr_labels AS SELECT w, label FROM dr_ref WHERE w > 0;
"""
DROP = "DROP TABLE dr_o, dr_ref CASCADE; DROP TABLE IF EXISTS dr_labels"
NAMES = ["s1", "s2"]
KEYS = {"dr_o": {"key": "id", "function": "modulo", "shards": NAMES}}


@pytest.fixture
def loaded(servers):
    servers.execute(SCHEMA)
    servers.load("dr_o", [(n, n % 4, "abc"[n % 3]) for n in range(20)], shard_of=lambda r: r[0] % 2)
    servers.load("dr_ref", [(n, f"w{n}") for n in range(4)])
    yield servers
    pools.close_all()
    servers.execute(DROP)


@pytest.fixture
def topology(loaded):
    return dss.Topology.from_dsns({n: loaded.dsns[n] for n in NAMES}, sharded=KEYS)


def change(servers, shard, sql):
    with psycopg2.connect(servers.dsns[shard]) as connection, connection.cursor() as cursor:
        cursor.execute(sql)
    connection.close()


# an extra column on one shard: no name of the query may come to mean it
@pytest.mark.parametrize("shard", NAMES)
@pytest.mark.parametrize(
    ("changes", "sql"),
    [
        ("ALTER TABLE dr_ref ADD note text DEFAULT 'x'", "SELECT * FROM dr_o NATURAL JOIN dr_ref"),
        (
            "ALTER TABLE dr_ref ADD n int4 DEFAULT 77",
            "SELECT id FROM dr_o WHERE EXISTS (SELECT FROM dr_ref WHERE w = n)",
        ),
        (
            "ALTER TABLE dr_ref ADD n int4 DEFAULT 77",
            "SELECT count(*) FROM dr_o WHERE EXISTS (SELECT FROM dr_ref WHERE w = n)",
        ),
        ("ALTER TABLE dr_o ADD label text DEFAULT 'x'", "SELECT * FROM dr_o NATURAL JOIN dr_ref"),
        ("ALTER TABLE dr_o ADD w int4", "SELECT id, w FROM dr_o JOIN dr_ref ON n = w"),
        ("ALTER TABLE dr_o ADD w int4", "SELECT id, w FROM dr_o JOIN dr_ref ON n = w WHERE id = 3"),
        ("ALTER TABLE dr_o ADD w int4", "SELECT id, w FROM dr_o JOIN dr_ref ON n = w WHERE id = 4"),
        (
            "ALTER TABLE dr_ref ADD id int4",
            "SELECT max(id), w FROM dr_o JOIN dr_ref ON true GROUP BY w",
        ),
    ],
)
def test_an_extra_column_on_one_shard_is_not_seen(loaded, topology, shard, changes, sql):
    expected = rows_of(sql, dss.collect(sql, loaded.reference))
    assert rows_of(sql, dss.collect(sql, topology, merge="global")) == expected
    change(loaded, shard, changes)
    for text in (sql, f"{sql} -- another shard merges", f"{sql} /* and */ "):
        try:
            found = dss.collect(text, topology, merge="global")
        except (dss.QueryError, dss.SchemaMismatchError) as error:
            message = error.message  # the shard that the others are compared with may be that one
        else:
            message = ""
            assert rows_of(sql, found) == expected
        assert not message or any(word in message for word in ("ambiguous", "no column", "columns"))


REORDERED = (
    "ALTER TABLE dr_o RENAME TO dr_old; CREATE TABLE dr_o (id int8 NOT NULL, note text, n int4); "
    "INSERT INTO dr_o SELECT id, note, n FROM dr_old; DROP TABLE dr_old CASCADE"
)
OTHER_VIEW = "CREATE OR REPLACE VIEW dr_some AS SELECT id, n FROM dr_o WHERE n > 2"
OTHER_LABELS = "CREATE OR REPLACE VIEW dr_labels AS SELECT w, label FROM dr_ref WHERE w > 1"
NO_VIEW = "DROP VIEW dr_labels; CREATE TABLE dr_labels (w int4, label text)"


@pytest.mark.parametrize("shard", NAMES)
@pytest.mark.parametrize(
    ("changes", "sql", "match"),
    [
        (REORDERED, "SELECT id, dr_o::text FROM dr_o", "whole rows"),
        (REORDERED, "SELECT dr_o::text FROM dr_o WHERE id IN (4, 5)", "whole rows"),
        (
            "ALTER TABLE dr_ref ADD x int4",
            "SELECT id, dr_ref::text FROM dr_o, dr_ref",
            "whole rows|'x'",
        ),
        (OTHER_VIEW, "SELECT id FROM dr_some", "dr_some"),
        (OTHER_VIEW, "SELECT count(*) FROM dr_some", "dr_some"),
        (OTHER_VIEW, "SELECT a.id FROM dr_some a JOIN dr_some b ON a.n = b.n", "dr_some"),
        (OTHER_VIEW, "SELECT id, random() < 2 FROM dr_some", "dr_some"),
        (OTHER_LABELS, "SELECT id, label FROM dr_o JOIN dr_labels ON w = n", "dr_labels"),
        (OTHER_LABELS, "SELECT count(label) FROM dr_o JOIN dr_labels ON w = n", "dr_labels"),
        (NO_VIEW, "SELECT count(label) FROM dr_o JOIN dr_labels ON w = n", "dr_labels"),
        (
            "ALTER TABLE dr_ref ALTER w TYPE int8",
            "SELECT id, label FROM dr_o JOIN dr_ref ON w = n",
            "'w' of .*dr_ref",
        ),
    ],
)
def test_what_is_defined_otherwise_is_refused(loaded, topology, shard, changes, sql, match):
    dss.collect(sql, topology, merge="global")
    if "dr_ref ALTER" in changes:
        changes = f"DROP VIEW dr_labels; {changes}"
    change(loaded, shard, changes)
    for text in (sql, f"{sql} -- another shard merges", f"{sql} /* and */ "):
        with pytest.raises(dss.SchemaMismatchError, match=match):
            dss.collect(text, topology, merge="global")


def test_a_difference_on_shards_that_are_not_read_does_not_matter(loaded, topology):
    sql = "SELECT id, n FROM dr_some WHERE id = 3"
    change(loaded, "s1", OTHER_VIEW)  # which has the even ones
    for text in (sql, f"{sql} -- another shard", f"{sql} /* and */ "):
        try:
            found = dss.collect(text, topology, merge="global").to_pylist()
        except dss.SchemaMismatchError as error:
            found = error.shard
        # where it was understood by the other one, it is compared with that
        assert found in ([{"id": 3, "n": 3}], "s2")


def test_a_shard_that_is_down_is_missed_by_those_queries_only_that_read_it(loaded):
    down = "postgresql://nobody@127.0.0.1:1/none"
    dsns = {"s1": loaded.dsns["s1"], "s2": loaded.dsns["s2"], "s3": down}
    of_three = {"dr_o": {"key": "id", "function": "modulo", "shards": [*dsns, "s1"]}}
    topology = dss.Topology.from_dsns(dsns, sharded=of_three)
    for comment in ("", " -- one", " -- two", " -- three", " -- four"):  # which others are asked by
        sql = f"SELECT id, n FROM dr_o WHERE id IN (4, 8){comment}"
        assert len(dss.collect(sql, topology, merge="global")) == 2
        assert len(dss.read_sharded_sql(sql, topology, merge="global").compute()) == 2
        counted = f"SELECT count(*) AS n FROM dr_o WHERE id IN (4, 5){comment}"
        assert dss.collect(counted, topology, merge="global").to_pylist() == [{"n": 2}]
        whole = f"SELECT count(*) AS n FROM dr_ref{comment}"
        assert dss.collect(whole, topology, merge="global").to_pylist() == [{"n": 4}]
        for wanted in ("id = 6", "n = 1"):
            sql = f"SELECT id FROM dr_o WHERE {wanted}{comment}"
            with pytest.raises(dss.ConnectionFailedError, match="s3") as caught:
                dss.collect(sql, topology, merge="global")
            assert caught.value.shard == "s3"
    away = dss.Topology.from_dsns(dict.fromkeys(["a", "b"], down), sharded={"dr_o": "id"})
    with pytest.raises(dss.ConnectionFailedError, match="and 1 more of 2 shards"):
        dss.collect("SELECT count(*) FROM dr_o", away, merge="global")
