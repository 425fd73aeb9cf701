"""The same calls under a LocalCluster, and under a scheduler and workers of their own over TCP."""

from __future__ import annotations

import asyncio
import os
import pickle
import re
import subprocess
import sys
import textwrap
import time
from contextlib import ExitStack, contextmanager

import cloudpickle
import pytest
from distributed import Client, LocalCluster

import dask_shardsql as dss

SQL = "SELECT * FROM d_orders"


@pytest.fixture(scope="module", autouse=True)
def orders(servers):
    servers.execute("DROP TABLE IF EXISTS d_orders")
    servers.execute("CREATE TABLE d_orders (id int8, kind text, total numeric(12,2))")
    rows = [(i, f"k{i % 5}", i) for i in range(400)]
    servers.load("d_orders", rows, shard_of=lambda row: row[0] % 3)


@pytest.fixture(scope="module")
def local_cluster():
    with LocalCluster(
        n_workers=2, threads_per_worker=2, processes=True, dashboard_address=":0"
    ) as cluster:
        yield cluster


@contextmanager
def command(*words, ready, environment=None):
    """Run a dask command until the block ends; give what its log said when it was ready."""
    process = subprocess.Popen(
        [sys.executable, "-m", "dask", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, **(environment or {})},
    )
    try:
        for line in process.stdout:
            found = re.search(ready, line)
            if found:
                break
        else:
            raise AssertionError(f"{words} ended without {ready!r}")
        yield found[1]
    finally:
        process.terminate()
        process.communicate(timeout=30)


@contextmanager
def tcp_cluster(*, workers=2, environment=None, scheduler_environment=None):
    with ExitStack() as stack:
        address = stack.enter_context(
            command(
                *("scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard"),
                ready=r"Scheduler at:\s+(tcp://\S+)",
                environment=scheduler_environment,
            )
        )
        for _ in range(workers):
            stack.enter_context(
                command(
                    *("worker", address, "--nthreads", "2", "--no-dashboard"),
                    ready=r"Registered to:\s+(\S+)",
                    environment=environment,
                )
            )
        yield address


def check_the_calls(topology):
    table = dss.collect(SQL, topology, shard_column="shard")
    assert table.num_rows == 400
    assert set(table["shard"].to_pylist()) == {"s1", "s2", "s3"}
    ddf = dss.read_sharded_sql(SQL, topology)
    assert len(ddf) == 400
    assert ddf.groupby("kind").total.sum().compute()["k1"] == sum(range(1, 400, 5))
    assert ddf.groupby("kind").total.mean().compute()["k0"] == sum(range(0, 400, 5)) / 80
    with pytest.raises(dss.QueryError, match="'s1'.*\"nope\"") as caught:
        dss.collect("SELECT nope FROM d_orders", topology)
    assert caught.value.sqlstate == "42703"
    with pytest.raises(dss.QueryError, match="division by zero"):
        dss.collect("SELECT 1/(id-id) AS x FROM d_orders", topology)


def test_under_a_local_cluster(local_cluster, topology):
    with Client(local_cluster) as client:
        check_the_calls(topology)
        ddf = dss.read_sharded_sql(SQL, topology)
        future = client.compute(ddf.total.sum())
        assert future.result() == sum(range(400))
        persisted = ddf.persist()
        assert len(persisted) == 400


def test_under_a_scheduler_and_workers_started_as_commands(topology):
    with tcp_cluster() as address, Client(address) as client:
        assert len(client.scheduler_info()["workers"]) == 2
        check_the_calls(topology)
        ran = client.run(lambda: [name for name in sys.modules if name == "dask_shardsql"])
        assert all(ran.values())


def test_a_client_that_comes_after_the_dataframe_works_too(local_cluster, topology, servers):
    fresh = dss.Topology.from_dsns({s.name: servers.dsns[s.name] for s in topology.shards[:3]})
    ddf = dss.read_sharded_sql(SQL, fresh)
    with Client(local_cluster):
        assert len(ddf) == 400
        assert len(ddf.compute()) == 400


