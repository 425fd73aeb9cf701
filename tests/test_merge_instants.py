"""One instant for all shards: what asks for the time, with merge="global"."""

from __future__ import annotations

import datetime

import pytest

import dask_shardsql as dss
from dask_shardsql.sql.instants import with_one_instant

SCHEMA = """
CREATE TABLE nw_log (id int8 NOT NULL, at timestamptz, note text);
CREATE TABLE nw_kinds (note text, w int4);
CREATE VIEW nw_recent AS SELECT id, at, now() AS seen FROM nw_log WHERE at > now() - interval '1 d';
"""
NOW = datetime.datetime.now(datetime.UTC)


@pytest.fixture(scope="module")
def loaded(servers):
    servers.execute(SCHEMA)
    servers.load("nw_kinds", [("a", 1), ("b", 2)])
    rows = [(i, NOW - datetime.timedelta(hours=i), "ab"[i % 2]) for i in range(100)]
    servers.load("nw_log", rows, shard_of=lambda row: row[0] % 3)
    yield servers
    servers.execute("DROP VIEW nw_recent; DROP TABLE nw_log, nw_kinds")


@pytest.fixture
def topology(loaded):
    shards = {name: loaded.dsns[name] for name in list(loaded.dsns)[:4]}
    return dss.Topology.from_dsns(shards, sharded={"nw_log": "id"})


@pytest.mark.parametrize(
    "instant",
    [
        "now()",
        "transaction_timestamp()",
        "statement_timestamp()",
        "CURRENT_TIMESTAMP",
        "current_timestamp(4)",
        "localtimestamp",
        "LOCALTIMESTAMP(5)",
        "current_time",
        "localtime(6)",
        "now()::timestamp",
        "pg_catalog.now()",
    ],
)
def test_all_shards_have_one_instant(instant, topology, loaded):
    sql = f"SELECT DISTINCT {instant} AS t FROM nw_log"
    how = dss.explain(sql, topology, merge="global")
    assert how.strategy == "merge"
    found = dss.collect(sql, topology, merge="global")
    assert found.num_rows == 1
    assert found.schema == dss.collect(sql, loaded.reference).schema


@pytest.mark.parametrize(
    ("sql", "strategy"),
    [
        ("SELECT id, note FROM nw_log WHERE at > now() - interval '36 hours 30 min'", "merge"),
        ("SELECT count(*) AS n FROM nw_log WHERE at >= current_date - 40", "merge"),
        ("SELECT note, min(date_trunc('day', now()) - at) AS d FROM nw_log GROUP BY 1", "merge"),
        ("SELECT count(*) AS n FROM nw_recent", "merge"),
        ("SELECT count(*) AS n, count(DISTINCT seen) AS one FROM nw_recent", "merge"),
        ("SELECT k.w, count(*) AS n FROM nw_log JOIN nw_kinds k USING (note) "
         "WHERE at + interval '12 hours 30 min' > now() GROUP BY 1", "merge"),
        ("SELECT id, row_number() OVER (ORDER BY at) AS r FROM nw_log "
         "WHERE at < CURRENT_TIMESTAMP - interval '80 hours 30 min'", "merge"),
        ("SELECT a.id FROM nw_log a JOIN nw_log b ON a.at = b.at + interval '3 hours' "
         "WHERE b.at > now() - interval '9 hours 30 min'", "gather"),
        ("SELECT id, 'now()' AS t, note AS \"CURRENT_DATE\" FROM nw_log WHERE at < now() "
         "AND note <> 'CURRENT_TIME'", "merge"),
        ("SELECT id, age(at) < interval '1000 years' AS t FROM nw_log", "gather"),
        ("SELECT count(*) AS n FROM nw_log, now() WHERE at < now", "gather"),
    ],
)  # fmt: skip
def test_conditions_on_the_time_are_met_on_the_shards(sql, strategy, topology, loaded):
    expected = dss.collect(sql, loaded.reference)
    found = dss.collect(sql, topology, merge="global")
    assert found.schema == expected.schema
    assert sorted(map(repr, found.to_pylist())) == sorted(map(repr, expected.to_pylist()))
    assert dss.explain(sql, topology, merge="global").strategy == strategy


def test_the_instant_is_when_a_lazy_query_runs(topology):
    ddf = dss.read_sharded_sql("SELECT now() AS t FROM nw_log", topology, merge="global")
    first, second = ddf.compute(), ddf.compute()
    assert first.t.nunique() == second.t.nunique() == 1
    assert first.t.iloc[0] < second.t.iloc[0]


def test_words_that_only_look_like_it():
    same = (
        """SELECT t.now, "now"(), mine.now(), 'now()', E'\\'CURRENT_DATE', "CURRENT_DATE" FROM t"""
    )
    assert with_one_instant(same) == same
