"""Shards behind any PEP 249 module: here sqlite3, psycopg2 and duckdb."""

from __future__ import annotations

import datetime as dt
import sqlite3
from decimal import Decimal

import duckdb
import psycopg2
import pyarrow as pa
import pytest

import dask_shardsql as dss
from dask_shardsql import (
    ColumnError,
    ConfigurationError,
    ConnectionFailedError,
    ConnectionLostError,
    CredentialError,
    ParameterError,
    QueryError,
    Server,
    Topology,
    UnrepresentableValueError,
)
from dask_shardsql.config import Settings
from dask_shardsql.engine.drivers.base import Query
from dask_shardsql.engine.drivers.dbapi import DBAPIDriver


def sqlite_entry(name, path):
    connect = {"module": "sqlite3", "database": str(path), "check_same_thread": False}
    return {"name": name, "driver": "dbapi", **connect}


@pytest.fixture
def topology(tmp_path):
    """Three files, read by sqlite3 through the dbapi driver; the middle one is empty."""
    shards = []
    for number, rows in enumerate([[(1, "a"), (2, None)], [], [(3, "c")]], start=1):
        path = tmp_path / f"s{number}.db"
        with sqlite3.connect(path) as connection:
            connection.execute("CREATE TABLE t (id INTEGER, label TEXT)")
            connection.executemany("INSERT INTO t VALUES (?, ?)", rows)
        connection.close()
        shards.append(sqlite_entry(f"s{number}", path))
    return Topology.from_mapping({"shards": shards})


@pytest.fixture
def postgres(servers):
    """One PostgreSQL shard, read by psycopg2 through the dbapi driver."""
    found = Server.from_dsn(servers.dsns["s1"])
    keywords = {key: secret.reveal() for key, secret in found.secrets} | dict(found.keywords)
    shard = {"name": "s1", "driver": "dbapi", "module": "psycopg2", **keywords}
    return Topology.from_mapping({"shards": [shard]})


TYPES = {"id": "int64", "label": "string"}


@pytest.mark.parametrize("scheduler", ["threads", "processes"])
def test_collect_reads_every_shard(topology, scheduler):
    table = dss.collect("SELECT * FROM t", topology, types=TYPES, scheduler=scheduler)
    assert table.to_pydict() == {"id": [1, 2, 3], "label": ["a", None, "c"]}
    assert table.schema.types == [pa.int64(), pa.string()]


@pytest.mark.parametrize("scheduler", ["threads", "processes"])
def test_dataframes_have_the_same_dtypes_on_every_shard(topology, scheduler):
    ddf = dss.read_sharded_sql("SELECT * FROM t WHERE id > ?", topology, (1,), types=TYPES)
    frame = ddf.compute(scheduler=scheduler)
    assert frame.id.tolist() == [2, 3]
    assert (ddf.partitions[1].compute(scheduler=scheduler).dtypes == frame.dtypes).all()


def test_a_column_without_a_type_is_named(topology):
    with pytest.raises(ColumnError, match="'id', 'label'") as caught:
        dss.collect("SELECT * FROM t", topology)
    assert caught.value.columns == ("id", "label")


def test_names_given_twice_are_refused(topology):
    types = {"id": "int64", "id:1": "int64"}  # as SQLite renames them in a subquery
    with pytest.raises(ColumnError, match="own name"):
        dss.collect("SELECT id, id FROM t", topology, types=types)


def test_types_of_psycopg2(postgres):
    sql = """SELECT 'x'::text AS t, 'y'::varchar(3) AS v, 1.5::numeric(6,2) AS n,
        12::numeric(18) AS i, '\\x00'::bytea AS b, timestamp '2024-01-01 02:03:04.5' AS ts"""
    table = dss.collect(sql, postgres)
    assert dict(zip(table.column_names, table.schema.types, strict=True)) == {
        "t": pa.string(),
        "v": pa.string(),
        "n": pa.decimal128(6, 2),
        "i": pa.int64(),
        "b": pa.binary(),
        "ts": pa.timestamp("us"),
    }
    assert table.to_pylist() == [
        {
            "t": "x",
            "v": "y",
            "n": Decimal("1.50"),
            "i": 12,
            "b": b"\0",
            "ts": dt.datetime(2024, 1, 1, 2, 3, 4, 500000),
        }
    ]
    assert dss.collect(f"SELECT * FROM ({sql}) s WHERE false", postgres).schema == table.schema


def test_a_value_that_does_not_fit_is_named(postgres):
    sql = "SELECT timestamptz '2024-01-01 00:00:00+00' AS at"
    with pytest.raises(UnrepresentableValueError) as caught:
        dss.collect(sql, postgres, types={"at": "timestamp[us]"})
    assert caught.value.column == "at"
    table = dss.collect(sql, postgres, types={"at": pa.timestamp("us", "UTC")})
    assert table["at"].to_pylist() == [dt.datetime(2024, 1, 1, tzinfo=dt.UTC)]