def test_a_client_that_is_not_current_can_be_named(local_cluster, servers, topology):
    fresh = dss.Topology.from_dsns({s.name: servers.dsns[s.name] for s in topology.shards[:2]})
    with Client(local_cluster, set_as_default=False) as client:
        assert dss.collect("SELECT 1 AS x", fresh, scheduler=client).num_rows == 2


def collect_on_a_worker(dsns):
    return dss.collect("SELECT 1 AS x", dss.Topology.from_dsns(dsns)).num_rows


def test_a_task_on_a_worker_can_collect(local_cluster, servers):
    # a task of the user's own: what it carries is theirs to decide
    dsns = {name: servers.dsns[name] for name in ("s1", "s3")}
    with Client(local_cluster) as client:
        assert client.submit(collect_on_a_worker, dsns, pure=False).result(timeout=60) == 2


def test_workers_can_be_made_to_forget_a_topology(local_cluster, servers):
    from dask_shardsql.engine.worker_plugin import take_from_workers

    topology = dss.Topology.from_dsns({"only": servers.dsns["s2"]})
    with Client(local_cluster) as client:
        ddf = dss.read_sharded_sql("SELECT 1 AS x", topology)
        assert len(ddf) == 1
        take_from_workers(client, topology)
        plugins = client.run_on_scheduler(
            lambda dask_scheduler: list(dask_scheduler.worker_plugins)
        )
        assert f"dask_shardsql-{topology.fingerprint}" not in plugins
        assert len(ddf.compute()) == 1  # given again, as the next query needs it


def test_a_cluster_in_this_process_does_not_take_our_topologies_with_it(servers):
    topology = dss.Topology.from_dsns({"here": servers.dsns["s2"]})
    lazy = dss.read_sharded_sql("SELECT 1 AS x", topology, scheduler="threads")
    with Client(processes=False, n_workers=2, dashboard_address=None) as client:
        assert len(dss.read_sharded_sql("SELECT 1 AS x", topology)) == 1
        client.cluster.scale(1)
        assert len(lazy.compute()) == 1
    assert len(lazy.compute()) == 1


def test_workers_that_join_later_are_given_the_topology(topology):
    with tcp_cluster(workers=1) as address, Client(address) as client:
        ddf = dss.read_sharded_sql(SQL, topology)
        assert len(ddf) == 400
        (first,) = client.scheduler_info()["workers"]
        with command("worker", address, "--no-dashboard", ready=r"Registered to:\s+(\S+)"):
            client.wait_for_workers(2)
            (second,) = set(client.scheduler_info()["workers"]) - {first}
            there = {"workers": [second], "allow_other_workers": False}
            future = client.compute(dss.read_sharded_sql(SQL, topology), **there)
            assert len(future.result()) == 400
            assert {
                address for holders in client.who_has(future).values() for address in holders
            } == {second}


def test_passwords_by_reference_are_found_where_the_workers_are(servers, tmp_path):
    dsn = dict(word.split("=", 1) for word in servers.dsns["s1"].split())
    password = dsn.pop("password").strip("'")
    shards = {"one": {**{k: v.strip("'") for k, v in dsn.items()}, "password_env": "ONLY_THERE"}}
    topology = dss.Topology.from_mapping({"shards": shards})
    sql = "SELECT count(*) AS n FROM d_orders"
    assert "ONLY_THERE" not in os.environ
    with pytest.raises(dss.CredentialError, match="ONLY_THERE, which is not set"):
        dss.collect(sql, topology)
    with tcp_cluster(environment={"ONLY_THERE": password}) as address, Client(address):
        assert dss.collect(sql, topology)["n"].to_pylist() == [134]


def test_no_password_is_in_any_task_graph_or_key(servers, topology):
    password = servers.dsns["s1"].split("password=")[1].split()[0].strip("'")
    ddf = dss.read_sharded_sql(SQL, topology).groupby("kind").total.mean()
    graph = dict(ddf.optimize().__dask_graph__())
    shown = [
        pickle.dumps(ddf.expr),
        cloudpickle.dumps(graph),
        *(repr(key).encode() for key in graph),
        *(repr(task).encode() for task in graph.values()),
        repr(ddf.expr.tree_repr()).encode(),
        repr(ddf).encode(),
    ]
    assert len(password) > 8
    for bytes_ in shown:
        assert password.encode() not in bytes_
        assert servers.dsns["s1"].encode() not in bytes_
        assert b"127.0.0.1" not in bytes_


