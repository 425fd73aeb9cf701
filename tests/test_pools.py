"""Connection pools: lazy, capped, health-checked, per process."""

from __future__ import annotations

import os
import pickle
import threading
import time
from contextlib import suppress

import dask
import psycopg2
import pytest

import dask_shardsql as dss
from dask_shardsql.config import Settings
from dask_shardsql.engine import pools
from dask_shardsql.engine.drivers.base import driver_named
from dask_shardsql.engine.pools import Pool


@pytest.fixture
def pool(servers):
    shard = dss.Topology.from_dsns({"s1": servers.dsns["s1"]}).shard("s1")
    settings = Settings(max_connections_per_worker=2, pool_timeout=0.3)
    made = Pool(driver_named("postgresql"), shard.primary, settings)
    yield made
    made.close()


def pid_of(connection):
    return connection.info.backend_pid


def test_connections_are_reused_and_opened_when_needed(pool):
    with pool.connection("q", "s1") as first:
        pid = pid_of(first)
        with pool.connection("q", "s1") as second:
            assert pid_of(second) != pid
    with pool.connection("q", "s1") as again:
        assert pid_of(again) in {pid, pid_of(second)}


def test_the_cap_holds_and_waiting_ends_with_the_remedy(pool):
    with pool.connection("q", "s1"), pool.connection("q", "s1"):
        started = time.monotonic()
        with (
            pytest.raises(dss.PoolTimeoutError, match="all 2.*max-connections-per-worker"),
            pool.connection("q", "s1"),
        ):
            pass
        assert 0.2 < time.monotonic() - started < 5
    with pool.connection("q", "s1"):
        pass


