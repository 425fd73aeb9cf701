"""merge="global" in a database that is no shard."""

from __future__ import annotations

import dask
import pytest

import dask_shardsql as dss
from dask_shardsql.engine.registry import pack, unpack

SCHEMA = """
CREATE TABLE el_orders (id int8 NOT NULL, cust int4, total numeric(12,2), kind text);
CREATE TABLE el_kinds (kind text, w int4);
CREATE VIEW el_big AS SELECT * FROM el_orders WHERE total > 50;
"""
SHARDS = ("s1", "s2", "s3")
ELSEWHERE = "s7"  # which has rows of its own, that are no part of any answer
QUERIES = [
    ("SELECT kind, count(*) AS n, avg(total) AS a FROM el_orders GROUP BY 1", "merge"),
    ("SELECT id, total FROM el_orders ORDER BY total DESC, id LIMIT 7", "merge"),
    ("SELECT k.w, count(*) AS n FROM el_big JOIN el_kinds k USING (kind) GROUP BY 1", "merge"),
    ("SELECT a.id, b.id AS other FROM el_orders a JOIN el_orders b ON a.cust = b.id", "gather"),
    ("SELECT id, age(current_date) < '1 day' AS t FROM el_orders", "gather"),
    ("SELECT id, total FROM el_orders WHERE cust > 5", "union"),
    ("SELECT kind, w FROM el_kinds", "direct"),
    ("SELECT count(*) AS n FROM el_orders WHERE kind = (SELECT min(kind) FROM el_kinds)", "merge"),
    ("SELECT DISTINCT now() - now() AS t FROM el_orders", "merge"),
]


@pytest.fixture(scope="module")
def loaded(servers):
    servers.execute(SCHEMA)
    rows = [(i, i * 7 % 60, i / 4, "abc"[i % 3]) for i in range(300)]
    servers.load("el_orders", rows, shard_of=lambda row: row[0] % 3)
    servers.load("el_kinds", [(kind, w) for w, kind in enumerate("abc")])
    with servers.session(ELSEWHERE) as cursor:
        cursor.execute("INSERT INTO el_orders SELECT -n, n, 99, 'a' FROM generate_series(1, 50) n")
    yield servers
    servers.execute("DROP VIEW el_big; DROP TABLE el_orders, el_kinds")


def topology_of(loaded, **options):
    options = {"sharded": {"el_orders": "id"}, "merge_dsn": loaded.dsns[ELSEWHERE], **options}
    return dss.Topology.from_dsns({name: loaded.dsns[name] for name in SHARDS}, **options)


def rows_of(table):
    return sorted(map(repr, table.to_pylist()))


@pytest.mark.parametrize("function", [False, True])
@pytest.mark.parametrize(("sql", "strategy"), QUERIES)
def test_answers(sql, strategy, function, loaded):
    key = {"key": "id", "function": "modulo"} if function else "id"
    topology = topology_of(loaded, sharded={"el_orders": key})
    expected = dss.collect(sql, loaded.reference)
    found = dss.collect(sql, topology, merge="global")
    assert found.schema == expected.schema
    assert rows_of(found) == rows_of(expected)
    how = dss.explain(sql, topology, merge="global")
    assert how.strategy == strategy
    is_read_there = strategy in ("merge", "gather") or how.reason == "reference-tables"
    assert ("merge" in how.shards) == is_read_there


@pytest.mark.parametrize("scheduler", ["threads", "processes"])
def test_lazily(scheduler, loaded):
    topology = topology_of(loaded)
    ddf = dss.read_sharded_sql("SELECT sum(total) AS s FROM el_orders", topology, merge="global")
    with dask.config.set(scheduler=scheduler):
        assert str(ddf.compute().s[0]).rstrip("0").rstrip(".") == "11212.5"


def test_what_is_measured_is_of_the_shards(loaded):
    how = dss.explain(QUERIES[0][0], topology_of(loaded), merge="global", analyze=True)
    assert {one["shard"] for one in how.actual if one["part"] == "partial"} == set(SHARDS)
    assert {one["shard"] for one in how.actual if one["part"] == "answer"} == {"merge"}


def test_logins_of_the_shards_need_no_temporary_tables(loaded):
    """They may be standbys, then, or accounts that may only read."""
    loaded.execute(
        "CREATE ROLE el_reader LOGIN PASSWORD 'pw-el'; GRANT SELECT ON el_orders, el_kinds "
        "TO el_reader; REVOKE TEMPORARY ON DATABASE postgres FROM PUBLIC"
    )
    try:
        login = " user=el_reader password=pw-el"
        dsns = {name: loaded.dsns[name] + login for name in SHARDS}
        sharded = {"el_orders": "id"}
        with pytest.raises(dss.MergeRefusedError, match=r"merge_dsn|\[merge\]") as caught:
            dss.collect(
                QUERIES[0][0], dss.Topology.from_dsns(dsns, sharded=sharded), merge="global"
            )
        assert caught.value.reason == "temporary-table"
        elsewhere = loaded.dsns[ELSEWHERE]
        topology = dss.Topology.from_dsns(dsns, sharded=sharded, merge_dsn=elsewhere)
        for sql, _ in QUERIES:
            if "el_big" not in sql:
                found = dss.collect(sql, topology, merge="global")
                assert rows_of(found) == rows_of(dss.collect(sql, loaded.reference))
    finally:
        loaded.execute(
            "GRANT TEMPORARY ON DATABASE postgres TO PUBLIC; "
            "DROP OWNED BY el_reader; DROP ROLE el_reader"
        )


