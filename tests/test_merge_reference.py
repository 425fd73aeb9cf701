"""Reference tables that a topology names: a table that it does not know is not guessed about."""

from __future__ import annotations

import sqlite3

import duckdb
import pytest

import dask_shardsql as dss

TABLES = "CREATE TABLE rf_rows (id integer, k integer); CREATE TABLE rf_kinds (k integer); " \
    "CREATE TABLE rf_late (k integer); CREATE VIEW rf_both AS SELECT r.id FROM rf_rows r " \
    "JOIN rf_late l ON l.k = r.k"  # fmt: skip
KNOWN = {
    "SELECT CAST(count(*) AS integer) AS n FROM rf_rows": 6,
    "SELECT CAST(count(*) AS integer) AS n FROM rf_rows JOIN rf_kinds USING (k)": 6,
    "SELECT CAST(count(*) AS integer) AS n FROM rf_kinds": 3,
    "WITH rf_late AS (SELECT k FROM rf_kinds) "
    "SELECT CAST(count(*) AS integer) AS n FROM rf_late": 3,
}
UNKNOWN = [
    "SELECT CAST(count(*) AS integer) AS n FROM rf_late",
    "SELECT CAST(count(*) AS integer) AS n FROM rf_rows JOIN rf_late USING (k)",
    "SELECT CAST(count(*) AS integer) AS n FROM rf_both",
    "SELECT id FROM rf_rows WHERE EXISTS (SELECT 1 FROM rf_late)",
]


@pytest.fixture(scope="module", params=["postgresql", "sqlite", "duckdb"])
def dsns(request, servers, tmp_path_factory):
    directory = tmp_path_factory.mktemp("reference")
    if request.param == "postgresql":
        servers.execute(TABLES)
        servers.load("rf_rows", [(i, i % 3) for i in range(6)], shard_of=lambda row: row[0] % 2)
        for name in ("rf_kinds", "rf_late"):
            servers.load(name, [(k,) for k in range(3)])
        yield [servers.dsns[name] for name in ("s1", "s2")]
        servers.execute("DROP VIEW rf_both; DROP TABLE rf_rows, rf_kinds, rf_late")
        return
    connect = {"sqlite": sqlite3.connect, "duckdb": duckdb.connect}[request.param]
    for shard in range(2):
        connection = connect(str(directory / f"{shard}"))
        for statement in TABLES.split("; "):
            connection.execute(statement)
        for i in range(shard, 6, 2):
            connection.execute(f"INSERT INTO rf_rows VALUES ({i}, {i % 3})")
        for name in ("rf_kinds", "rf_late"):
            connection.execute(f"INSERT INTO {name} VALUES (0), (1), (2)")
        connection.commit()
        connection.close()
    yield [f"{request.param}:///{directory}/{shard}" for shard in range(2)]


@pytest.fixture(params=["rf_kinds", "schema.rf_kinds"])
def topology(request, dsns):
    schema = "public" if "host" in dsns[0] else "main"
    name = request.param.replace("schema", schema)
    if name.startswith("main.") and dsns[0].startswith("sqlite"):
        name = "rf_kinds"  # its tables have no schemas
    return dss.Topology.from_dsns(dsns, sharded={"rf_rows": "id"}, reference=[name])


@pytest.mark.parametrize("sql", KNOWN)
def test_tables_that_are_named(sql, topology):
    assert dss.collect(sql, topology, merge="global")["n"].to_pylist() == [KNOWN[sql]]


@pytest.mark.parametrize("sql", UNKNOWN)
def test_tables_that_are_not_named(sql, topology, dsns):
    with pytest.raises(dss.MergeRefusedError, match=r"rf_late.*names 'rf_rows', '.*rf_kinds'") as e:
        dss.collect(sql, topology, merge="global")
    assert e.value.reason == "unknown-table"
    assert dss.explain(sql, topology, merge="global").reason == "unknown-table"
    all_known = dss.Topology.from_dsns(dsns, sharded={"rf_rows": "id"})
    assert dss.collect(sql, all_known, merge="global").num_rows in (1, 6)


def test_it_is_a_part_of_the_topology(tmp_path):
    file = tmp_path / "shards.toml"
    file.write_text('reference = ["kinds"]\n[sharded]\nrows = "id"\n[[shards]]\nname = "a"\n')
    named = dss.Topology.from_toml(file)
    assert named.reference == ("kinds",)
    assert named.fingerprint != dss.Topology.from_mapping({"shards": {"a": {}}}).fingerprint
    assert "reference=['kinds']" in repr(named)


@pytest.mark.parametrize("wrong", ["kinds", [1], [""], {"kinds": 1}])
def test_what_is_no_list_of_names(wrong):
    with pytest.raises(dss.TopologyError, match="list of tables' names"):
        dss.Topology.from_dsns(["host=a"], reference=wrong)


def test_one_table_is_not_both():
    with pytest.raises(dss.TopologyError, match="'t' is named as sharded, and as a reference"):
        dss.Topology.from_dsns(["host=a"], sharded={"t": "k"}, reference=["t"])