def test_whoever_waits_gets_the_next_free_connection(servers):
    topology = dss.Topology.from_dsns({"capped": servers.dsns["s1"]})
    with dask.config.set({"shardsql.max-connections-per-worker": 1}):
        results = []

        def ask():
            table = dss.collect("SELECT pg_backend_pid() AS p, pg_sleep(0.05)::text AS s", topology)
            results.append(table["p"][0].as_py())

        threads = [threading.Thread(target=ask) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
    assert len(results) == 6
    assert len(set(results)) == 1


def test_a_connection_that_died_while_idle_is_replaced(pool, servers):
    with pool.connection("q", "s1") as connection:
        pid = pid_of(connection)
    with servers.connect("s1") as other, other.cursor() as cursor:
        cursor.execute("SELECT pg_terminate_backend(%s, 5000)", (pid,))
    other.close()
    time.sleep(0.1)
    with pool.connection("q", "s1") as connection, connection.cursor() as cursor:
        assert pid_of(connection) != pid
        cursor.execute("SELECT 1")


def test_an_open_transaction_never_returns_to_the_pool(pool):
    with pool.connection("q", "s1") as connection:
        pid = pid_of(connection)
        with connection.cursor() as cursor:
            cursor.execute("BEGIN")
    with pool.connection("q", "s1") as connection:
        assert pid_of(connection) != pid


def test_errors_leave_clean_connections(topology, servers):
    def backends():
        with servers.connect("s1") as connection, connection.cursor() as cursor:
            cursor.execute(
                "SELECT count(*), count(*) FILTER (WHERE state <> 'idle') FROM pg_stat_activity "
                "WHERE application_name LIKE 'dask_shardsql%%' AND pid <> pg_backend_pid()"
            )
            found = cursor.fetchone()
        connection.close()
        return found

    for _ in range(30):
        with pytest.raises(dss.QueryError):
            dss.collect("SELECT 1/0 AS x FROM generate_series(1, 10)", topology)
        with pytest.raises(dss.UnrepresentableValueError):
            dss.collect("SELECT 'infinity'::date AS x", topology)
    count, busy = backends()
    assert busy == 0
    assert count <= 40


def test_pools_are_never_pickled(pool):
    with pytest.raises(TypeError):
        pickle.dumps(pool)


def test_a_forked_child_opens_its_own_connections(servers):
    topology = dss.Topology.from_dsns({"forked": servers.dsns["s1"]})
    sql = "SELECT pg_backend_pid() AS p"
    parent = dss.collect(sql, topology)["p"][0].as_py()
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            pid = dss.collect(sql, topology, scheduler="sync")["p"][0].as_py()
            os.write(writer, str(pid).encode())
            status = 0
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    assert int(os.read(reader, 100)) != parent
    assert dss.collect(sql, topology)["p"][0].as_py() == parent


def test_idle_connections_can_be_closed(servers):
    topology = dss.Topology.from_dsns({"closing": servers.dsns["s1"]})
    sql = "SELECT pg_backend_pid() AS p"
    first = dss.collect(sql, topology)["p"][0].as_py()
    pools.close_all()
    assert dss.collect(sql, topology)["p"][0].as_py() != first


def test_a_cancelled_query_leaves_no_backend(servers):
    topology = dss.Topology.from_dsns({"slow": servers.dsns["s1"]})
    pool = pools.pool_of(topology, "slow")
    failures = []

    def run():
        with pool.connection("doomed", "slow") as connection, connection.cursor() as cursor:
            try:
                cursor.execute("SELECT pg_sleep(30)")
            except psycopg2.Error as error:
                failures.append(error.pgcode)

    thread = threading.Thread(target=run)
    thread.start()
    time.sleep(0.5)
    pool.cancel("another")
    pool.cancel("doomed")
    thread.join(5)
    assert failures == ["57014"]


def test_what_a_query_sets_or_locks_is_gone_for_the_next_one(servers):
    topology = dss.Topology.from_dsns({"s1": servers.dsns["s1"]})
    look = (
        "SELECT current_setting('search_path') AS path, current_setting('work_mem') AS memory, "
        "current_user::text AS role, current_setting('client_encoding') AS encoding, 'é' AS text, "
        "pg_backend_pid() AS pid, "
        "(SELECT count(*) FROM pg_locks WHERE locktype = 'advisory') AS locks"
    )
    before = dss.collect(look, topology).to_pylist()
    for sql in (
        "SELECT set_config('search_path', 'evil, public', false) AS x",
        "SELECT set_config('work_mem', '1MB', false) AS x",
        "SELECT set_config('TimeZone', 'Asia/Tokyo', false) AS x",
        "SELECT set_config('role', 'pg_monitor', false) AS x",
        "SELECT pg_advisory_lock(4711)::text AS x",
    ):
        dss.collect(sql, topology)
        assert dss.collect(look, topology).to_pylist() == before


@pytest.mark.parametrize(
    "setting", [("client_encoding", "LATIN1"), ("standard_conforming_strings", "off")]
)
def test_what_libpq_goes_by_is_as_it_was_when_a_query_has_set_it(setting, servers):
    topology = dss.Topology.from_dsns({"s1": servers.dsns["s1"]})
    with suppress(dss.QueryError):
        dss.collect("SELECT set_config(%s, %s, false) AS x", topology, setting)
    assert dss.collect("SELECT %s AS x", topology, ["é\\"])["x"].to_pylist() == ["é\\"]


def test_a_query_that_changes_the_encoding_of_its_own_texts_is_refused(servers):
    topology = dss.Topology.from_dsns({"s1": servers.dsns["s1"]})
    with pytest.raises(dss.QueryError, match="sets client_encoding to LATIN1"):
        dss.collect("SELECT set_config('client_encoding', 'LATIN1', false), 'é' AS x", topology)


def test_topologies_with_the_same_server_share_its_pool(servers):
    sql = "SELECT pg_backend_pid() AS p"
    first = dss.Topology.from_dsns({"a": servers.dsns["s1"]})
    second = dss.Topology.from_dsns({"b": servers.dsns["s1"]}, sharded={"t": "k"})
    assert first.fingerprint != second.fingerprint
    found = [dss.collect(sql, topology)["p"][0].as_py() for topology in (first, second)]
    assert found[0] == found[1]


def test_connections_that_stay_idle_are_closed(servers):
    topology = dss.Topology.from_dsns({"a": servers.dsns["s1"] + " keepalives_idle=77"})
    with dask.config.set({"shardsql.pool-idle": "300ms"}):
        pid = dss.collect("SELECT pg_backend_pid() AS p", topology)["p"][0].as_py()
        pool = pools.pool_of(topology, "a")
        deadline = time.monotonic() + 20
        while pool._idle and time.monotonic() < deadline:
            time.sleep(0.05)
    with servers.session("s1") as cursor:
        cursor.execute("SELECT count(*) FROM pg_stat_activity WHERE pid = %s", (pid,))
        assert cursor.fetchone() == (0,)


def test_settings_hold_from_the_next_query_on(servers):
    topology = dss.Topology.from_dsns({"a": servers.dsns["s1"]})
    for limit in (3, 5):
        with dask.config.set({"shardsql.max-connections-per-worker": limit}):
            dss.collect("SELECT 1 AS x", topology)
            assert pools.pool_of(topology, "a").settings.max_connections_per_worker == limit


def test_a_value_that_cannot_be_held_ends_the_reading_at_once(servers):
    topology = dss.Topology.from_dsns({"a": servers.dsns["s1"]})
    sql = (
        "SELECT CASE WHEN g = 1 THEN 'infinity' ELSE '2024-01-01' END::date AS d, "
        "repeat('x', 1000) AS t, pg_sleep(CASE WHEN g > 20000 THEN 60 ELSE 0 END)::text AS s "
        "FROM generate_series(1, 30000) g"
    )
    started = time.monotonic()
    with pytest.raises(dss.UnrepresentableValueError):
        dss.collect(sql, topology)
    assert time.monotonic() - started < 30  # it sleeps for a minute a row further on