def test_errors_call_it_merge(loaded):
    with loaded.session(ELSEWHERE) as cursor:
        cursor.execute("ALTER TABLE el_kinds RENAME TO el_other")
    try:
        with pytest.raises(dss.QueryError, match="shard 'merge'.*el_kinds"):
            dss.collect(QUERIES[2][0], topology_of(loaded), merge="global")
    finally:
        with loaded.session(ELSEWHERE) as cursor:
            cursor.execute("ALTER TABLE el_other RENAME TO el_kinds")
    nowhere = "host=127.0.0.1 port=1 user=u password=pw-nowhere dbname=d"
    with pytest.raises(dss.ConnectionFailedError, match="'merge'") as caught:
        dss.collect(QUERIES[0][0], topology_of(loaded, merge_dsn=nowhere), merge="global")
    assert "pw-nowhere" not in str(caught.value)


def test_other_types_are_refused(loaded):
    with loaded.session(ELSEWHERE) as cursor:
        cursor.execute("DROP VIEW el_big; ALTER TABLE el_orders ALTER cust TYPE int8")
    try:
        with pytest.raises(dss.SchemaMismatchError, match="'cust'"):
            dss.collect("SELECT sum(cust) FROM el_orders", topology_of(loaded), merge="global")
    finally:
        with loaded.session(ELSEWHERE) as cursor:
            cursor.execute(
                "ALTER TABLE el_orders ALTER cust TYPE int4; "
                "CREATE VIEW el_big AS SELECT * FROM el_orders WHERE total > 50"
            )


def test_it_is_a_part_of_the_topology(loaded, tmp_path):
    plain, topology = topology_of(loaded, merge_dsn=None), topology_of(loaded)
    assert plain.fingerprint != topology.fingerprint
    assert unpack(pack(topology)) == topology
    assert unpack(pack(plain)) == plain
    assert "merging at 127.0.0.1" in repr(topology)
    assert "merging" not in repr(plain)
    file = tmp_path / "shards.toml"
    file.write_text(
        '[defaults]\nuser = "u"\ndbname = "d"\n[merge]\nhost = "m"\n[[shards]]\nname = "a"\n'
    )
    assert dss.Topology.from_toml(file).merging == dss.Server.from_dsn("host=m user=u dbname=d")
    file.write_text('[merge]\npassword = "p"\n[[shards]]\nname = "a"\n')
    file.chmod(0o644)
    with pytest.raises(dss.TopologyError, match="chmod 600"):
        dss.Topology.from_toml(file)


@pytest.mark.parametrize(
    ("merge", "message"),
    [({"hots": "m"}, r"\[merge\] of mapping: unknown key 'hots'"), ("host=m", "must be a table")],
)
def test_bad_descriptions(merge, message):
    with pytest.raises(dss.TopologyError, match=message):
        dss.Topology.from_mapping({"shards": {"a": {"host": "a"}}, "merge": merge})


def test_no_shard_has_its_name():
    with pytest.raises(dss.TopologyError, match="cannot be named 'merge'"):
        dss.Topology.from_dsns({"merge": "host=a"}, merge_dsn="host=b")
    alone = dss.Topology.from_dsns({"merge": "host=a"})
    assert alone.server_of("merge") == alone.shards[0].primary
    with pytest.raises(dss.TopologyError, match="no shard is named 'merge'"):
        dss.Topology.from_dsns({"a": "host=a"}).server_of("merge")
    with pytest.raises(dss.TopologyError, match="no shard is named 'merge'"):
        dss.Topology.from_dsns({"a": "host=a"}, merge_dsn="host=b").shard("merge")


def test_other_databases_merge_in_memory(tmp_path):
    (tmp_path / "a").touch()
    dsn = f"sqlite:///{tmp_path}/a"
    topology = dss.Topology.from_dsns([dsn, dsn], sharded={"t": "k"}, merge_dsn="sqlite:///b")
    with pytest.raises(dss.ConfigurationError, match="in memory"):
        dss.collect("SELECT 1 AS one", topology, merge="global")


@pytest.mark.parametrize(("shard", "merge"), [("host=a", "sqlite:///b"), ("sqlite:///a", "host=b")])
def test_a_database_of_another_kind_cannot_merge(shard, merge):
    with pytest.raises(dss.TopologyError, match="'(sqlite|postgresql)', and shard 's1' of "):
        dss.Topology.from_dsns([shard], sharded={"t": "k"}, merge_dsn=merge)
    both = {"shards": {"a": {"dsn": shard}}, "merge": {"dsn": merge}}
    with pytest.raises(dss.TopologyError, match="one of the shards' own kind"):
        dss.Topology.from_mapping(both)