def test_nothing_stays_written(postgres, servers, table_name):
    dsn = servers.dsns["s1"]
    connection = psycopg2.connect(dsn)
    connection.autocommit = True
    cursor = connection.cursor()
    cursor.execute(f"CREATE TABLE {table_name} (id int)")
    # PostgreSQL allows no such statement in a subquery; a function can still write
    cursor.execute(
        f"CREATE FUNCTION f_{table_name}() RETURNS text LANGUAGE sql AS "
        f"$$INSERT INTO {table_name} VALUES (1) RETURNING 'written'$$"
    )
    table = dss.collect(f"SELECT f_{table_name}() AS x", postgres)
    assert table.to_pydict() == {"x": ["written"]}
    cursor.execute(f"SELECT count(*) FROM {table_name}")
    assert cursor.fetchone() == (0,)
    cursor.execute(f"DROP FUNCTION f_{table_name}; DROP TABLE {table_name}")
    connection.close()


def test_errors_keep_their_sqlstate(postgres):
    with pytest.raises(QueryError) as caught:
        dss.collect("SELECT 1 / 0 AS x", postgres, types={"x": "int64"})
    assert caught.value.sqlstate == "22012"
    with pytest.raises(QueryError, match="no_such_table") as caught:
        dss.collect("SELECT * FROM no_such_table", postgres)
    assert caught.value.sqlstate == "42P01"


def test_a_lost_connection_is_told_and_not_used_again(postgres):
    driver = DBAPIDriver()
    server = postgres.shards[0].primary
    session = driver.connect(server, None, Settings())
    killer = driver.connect(server, None, Settings())
    pid = session.connection.info.backend_pid
    killer.connection.cursor().execute("SELECT pg_terminate_backend(%s, 5000)", (pid,))
    with pytest.raises(ConnectionLostError):
        driver.read(session, Query("SELECT 'x'::text AS x"), tuple, lambda *_: None)
    assert not driver.is_usable(session)
    driver.close(killer)


@pytest.mark.parametrize("params", [(), (1, 2)])
@pytest.mark.parametrize(
    ("module", "mark"), [("sqlite3", "?"), ("duckdb", "?"), ("psycopg2", "%s")]
)
def test_parameters_that_do_not_fit(request, tmp_path, module, mark, params):
    if module == "psycopg2":
        topology = request.getfixturevalue("postgres")
    else:
        duckdb.connect(str(tmp_path / "x.duckdb")).close()
        name = "x.duckdb" if module == "duckdb" else "x.db"
        shard = sqlite_entry("s1", tmp_path / name) | {"module": module}
        if module == "duckdb":
            del shard["check_same_thread"]
        topology = Topology.from_mapping({"shards": [shard]})
    with pytest.raises(ParameterError, match=f"write {mark}".replace("?", r"\?")):
        dss.collect(f"SELECT CAST({mark} AS INTEGER) AS x", topology, params, types={"x": "int64"})


def test_placeholders_in_literals_and_comments_do_not_count(topology):
    sql = "SELECT id FROM t WHERE '?' <> ? /* ? */ AND nope = 1 -- ?"
    with pytest.raises(QueryError, match="nope") as caught:
        dss.collect(sql, topology, ("x",), types={"id": "int64"})
    assert not isinstance(caught.value, ParameterError)


@pytest.mark.parametrize(
    ("entry", "problem"),
    [
        ({}, "needs module"),
        ({"module": "no_such_module"}, "cannot import 'no_such_module'"),
        ({"module": "json"}, "not a module of PEP 249"),
        ({"module": "sqlite3", "database": "x.db", "colour": "red"}, "colour"),
    ],
)
def test_wrong_keywords(entry, problem):
    topology = Topology.from_mapping({"shards": [{"name": "s1", "driver": "dbapi", **entry}]})
    with pytest.raises((ConfigurationError, ConnectionFailedError), match=problem):
        dss.collect("SELECT 1 AS x", topology, types={"x": "int64"})


def test_passwords_are_passed_on_and_never_shown(servers, monkeypatch):
    found = Server.from_dsn(servers.dsns["s1"])
    password = dict(found.secrets)["password"].reveal()
    monkeypatch.setenv("SUITE_PASSWORD", password)
    shard = {"name": "s1", "driver": "dbapi", "module": "psycopg2", **dict(found.keywords)}
    shard["password_env"] = "SUITE_PASSWORD"
    topology = Topology.from_mapping({"shards": [shard]})
    assert dss.collect("SELECT 'x'::text AS x", topology).num_rows == 1
    assert password not in repr(topology.shards[0].primary)
    wrong = "quite another, and very secret"
    monkeypatch.setenv("SUITE_PASSWORD", wrong)
    other = Topology.from_mapping({"shards": [shard | {"connect_timeout": 5}]})
    with pytest.raises(ConnectionFailedError, match="authentication") as caught:
        dss.collect("SELECT 1 AS x", other)
    assert wrong not in str(caught.value)
    monkeypatch.delenv("SUITE_PASSWORD")
    with pytest.raises(CredentialError):
        dss.collect("SELECT 1 AS x", other)
