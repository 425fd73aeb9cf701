"""What compute() of a whole read gives: the partitions as one DataFrame, as dask would make it."""

from __future__ import annotations

import pickle

import dask
import pandas as pd
import pyarrow as pa
import pytest
from distributed import Client, LocalCluster

import dask_shardsql as dss
from dask_shardsql.frame import whole

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


def test_on_a_cluster_it_arrives_as_a_plain_dataframe(topology):
    ddf = dss.read_sharded_sql(SQL, topology)
    expected = concatenated(ddf)
    with (
        LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=":0") as cluster,
        Client(cluster) as client,
    ):
        found = ddf.compute()
        assert type(found) is pd.DataFrame
        pd.testing.assert_frame_equal(found, expected)
        future = client.compute(ddf)
        assert client.submit(len, future).result() == len(expected)
        assert (
            client.submit(lambda frame: int(frame.id.sum()), future).result() == expected.id.sum()
        )


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
