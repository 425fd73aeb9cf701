"""Ctrl-C, or an error, while a lazy read is computed stops what it runs."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager

import dask
import psycopg2
import pytest
from dask.system import CPU_COUNT
from distributed import Client, LocalCluster
from sessions import (
    check_that_sessions_are_left_well,
    interrupt_when,
    own_shards,
    transactions,
    wait_until,
)

import dask_shardsql as dss
from dask_shardsql.engine.cancel import cancel_query, refuse_if_cancelled
from dask_shardsql.engine.drivers.base import Query
from dask_shardsql.engine.drivers.postgresql_libpq import Session
from dask_shardsql.engine.stoppable import Stoppable

pytestmark = pytest.mark.usefixtures("pools_of_its_own")

SQL = "SELECT id, v FROM lc_rows"
ROWS = 200
SUM = sum(i % 7 for i in range(ROWS))


@pytest.fixture(scope="module", autouse=True)
def tables(servers):
    servers.execute("CREATE TABLE lc_rows (id int8, v int4)")
    servers.load("lc_rows", [(i, i % 7) for i in range(ROWS)], shard_of=lambda row: row[0] % 4)


@pytest.fixture
def shards(servers):
    return own_shards(servers)


@pytest.fixture
def sharded(servers):
    dsns = {name: servers.dsns[name] for name in list(servers.dsns)[:4]}
    return dss.Topology.from_dsns(dsns, sharded={"lc_rows": "id"})


@contextmanager
def locked(servers, *but):
    """Keep whoever reads the table waiting, except on the shards `but`."""
    with ExitStack() as stack:
        for name in list(servers.dsns)[:4]:
            if name not in but:
                connection = stack.enter_context(closing(psycopg2.connect(servers.dsns[name])))
                connection.cursor().execute("LOCK TABLE lc_rows")
        yield


def check_ctrl_c(servers, topology, compute, waiting=1, but=()):
    """Ctrl-C ends what waits for a lock, which nothing else would; then it can be computed."""
    with locked(servers, *but):
        with (
            pytest.raises(KeyboardInterrupt),
            interrupt_when(lambda: len(transactions(servers)) >= waiting),
        ):
            compute()
        check_that_sessions_are_left_well(servers, topology, 10)
    return compute()


THREADS = [{}, {"scheduler": "threads"}, {"num_workers": 4}, {"scheduler": "synchronous"}]


@pytest.mark.parametrize("options", THREADS, ids=str)
@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda ddf: ddf.map_partitions(len).optimize().sum(), ROWS),
        (lambda ddf: ddf.v.sum(), SUM),
        (lambda ddf: dask.delayed(sum)([part.v.sum() for part in ddf.to_delayed()]), SUM),
        (lambda ddf: ddf[["id"]].to_dask_array().max(), ROWS - 1),
    ],
    ids=["fused", "partials", "delayed", "array"],
)
def test_ctrl_c_stops_the_servers(servers, shards, options, make, expected):
    lazy = make(dss.read_sharded_sql(SQL, shards))
    waiting = 1 if options.get("scheduler") == "synchronous" else min(2, CPU_COUNT)
    assert check_ctrl_c(servers, shards, lambda: lazy.compute(**options), waiting) == expected


def test_ctrl_c_in_what_computes_by_itself(servers, shards):
    ddf = dss.read_sharded_sql(SQL, shards)
    assert check_ctrl_c(servers, shards, lambda: len(ddf)) == ROWS
    assert len(check_ctrl_c(servers, shards, ddf.head)) == 5
    assert len(check_ctrl_c(servers, shards, ddf.compute)) == ROWS
    assert len(check_ctrl_c(servers, shards, ddf.persist)) == ROWS


def test_ctrl_c_with_a_pool_of_the_users(servers, shards):
    ddf = dss.read_sharded_sql(SQL, shards)
    with ThreadPoolExecutor(4) as pool, dask.config.set(pool=pool):
        assert len(check_ctrl_c(servers, shards, ddf.compute, 4)) == ROWS


@pytest.mark.parametrize("scheduler", ["threads", "synchronous"])
def test_ctrl_c_while_slices_are_read(servers, shards, scheduler):
    ddf = dss.read_sharded_sql(SQL, shards, partitions_per_shard=2, partition_by="id")
    found = check_ctrl_c(servers, shards, lambda: ddf.compute(scheduler=scheduler))
    assert len(found) == ROWS


@pytest.mark.parametrize("scheduler", ["threads", "synchronous"])
@pytest.mark.parametrize("is_plain", [True, False])
@pytest.mark.parametrize("sql", ["sum(id)", "array_agg(id)"])
def test_ctrl_c_while_other_shards_send(servers, sharded, monkeypatch, scheduler, is_plain, sql):
    monkeypatch.setattr(Session, "is_plain", is_plain)
    sql = f"SELECT v, {sql} AS x FROM lc_rows GROUP BY v"
    (at,) = dss.explain(sql, sharded, merge="global").shards
    ddf = dss.read_sharded_sql(sql, sharded, merge="global")

    def compute():
        return ddf.compute(scheduler=scheduler)

    assert len(check_ctrl_c(servers, sharded, compute, 3, but=[at])) == 7  # of them or its own
    assert len(check_ctrl_c(servers, sharded, compute)) == 7


@pytest.fixture(scope="module")
def cluster():
    with LocalCluster(n_workers=2, threads_per_worker=2, dashboard_address=":0") as cluster:
        yield cluster


@pytest.fixture
def client(cluster):
    with Client(cluster) as client:
        yield client


def test_ctrl_c_on_a_cluster(servers, shards, client):
    ddf = dss.read_sharded_sql(SQL, shards)
    assert check_ctrl_c(servers, shards, lambda: len(ddf), 4) == ROWS
    assert check_ctrl_c(servers, shards, lambda: ddf.v.sum().compute(), 4) == SUM
    fused = ddf.map_partitions(len).optimize().sum()
    assert check_ctrl_c(servers, shards, fused.compute, 4) == ROWS


def test_what_a_cluster_wants_again_is_run_again(client, tmp_path):
    """Until it has ended, a task that was cancelled is the one that is to answer."""
    begun = tmp_path / "begun"

    def ask(ref, shard, query):
        if begun.exists():
            return "answer"
        begun.touch()
        cancel_query(query.run)
        return refuse_if_cancelled(query.run, shard)

    asked = client.submit(Stoppable(ask), None, "s1", Query("SELECT 1"))
    assert asked.result(20) == "answer"


def test_an_error_of_one_shard_on_a_cluster_stops_the_others(servers, shards, client):
    check_error(servers, shards)


def test_an_error_of_one_shard_stops_the_others(servers, shards):
    check_error(servers, shards, num_workers=4)


def check_error(servers, shards, **options):
    sql = (
        "SELECT CASE WHEN (SELECT min(id) FROM lc_rows) = 0 "
        "THEN (SELECT 1/(pg_sleep(0.5)::text <> '')::int) ELSE 0 END AS x, "
        "CASE WHEN (SELECT min(id) FROM lc_rows) > 0 THEN pg_sleep(60)::text END AS y"
    )
    ddf = dss.read_sharded_sql(sql, shards)
    started = time.monotonic()
    with pytest.raises(dss.QueryError, match="division by zero") as caught:
        ddf.map_partitions(len).compute(**options)
    assert caught.value.shard == "s1"
    check_that_sessions_are_left_well(servers, shards, 10)
    assert time.monotonic() - started < 30


@pytest.mark.parametrize("is_kept", [False, True], ids=["ddf", "graph"])
def test_what_a_thread_comes_to_later_is_not_begun(servers, shards, is_kept):
    ddf = dss.read_sharded_sql(SQL, shards)
    graph = ddf.to_delayed()
    free = threading.Event()

    def compute():
        return sum(map(len, dask.compute(*graph) if is_kept else [ddf.compute()]))

    with ThreadPoolExecutor(1) as pool, dask.config.set(pool=pool):
        pool.submit(free.wait)
        with (
            locked(servers),
            pytest.raises(KeyboardInterrupt),
            interrupt_when(lambda: pool._work_queue.qsize() > 0),
        ):
            compute()
        with locked(servers):
            free.set()
            pool.submit(int).result(10)  # so no task waits for the lock
        assert compute() == ROWS


def test_another_computation_of_the_same_read_goes_on(servers, shards):
    ddf = dss.read_sharded_sql(SQL, shards).v.sum()
    with locked(servers), ThreadPoolExecutor(1) as threads:
        other = threads.submit(ddf.compute, num_workers=4)
        wait_until(lambda: len(transactions(servers)) == 4, 10)
        with (
            pytest.raises(KeyboardInterrupt),
            interrupt_when(lambda: len(transactions(servers)) > 5),
        ):
            ddf.compute(num_workers=2)
        wait_until(lambda: len(transactions(servers)) == 4, 10)
        time.sleep(0.5)
        assert not other.done()
        for name in list(servers.dsns)[:4]:
            with servers.session(name) as cursor:
                cursor.execute(
                    "SELECT pg_terminate_backend(pid) FROM pg_locks WHERE mode = "
                    "'AccessExclusiveLock' AND relation = 'lc_rows'::regclass"
                )
        assert other.result() == SUM


@pytest.mark.parametrize("scheduler", ["threads", "synchronous"])
def test_a_process_ends_soon_after_ctrl_c(servers, scheduler):
    code = f"""
import signal, dask_shardsql as dss
signal.signal(signal.SIGINT, signal.default_int_handler)
topology = dss.Topology.from_dsns({list(servers.dsns.values())[:4]!r})
ddf = dss.read_sharded_sql("SELECT pg_sleep(60)::text AS s", topology)
try:
    ddf.s.count().compute(scheduler={scheduler!r})
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        wait_until(lambda: any("pg_sleep" in sql for _, sql in transactions(servers)), 30)
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=10)[0] == "interrupted\n"
        wait_until(lambda: not transactions(servers), 10)
    finally:
        process.kill()
        process.wait()
