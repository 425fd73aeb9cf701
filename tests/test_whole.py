"""What compute() of a whole read gives: the partitions as one DataFrame, as dask would make it."""

from __future__ import annotations

import pickle
import time
import uuid
from contextlib import nullcontext

import dask
import dask.dataframe as dd
import pandas as pd
import pyarrow as pa
import pytest
from dask.dataframe.dask_expr._collection import new_collection
from dask.tokenize import tokenize
from distributed import Client, LocalCluster, wait
from sessions import LARGE, interrupt_when, own_shards, transactions, wait_until

import dask_shardsql as dss
from dask_shardsql import union
from dask_shardsql.engine import shared_memory
from dask_shardsql.frame import collection, whole

SQL = (
    "SELECT g AS id, g % 7 = 0 AS seventh, CASE WHEN g % 3 > 0 THEN 'é' || g END AS text, "
    "(g / 8.0)::numeric(12,3) AS amount, ARRAY[g, NULL] AS items, "
    "make_interval(days => g) AS lapse, inet_server_port() AS port "
    "FROM generate_series(1, 100 + inet_server_port() % 50) g"
)


def concatenated(ddf):
    """The same by pandas' own concatenation of the partitions."""
    return pd.concat(dask.compute(*ddf.to_delayed(), scheduler="threads"))


@pytest.mark.parametrize("backend", ["pyarrow", "numpy_nullable", "numpy"])
def test_it_is_the_concatenation_of_the_partitions(topology, backend):
    ddf = dss.read_sharded_sql(SQL, topology, dtype_backend=backend, shard_column="shard")
    found = ddf.compute()
    assert type(found) is pd.DataFrame
    pd.testing.assert_frame_equal(found, concatenated(ddf))


def test_of_some_partitions_of_one_and_of_none(topology):
    ddf = dss.read_sharded_sql(SQL, topology)
    for some in (ddf.partitions[1:3], ddf.partitions[[3, 0]], ddf.partitions[2]):
        pd.testing.assert_frame_equal(some.compute(), concatenated(some))
    nothing = dss.read_sharded_sql(f"SELECT * FROM ({SQL}) q WHERE false", topology)
    assert nothing.compute().dtypes.equals(nothing.dtypes)
    assert len(nothing.compute()) == 0


def test_together_with_others(topology):
    ddf = dss.read_sharded_sql(SQL, topology)
    rows, total, some = dask.compute(ddf, ddf.id.sum(), ddf[ddf.seventh])
    assert int(rows.id.sum()) == total
    assert len(some) == int(rows.seventh.sum())


def test_of_slices(servers, topology, table_name):
    servers.execute(
        f"CREATE TABLE {table_name} AS SELECT g AS id, repeat('x', 500) AS pad "
        "FROM generate_series(1, 2000) g"
    )
    whole_topology = dss.Topology.from_dsns({s.name: servers.dsns[s.name] for s in topology.shards})
    ddf = dss.read_sharded_table(table_name, whole_topology, partitions_per_shard=3)
    assert ddf.npartitions == 12
    assert sorted(ddf.compute().id) == sorted([*range(1, 2001)] * 4)
    assert 0 < len(ddf.partitions[:2].compute()) < 2000


@pytest.fixture(scope="module")
def client():
    with (
        LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=":0") as cluster,
        Client(cluster) as client,
    ):
        yield client


@pytest.fixture
def gathered(monkeypatch):
    """With what compute() gathered the shards' tables, each time it did."""
    calls = []
    read = collection.read_tables
    monkeypatch.setattr(collection, "read_tables", lambda *a, **o: calls.append(o) or read(*a, **o))
    return calls


@pytest.mark.parametrize("backend", ["pyarrow", "numpy_nullable", "numpy"])
def test_on_a_cluster_it_is_the_concatenation_too(topology, backend, client, gathered):
    ddf = dss.read_sharded_sql(SQL, topology, dtype_backend=backend, shard_column="shard")
    found = ddf.compute()
    assert type(found) is pd.DataFrame
    pd.testing.assert_frame_equal(found, concatenated(ddf))
    pd.testing.assert_frame_equal(ddf.compute(scheduler="threads"), found)
    assert len(gathered) == 1


@pytest.mark.parametrize("through", ["memory", "scheduler"])
def test_large_partitions_and_slices_on_a_cluster(topology, through, client, monkeypatch):
    if through == "scheduler":
        monkeypatch.setattr(union, "offered_memory", nullcontext)
    ddf = dss.read_sharded_sql(LARGE, topology)
    found = ddf.compute()
    pd.testing.assert_frame_equal(found, concatenated(ddf))
    found.iloc[0, 0] = 7  # it is the user's own
    assert ddf.compute().iloc[0, 0] == 1
    split = {"partitions_per_shard": 2, "partition_by": "id"}
    ddf = dss.read_sharded_sql(LARGE, topology, **split)
    assert ddf.npartitions == 8
    found = ddf.compute().sort_values("id").reset_index(drop=True)
    pd.testing.assert_frame_equal(found, concatenated(ddf).sort_values("id", ignore_index=True))


