"""Many shards from one thread: the same as tasks give, and no session left behind."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time

import dask
import pyarrow as pa
import pytest
from sessions import (
    ENDLESS,
    LARGE,
    check_that_sessions_are_left_well,
    interrupt_when,
    own_shards,
    pools_of,
    transactions,
    wait_until,
)

import dask_shardsql as dss
from dask_shardsql import eager
from dask_shardsql.engine import cancel, pools, scatter
from dask_shardsql.engine.drivers.base import Query
from dask_shardsql.engine.drivers.postgresql_libpq import Session

pytestmark = pytest.mark.usefixtures("pools_of_its_own")


@pytest.fixture(scope="module", autouse=True)
def tables(servers):
    servers.execute("DROP TABLE IF EXISTS sc_rows, sc_odd, sc_some")
    servers.execute(
        "CREATE TABLE sc_rows (id int8, shard int4, total numeric(12,2), d date, t text)"
    )
    rows = [(i, i % 3 + 1, i / 4, f"2024-01-{i % 28 + 1:02}", f"é{i}") for i in range(200)]
    servers.load("sc_rows", rows, shard_of=lambda row: row[1] - 1)
    servers.execute("CREATE TABLE sc_odd (a int4)")
    with servers.session("s3") as cursor:
        cursor.execute("ALTER TABLE sc_odd ALTER a TYPE text")
    with servers.session("s2") as cursor:
        cursor.execute("CREATE TABLE sc_some (a int4)")


@pytest.fixture
def shards(servers):
    """Four shards, the last of them empty; afterwards they must be as good as new."""
    topology = own_shards(servers)
    yield topology
    check_that_sessions_are_left_well(servers, topology)
    assert dss.collect("SELECT 1 AS x", topology).num_rows == 4
    check_that_sessions_are_left_well(servers, topology)


@pytest.fixture
def no_tasks(monkeypatch):
    """Fail where tasks are used after all."""
    monkeypatch.setattr(eager, "prepare", None)


def outcome(sql, topology, params=None, **options):
    try:
        table = dss.collect(sql, topology, params, **options)
    except dss.ShardSQLError as error:
        parts = ("shard", "server", "sqlstate", "position", "detail", "hint", "query")
        return type(error), str(error), {part: getattr(error, part, None) for part in parts}
    return table.schema, table.to_pylist()


@pytest.mark.parametrize(
    ("sql", "params", "options"),
    [
        ("SELECT * FROM sc_rows", None, {}),
        ("SELECT * FROM sc_rows ORDER BY id DESC", None, {"shard_column": "s"}),
        ("SELECT * FROM sc_rows WHERE id = %s", (7,), {"types": {"total": "float64"}}),
        ("SELECT * FROM sc_rows WHERE t = %(t)s", {"t": "é8"}, {"shards": ["s3", "s1"]}),
        ("SELECT * FROM sc_rows WHERE false", None, {"check_schema": False}),
        ("SELECT 'infinity'::date AS d", None, {"unrepresentable": "null"}),
        (LARGE, None, {"shard_column": "s"}),
        ("SELEC 1", None, {}),
        ("SELECT nope FROM sc_rows", None, {}),
        ("SELECT nope FROM sc_rows", None, {"check_schema": False}),
        ("SELECT * FROM sc_some", None, {}),
        ("SELECT * FROM sc_some", None, {"shards": ["s2", "s4"]}),
        ("SELECT * FROM sc_odd", None, {}),
        ("SELECT * FROM sc_odd", None, {"check_schema": False}),
        ("SELECT 1 AS a, 2 AS a", None, {}),
        ("SELECT FROM sc_rows", None, {}),
        ("SELECT id FROM sc_rows", None, {"shard_column": "id"}),
        ("SELECT id FROM sc_rows", None, {"types": {"nope": "int64"}}),
        ("SELECT %s", (1, 2), {}),
        ("SELECT 'infinity'::date AS d", None, {"shards": ["s2"]}),
        ("SELECT 1/(id-id) AS x FROM sc_rows WHERE shard = 2", None, {}),
    ],
)
def test_rows_and_errors_are_those_of_tasks(shards, no_tasks, monkeypatch, sql, params, options):
    found = outcome(sql, shards, params, **options)
    monkeypatch.undo()
    with dask.config.set(num_workers=2):
        assert found == outcome(sql, shards, params, **options)


def test_a_shard_that_only_the_rows_show_to_be_wrong_is_named(shards, no_tasks):
    with pytest.raises(dss.QueryError, match="sc_some") as caught:
        dss.collect("SELECT * FROM sc_some", shards, shards=["s2", "s3"], check_schema=False)
    assert caught.value.shard == "s3"


def refused(servers):
    wrong = servers.dsns["s2"].split(" password=")[0] + " password=wrong"
    return {"wrong": wrong, "gone": "host=127.0.0.1 port=1 dbname=x", "far": "host=no.invalid"}


@pytest.mark.parametrize("names", [["gone"], ["wrong"], ["gone", "wrong", "far"]])
@pytest.mark.parametrize("good", [0, 2])
def test_connections_that_fail_are_errors_as_from_tasks(
    servers, no_tasks, monkeypatch, names, good
):
    topology = own_shards(servers, good, **{name: refused(servers)[name] for name in names})
    found = outcome("SELECT 1 AS x", topology)
    check_that_sessions_are_left_well(servers, topology)
    monkeypatch.undo()
    with dask.config.set(num_workers=2):
        assert found == outcome("SELECT 1 AS x", topology)
    assert found[0] is dss.ConnectionFailedError


@pytest.mark.parametrize(("shard", "position"), [("gone", 0), ("gone", 2)])
def test_connections_that_fail_are_found_without_checking_all(servers, no_tasks, shard, position):
    good = own_shards(servers, 2)
    more = {shard: refused(servers)[shard]}
    dsns = {f"s{i + 1}": servers.dsns[f"s{i + 1}"] for i in range(2)}
    topology = dss.Topology.from_dsns({**more, **dsns} if position == 0 else {**dsns, **more})
    with pytest.raises(dss.ConnectionFailedError) as caught:
        dss.collect("SELECT 1 AS x", topology, check_schema=False)
    assert caught.value.shard == shard
    check_that_sessions_are_left_well(servers, good)


@pytest.mark.parametrize(
    ("sql", "last"),
    [
        (LARGE, {"finished"}),
        ("SELECT * FROM sc_rows", {"finished"}),
        ("SELECT 1/(id-id) AS x FROM sc_rows", {"finished", "failed"}),
        ("SELECT * FROM sc_odd", {"finished", "failed"}),
    ],
)
def test_each_shard_starts_once_and_ends_once(shards, no_tasks, sql, last):
    events = []
    with dss.listen(events.append):
        outcome(sql, shards, check_schema=False)
        check_ended = lambda: all(e[-1] in last for e in states(events).values())  # noqa: E731
        wait_until(check_ended)
    for found in states(events).values():
        assert found[0] == "started"
        assert found[-1] in last
        assert set(found[1:-1]) <= {"reading"}


def states(events):
    return {e.shard: [other.state for other in events if other.shard == e.shard] for e in events}


def active(servers):
    return [query for state, query in transactions(servers) if state == "active"]


def test_ctrl_c_while_a_shard_waits_for_a_lock(servers, shards, no_tasks):
    with servers.session("s2") as cursor:
        cursor.execute("LOCK TABLE sc_rows")
        with pytest.raises(KeyboardInterrupt), interrupt_when(lambda: active(servers)):
            dss.collect("SELECT * FROM sc_rows", shards)
        check_that_sessions_are_left_well(servers, shards)


@pytest.mark.parametrize("sql", ["SELECT pg_sleep(30)::text AS s", ENDLESS])
def test_ctrl_c_while_rows_come(servers, shards, no_tasks, sql):
    started = []
    with dss.listen(started.append):
        with (
            pytest.raises(KeyboardInterrupt),
            interrupt_when(lambda: len(started) >= 4 and len(active(servers)) == 4),
        ):
            dss.collect(sql, shards)
        check_that_sessions_are_left_well(servers, shards)


def test_ctrl_c_while_connecting(servers, no_tasks):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        topology = own_shards(servers, 2, silent=f"host=127.0.0.1 port={port} dbname=x")
        silent_pool = pools.pool_of(topology, "silent")
        with dask.config.set({"shardsql.connect-timeout": "3s"}):
            started = time.monotonic()
            with pytest.raises(KeyboardInterrupt), interrupt_when(lambda: silent_pool._opening):
                dss.collect("SELECT 1 AS x", topology)
            assert time.monotonic() - started < 2.5
            check_that_sessions_are_left_well(servers, topology, 10)


def test_a_backend_that_is_terminated_is_named_and_the_others_stop(servers, shards, no_tasks):
    def terminate():
        wait_until(lambda: len(active(servers)) == 4, 10)
        with servers.session("s2") as cursor:
            cursor.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                "WHERE application_name LIKE 'dask_shardsql:%'"
            )

    thread = threading.Thread(target=terminate)
    thread.start()
    with pytest.raises(dss.ConnectionLostError, match="administrator command") as caught:
        dss.collect("SELECT pg_sleep(30)::text AS s", shards)
    thread.join()
    assert (caught.value.shard, caught.value.sqlstate) == ("s2", "57P01")


def test_a_server_that_hangs_does_not_keep_the_others_from_being_left_well(servers, shards):
    sql = (
        "SELECT pg_backend_pid() AS pid, CASE WHEN (SELECT min(shard) FROM sc_rows) = 1 "
        "THEN (SELECT 1/(pg_sleep(1)::text <> '')::int) ELSE 0 END AS x, "
        "CASE WHEN (SELECT min(shard) FROM sc_rows) > 1 THEN pg_sleep(30)::text END AS y"
    )
    stopped = []

    def stop():
        wait_until(lambda: len(active(servers)) >= 2, 10)
        with servers.session("s2") as cursor:
            cursor.execute(
                "SELECT pid FROM pg_stat_activity WHERE application_name LIKE 'dask_shardsql:%'"
            )
            stopped.extend(pid for (pid,) in cursor.fetchall())
        for pid in stopped:
            os.kill(pid, signal.SIGSTOP)

    thread = threading.Thread(target=stop)
    thread.start()
    started = time.monotonic()
    try:
        with pytest.raises(dss.QueryError, match="division by zero"):
            dss.collect(sql, shards)
        assert time.monotonic() - started < 6
        wait_until(lambda: not any(p._busy for p in pools_of(shards)), 8)
    finally:
        thread.join()
        for pid in stopped:
            os.kill(pid, signal.SIGCONT)
    assert stopped


def test_what_takes_the_rows_may_raise(servers, shards):
    columns = []

    def agree(outcomes):
        columns.extend(outcomes.values())
        return scatter.Answer(query, columns[0], columns[0])

    def take(shard, batch):
        raise ValueError(shard)

    for sql in (
        LARGE,
        ENDLESS,
        "SELECT 1 AS x",
        "SELECT 1 AS x UNION ALL SELECT 2",
    ):
        query, columns = Query(sql, None, f"raises{hash(sql)}", "raise"), []
        with pytest.raises(ValueError, match="s"):
            scatter.scatter(shards, ["s1", "s2"], query, agree, take)
        check_that_sessions_are_left_well(servers, shards)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_value_that_ends_it_ends_what_the_server_still_does(shards, workers):
    sql = (
        "SELECT CASE WHEN g = 1 THEN 'infinity' ELSE '2024-01-01' END::date AS d, repeat('x', 999) "
        "AS t, CASE WHEN g > 2000 THEN pg_sleep(30)::text END AS s FROM generate_series(1, 3000) g"
    )
    with dask.config.set(num_workers=workers), pytest.raises(dss.UnrepresentableValueError):
        dss.collect(sql, shards, shards=["s1"])


def test_a_query_that_is_cancelled_while_it_connects_does_not_start(shards, monkeypatch):
    query = Query("SELECT 1 AS x", None, "cancelled-early", "raise")
    opened = pools.Lease.open

    def open_and_cancel(lease):
        connection = opened(lease)
        cancel.cancel_query(query.query_id)
        return connection

    monkeypatch.setattr(pools.Lease, "open", open_and_cancel)

    def agree(outcomes):
        raise next(iter(outcomes.values()))

    with pytest.raises(dss.QueryError) as caught:
        scatter.scatter(shards, ["s1"], query, agree, lambda *_: None)
    assert caught.value.sqlstate == "57014"
    monkeypatch.undo()


def test_more_large_shards_than_threads_and_small_ones_between(servers, no_tasks):
    topology = own_shards(servers, 40)
    sql = (
        "SELECT g AS id, repeat(md5(g::text), 8) AS t FROM generate_series(1, CASE WHEN "
        "inet_server_port() %% 7 <> %s THEN 4000 ELSE 3 END) g"
    )
    small = int(topology.shard("s1").primary.address.rsplit(":", 1)[1]) % 7
    table = dss.collect(sql, topology, [small], shard_column="s")
    counts = table["s"].value_counts().to_pylist()
    assert len(counts) == 40
    assert {count["counts"] for count in counts} == {3, 4000}
    assert table["s"].combine_chunks().dictionary_encode().dictionary.to_pylist() == [
        f"s{i}" for i in range(1, 41)
    ]
    check_that_sessions_are_left_well(servers, topology)
    for pool in pools_of(topology):
        pool.close()


def test_a_slow_shard_does_not_stop_the_fast_ones(shards, no_tasks):
    sql = (
        "SELECT g AS id, repeat(md5(g::text), 8) AS t, CASE WHEN g % 3000 = 0 AND (SELECT "
        "min(shard) FROM sc_rows) = 1 THEN pg_sleep(0.5)::text END AS s "
        "FROM generate_series(1, 15000) g"
    )
    dss.collect(LARGE, shards)
    ended, started = {}, time.monotonic()

    def note(event):
        if event.state == "finished":
            ended[event.shard] = time.monotonic() - started

    with dss.listen(note):
        assert dss.collect(sql, shards).num_rows == 60_000
    assert ended["s1"] > 2.2
    assert max(ended[shard] for shard in ("s2", "s3", "s4")) < ended["s1"]


@pytest.mark.parametrize("doubled", [False, True])
def test_many_threads_share_one_connection_a_server(servers, doubled):
    first = own_shards(servers, 3)
    dsns = {s.name: f"{servers.dsns[s.name]} application_name=shared" for s in first.shards}
    orders = [list(dsns), list(dsns)[::-1]]
    topologies = [dss.Topology.from_dsns({name: dsns[name] for name in order}) for order in orders]
    if doubled:  # two shards of each with the same pool
        topologies = [dss.Topology.from_dsns({**dsns, "again": dsns[n]}) for n in ("s1", "s2")]
    failures, done = [], []

    def run(topology):
        for _ in range(6):
            try:
                done.append(dss.collect("SELECT 1 AS x", topology).num_rows)
            except Exception as error:  # noqa: BLE001
                failures.append(error)

    limits = {"shardsql.max-connections-per-worker": 1 + doubled, "shardsql.pool-timeout": "10s"}
    with dask.config.set(limits):
        threads = [threading.Thread(target=run, args=(topologies[i % 2],)) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert failures == []
    assert done == [3 + doubled] * 48
    check_that_sessions_are_left_well(servers, topologies[0])


def test_two_shards_on_one_server_share_its_only_connection(servers):
    dsn = servers.dsns["s1"] + " application_name=only"
    topology = dss.Topology.from_dsns({"a": dsn, "b": dsn})
    with dask.config.set({"shardsql.max-connections-per-worker": 1}):
        found = dss.collect("SELECT pg_backend_pid() AS p", topology)["p"].to_pylist()
    assert len(set(found)) == 1
    assert len(found) == 2


def test_a_forked_child_asks_over_connections_of_its_own(shards):
    sql = "SELECT pg_backend_pid() AS p"
    before = dss.collect(sql, shards)["p"].to_pylist()
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            found = dss.collect(sql, shards)["p"].to_pylist()
            os.write(writer, str(len({*found, *before})).encode())
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    assert os.read(reader, 10) == b"8"
    assert dss.collect(sql, shards)["p"].to_pylist() == before


def test_connections_that_died_while_idle_are_replaced_unseen(servers, shards, no_tasks):
    sql = "SELECT pg_backend_pid() AS p"
    before = dss.collect(sql, shards)["p"].to_pylist()
    for name, pid in zip(("s1", "s3"), before[::2], strict=True):
        with servers.session(name) as cursor:
            cursor.execute("SELECT pg_terminate_backend(%s, 5000)", (pid,))
    after = dss.collect(sql, shards)["p"].to_pylist()
    assert [a == b for a, b in zip(after, before, strict=True)] == [False, True, False, True]


@pytest.mark.parametrize("which", ["one", "all"])
def test_encrypted_sessions_are_read_by_tasks_and_kept(shards, monkeypatch, which):
    sql = "SELECT pg_backend_pid() AS p, x.* FROM sc_rows x"
    expected = dss.collect("SELECT * FROM sc_rows", shards)
    pids = dss.collect("SELECT pg_backend_pid() AS p", shards)["p"].to_pylist()
    hidden = pids if which == "all" else pids[2:3]
    for pool in pools_of(shards):
        for _, connection in pool._idle:
            connection.__dict__["is_plain"] = connection.info.backend_pid not in hidden
    assert isinstance(connection, Session)
    asked = []
    prepare = eager.prepare
    monkeypatch.setattr(eager, "prepare", lambda *a: asked.append(1) or prepare(*a))
    table = dss.collect(sql, shards)
    assert asked
    assert set(table["p"].to_pylist()) <= set(pids)
    assert table.drop_columns(["p"]) == expected
    assert isinstance(table, pa.Table)