def hide_the_package(directory):
    """A sitecustomize under which dask_shardsql cannot be imported, as if it were not there."""
    (directory / "sitecustomize.py").write_text(
        textwrap.dedent(
            """
            import sys, importlib.metadata as metadata

            class Hidden:
                def find_spec(self, name, path=None, target=None):
                    if name.split(".")[0] == "dask_shardsql":
                        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

            sys.meta_path.insert(0, Hidden())
            version = metadata.version

            def hidden_version(name):
                if name == "dask_shardsql":
                    raise metadata.PackageNotFoundError(name)
                return version(name)

            metadata.version = hidden_version
            """
        )
    )
    return {"PYTHONPATH": str(directory)}


@pytest.mark.parametrize("where", ["worker", "scheduler"])
def test_processes_without_the_package_get_a_clear_error(topology, tmp_path, where):
    hidden = hide_the_package(tmp_path)
    options = {"environment" if where == "worker" else "scheduler_environment": hidden}
    with (
        tcp_cluster(workers=1, **options) as address,
        Client(address),
        pytest.raises(
            dss.ConfigurationError, match=f"{where} .*no such package where dask_shardsql .*install"
        ),
    ):
        dss.read_sharded_sql(SQL, topology)


def test_events_of_workers_reach_the_client(local_cluster, topology):
    events = []
    with Client(local_cluster), dss.listen(events.append):
        dss.collect(SQL, topology)
        deadline = time.monotonic() + 10
        while len([e for e in events if e.state == "finished"]) < 4:
            assert time.monotonic() < deadline
            time.sleep(0.02)
    assert {event.shard for event in events} == {"s1", "s2", "s3", "s4"}


def test_listeners_inside_listeners_all_hear(local_cluster, topology):
    outer, inner = [], []

    def finished(events):
        return len([event for event in events if event.state == "finished"])

    with Client(local_cluster), dss.listen(outer.append):
        with dss.listen(inner.append):
            dss.collect(SQL, topology)
            wait_until(lambda: finished(outer) == finished(inner) == 4)
        dss.collect(SQL, topology)
        wait_until(lambda: finished(outer) == 8)
        assert finished(inner) == 4


def wait_until(condition, seconds=10):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("on_cluster", [True, False])
def test_an_error_on_one_shard_stops_the_others(local_cluster, topology, servers, on_cluster):
    sql = (
        "SELECT CASE WHEN (SELECT min(id) FROM d_orders) = 0 THEN (SELECT 1/min(id) FROM d_orders)"
        " ELSE length(pg_sleep(60)::text) END AS x"
    )

    def sleeping():
        found = 0
        for name in ("s2", "s3"):
            with servers.session(name) as cursor:
                cursor.execute(
                    "SELECT count(*) FROM pg_stat_activity WHERE state = 'active' AND "
                    "application_name LIKE 'dask_shardsql:%' AND query LIKE '%pg_sleep(60)%'"
                )
                found += cursor.fetchone()[0]
        return found

    three = dss.Topology.from_dsns({s.name: servers.dsns[s.name] for s in topology.shards[:3]})
    with ExitStack() as stack:
        if on_cluster:
            stack.enter_context(Client(local_cluster))
        with pytest.raises(dss.QueryError, match="division by zero"):
            dss.collect(sql, three)
        wait_until(lambda: sleeping() == 0, 5)


def test_events_of_workers_in_this_process_are_heard_once(topology):
    events = []
    with (
        Client(processes=False, n_workers=1, dashboard_address=None),
        dss.listen(events.append),
    ):
        dss.collect(SQL, topology)
        time.sleep(1)
    assert len([event for event in events if event.state == "finished"]) == 4


def test_an_asynchronous_client_is_refused_with_the_remedy(topology):
    async def run():
        async with Client(processes=False, asynchronous=True, dashboard_address=None, n_workers=1):
            with pytest.raises(dss.ConfigurationError, match="asynchronous.*scheduler='threads'"):
                dss.collect(SQL, topology)
            return dss.collect(SQL, topology, scheduler="threads").num_rows

    assert asyncio.run(run()) == 400