def test_memory_that_is_lost_on_a_cluster_is_read_again(topology, client, monkeypatch):
    lost = []

    def received(result):
        lost.append(1)
        return None if len(lost) == 2 else shared_memory.received(result)

    monkeypatch.setattr(union, "received", received)
    ddf = dss.read_sharded_sql(LARGE, topology)
    pd.testing.assert_frame_equal(ddf.compute(), concatenated(ddf))
    assert len(lost) == 5


def test_what_compute_is_given_reaches_dask(topology, client, gathered):
    ddf = dss.read_sharded_sql("SELECT 1 AS a", topology)
    assert len(ddf.compute(retries=2, priority=3, scheduler=client)) == 4
    assert gathered == [{"retries": 2, "priority": 3}]
    assert len(ddf.compute(optimize_graph=False)) == 4


def test_an_error_on_a_cluster_is_one_and_ends_no_later_run(servers, topology, client, table_name):
    servers.execute(f"CREATE TABLE {table_name} (n int4)")
    ddf = dss.read_sharded_sql(f"SELECT 1 / (SELECT max(n) FROM {table_name}) AS v", topology)
    servers.execute(f"INSERT INTO {table_name} VALUES (0)")
    for _ in range(2):
        with pytest.raises(dss.QueryError, match="division by zero") as caught:
            ddf.compute()
        assert caught.value.shard
    servers.execute(f"UPDATE {table_name} SET n = 1")
    assert ddf.compute().v.tolist() == [1] * 4


def test_what_a_named_snapshot_holds_is_what_compute_gives(servers, topology, client, table_name):
    servers.execute(f"CREATE TABLE {table_name} AS SELECT 1 AS id")
    sql, name = f"SELECT id FROM {table_name}", uuid.uuid4().hex

    def read():
        return dss.read_sharded_sql(sql, topology, snapshot=name)

    kept = read().persist()
    wait(kept)
    servers.execute(f"INSERT INTO {table_name} VALUES (2)")
    assert len(read()) == len(read().compute()) == len(dask.compute(read())[0]) == 4
    del kept
    assert len(dss.read_sharded_sql(sql, topology).compute()) == 8


def test_ctrl_c_in_compute_on_a_cluster_stops_the_servers(servers, client):
    topology = own_shards(servers)
    ddf = dss.read_sharded_sql("SELECT pg_sleep(60)::text AS s", topology)
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt), interrupt_when(lambda: transactions(servers)):
        ddf.compute()
    wait_until(lambda: not transactions(servers), 10)
    assert time.monotonic() - started < 30


def test_what_is_made_of_it_is_dasks_own(topology, client, gathered):
    ddf = dss.read_sharded_sql(SQL, topology)
    plain = new_collection(ddf.expr)
    assert isinstance(ddf, dd.DataFrame)
    assert type(plain) is dd.DataFrame
    assert tokenize(ddf) == tokenize(plain)
    assert repr(ddf) == repr(plain)
    expected = concatenated(ddf)
    copied = pickle.loads(pickle.dumps(ddf))  # noqa: S301
    for same in (plain, copied, ddf.partitions[:], ddf.persist()):
        pd.testing.assert_frame_equal(same.compute(), expected)
    filtered = ddf[ddf.seventh].compute().reset_index(drop=True)  # by the servers
    pd.testing.assert_frame_equal(filtered, expected[expected.seventh].reset_index(drop=True))
    assert not gathered
    ddf["twice"] = ddf.id * 2
    pd.testing.assert_frame_equal(ddf.compute(), expected.assign(twice=expected.id * 2))
    assert not gathered


def test_on_a_cluster_the_joined_frame_of_dask_arrives_as_a_plain_one(topology, client):
    ddf = dss.read_sharded_sql(SQL, topology)
    expected = concatenated(ddf)
    (found,) = dask.compute(ddf)
    assert type(found) is pd.DataFrame
    pd.testing.assert_frame_equal(found, expected)
    future = client.compute(ddf)
    assert client.submit(len, future).result() == len(expected)
    assert client.submit(lambda frame: int(frame.id.sum()), future).result() == expected.id.sum()


def test_what_was_changed_since_is_pickled_as_it_is(topology, monkeypatch):
    monkeypatch.setattr(whole, "current_worker", object)
    answer = dss.read_sharded_sql("SELECT 1 AS a, 'x' AS b", topology).expr.operand("answer")
    table = pa.table({"a": pa.array([1, 2], pa.int32()), "b": ["x", "y"]})

    def fresh():
        return whole.join([whole.Parcel(table), whole.Parcel(table)], answer)

    def same(frame):
        found = pickle.loads(pickle.dumps(frame))  # noqa: S301
        assert type(found) is pd.DataFrame
        pd.testing.assert_frame_equal(found, pd.DataFrame(frame))

    same(fresh())
    frame = fresh()
    frame["a"] = frame["a"] + 1
    same(frame)
    frame = fresh()
    frame.iloc[0, 0] = 7
    same(frame)
    frame = fresh()
    frame["c"] = 1
    same(frame)
    frame = fresh()
    frame.index = [3, 2, 1, 0]
    same(frame)
    same(fresh().rename(columns={"a": "z"}))
    same(fresh().iloc[:3])
