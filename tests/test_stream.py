"""stream: the rows of collect as they come, in bounded memory; whoever drops it stops the query."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time

import dask
import duckdb
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from distributed import Client, LocalCluster
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

LATE_ERROR = (
    "SELECT g AS id, repeat('x', 1000) AS t, CASE WHEN g > 9000 AND (SELECT min(shard) FROM "
    "st_rows) = 2 THEN 1/(g - g) END AS x FROM generate_series(1, {}) g"
)


pytestmark = pytest.mark.usefixtures("pools_of_its_own")


@pytest.fixture(scope="module", autouse=True)
def tables(servers):
    servers.execute("DROP TABLE IF EXISTS st_rows")
    servers.execute("CREATE TABLE st_rows (id int8, shard int4, total numeric(12,2), t text)")
    rows = [(i, i % 3 + 1, i / 4, f"é{i}") for i in range(200)]
    servers.load("st_rows", rows, shard_of=lambda row: row[1] - 1)


def our_threads():
    return [t for t in threading.enumerate() if t.name.startswith("dask_shardsql-s")]


@pytest.fixture
def shards(servers):
    """Four shards, the last of them empty; afterwards they must be as good as new."""
    topology = own_shards(servers)
    yield topology
    gc.collect()
    check_that_sessions_are_left_well(servers, topology)
    wait_until(lambda: not our_threads())
    assert dss.collect("SELECT 1 AS x", topology).num_rows == 4


@pytest.fixture(scope="module")
def client():
    with (
        LocalCluster(
            n_workers=2, threads_per_worker=2, processes=True, dashboard_address=":0"
        ) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        yield client


def rows_of(table):
    return sorted((tuple(row.values()) for row in table.to_pylist()), key=repr)


CASES = [
    ("SELECT * FROM st_rows", None, {}),
    ("SELECT * FROM st_rows WHERE id < %s", (9,), {"shard_column": "s"}),
    ("SELECT * FROM st_rows", None, {"shards": ["s2"], "types": {"total": "float64"}}),
    ("SELECT * FROM st_rows WHERE false", None, {"check_schema": False}),
    ("SELECT 'infinity'::date AS d", None, {"unrepresentable": "null"}),
    (LARGE, None, {"shard_column": "s", "batch_size": "1 MiB"}),
]


@pytest.mark.parametrize(("sql", "params", "options"), CASES)
@pytest.mark.parametrize("where", ["here", "cluster"])
def test_the_rows_are_those_of_collect(shards, client, sql, params, options, where):
    scheduler = {"scheduler": client} if where == "cluster" else {}
    reader = dss.stream(sql, shards, params, **options, **scheduler)
    assert isinstance(reader, pa.RecordBatchReader)
    found = reader.read_all()
    expected = dss.collect(
        sql, shards, params, **{k: v for k, v in options.items() if k != "batch_size"}
    )
    assert reader.schema == found.schema == expected.schema
    assert rows_of(found) == rows_of(expected)


def test_rows_of_one_shard_keep_their_order(shards):
    table = dss.stream(LARGE, shards, shard_column="s", batch_size="100 kB").read_all()
    for shard in ("s1", "s4"):
        ids = table.filter(pc.equal(table["s"], shard))["id"].to_pylist()
        assert ids == list(range(1, 20001))


def test_no_rows_are_no_batches_and_a_schema(shards):
    reader = dss.stream("SELECT * FROM st_rows WHERE false", shards)
    assert reader.schema.names == ["id", "shard", "total", "t"]
    assert list(reader) == []


def test_readers_of_arrow_take_it(shards):
    def reader():
        return dss.stream("SELECT id, t FROM st_rows", shards)

    assert len(reader().read_pandas()) == 200
    found = duckdb.from_arrow(reader()).aggregate("count(*), sum(id)").fetchall()
    assert found == [(200, 19900)]
    assert pa.Table.from_batches(reader()).num_rows == 200
    with reader() as batches:
        assert sum(batch.num_rows for batch in batches) == 200


def test_batches_are_as_large_as_asked_for(shards):
    sizes = [batch.nbytes for batch in dss.stream(LARGE, shards, batch_size="256 kiB")]
    assert max(sizes) <= 1.1 * (256 << 10)
    assert len(sizes) > 60
    one = [b.num_rows for b in dss.stream("SELECT id FROM st_rows", shards, batch_size=1)]
    assert sum(one) == 200


@pytest.mark.parametrize(
    "size", [0, -1, "16 MiX", None, True, float("inf"), float("nan"), [], "1e99 GB", b"9"]
)
def test_sizes_that_are_none_are_refused(shards, size):
    with pytest.raises(dss.ConfigurationError, match="batch_size"):
        dss.stream("SELECT 1 AS x", shards, batch_size=size)


@pytest.mark.parametrize("where", ["here", "cluster"])
def test_what_is_wrong_before_rows_is_raised_at_once(shards, client, where):
    scheduler = client if where == "cluster" else None
    with pytest.raises(dss.QueryError, match="all 4 shards") as caught:
        dss.stream("SELECT nope FROM st_rows", shards, scheduler=scheduler)
    assert caught.value.position == 8
    with pytest.raises(dss.ColumnError):
        dss.stream("SELECT 1 AS a, 2 AS a", shards, scheduler=scheduler)
    with pytest.raises(dss.ParameterError):
        dss.stream("SELECT %s", shards, (1, 2), scheduler=scheduler)


@pytest.mark.parametrize(
    ("where", "rows"), [("here", 10_000), ("here", 1_000_000), ("cluster", 10_000)]
)
def test_an_error_in_the_middle_is_raised_to_whoever_reads(servers, shards, client, where, rows):
    scheduler = client if where == "cluster" else None
    reader = dss.stream(LATE_ERROR.format(rows), shards, batch_size="1 MiB", scheduler=scheduler)
    with pytest.raises(dss.QueryError, match="division by zero") as caught:
        for _ in reader:
            pass
    assert (caught.value.shard, caught.value.sqlstate) == ("s2", "22012")
    with pytest.raises(dss.QueryError):
        reader.read_next_batch()
    # although the reader still lives
    check_that_sessions_are_left_well(servers, shards)


def test_an_error_stops_the_other_shards_although_nobody_reads(servers, shards):
    sql = ENDLESS.replace(
        "AS t",
        "AS t, CASE WHEN (SELECT min(shard) FROM st_rows) = 2 "
        "THEN 1/length(pg_sleep(0.5)::text) END AS x",
    )
    reader = dss.stream(sql, shards, batch_size="100 kB")
    check_that_sessions_are_left_well(servers, shards)
    with pytest.raises(dss.QueryError, match="division by zero"):
        reader.read_all()


@pytest.mark.parametrize(
    "sql", [ENDLESS, "SELECT 1 AS x, pg_sleep(60 * i) FROM (VALUES (0), (1)) v (i)"]
)
@pytest.mark.parametrize("taken", [0, 1, 8])
def test_a_reader_that_is_dropped_stops_the_query(servers, shards, sql, taken):
    taken = min(taken, 0 if sql is not ENDLESS else 9)
    reader = dss.stream(sql, shards, batch_size="1 MiB")
    for _ in range(taken):
        reader.read_next_batch()
    wait_until(lambda: len(transactions(servers)) == 4)
    started = time.monotonic()
    del reader
    check_that_sessions_are_left_well(servers, shards)
    assert time.monotonic() - started < 2


def test_servers_wait_while_nobody_takes_their_rows(servers):
    code = """
        import resource, sys, time, dask_shardsql as dss
        topology = dss.Topology.from_dsns({f"s{i}": dsn for i, dsn in enumerate(sys.argv[1:])})
        sql = "SELECT repeat(md5(g::text), 8) AS t FROM generate_series(1, {}) g"
        dss.stream(sql.format(1000), topology).read_all()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        reader = dss.stream(sql.format(300_000), topology, batch_size="2 MiB")
        reader.read_next_batch()
        cpu = time.process_time()
        time.sleep(2)
        assert time.process_time() - cpu < 1.5
        print(sum(batch.num_rows for batch in reader), flush=True)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    """
    dsns = [servers.dsns[name] for name in ("s1", "s2", "s3", "s4")]
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *dsns], stdout=subprocess.PIPE, text=True
    )

    def waiting():
        with servers.session("s1") as cursor:
            cursor.execute(
                "SELECT wait_event FROM pg_stat_activity "
                "WHERE application_name LIKE 'dask_shardsql:%'"
            )
            return cursor.fetchall() == [("ClientWrite",)]

    wait_until(waiting, 20)
    rows, grown = process.communicate(timeout=60)[0].split()
    assert 1_190_000 < int(rows) < 1_200_000  # one batch was taken before
    assert int(grown) < 100 << 10  # KiB, of 300 MB


def test_a_process_may_end_in_the_middle(servers):
    code = """
        import sys, dask_shardsql as dss
        topology = dss.Topology.from_dsns({f"s{i}": dsn for i, dsn in enumerate(sys.argv[1:])})
        reader = dss.stream("SELECT 1 AS x, pg_sleep(20)::text AS s", topology)
    """
    dsns = [servers.dsns[name] for name in ("s1", "s2")]
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *dsns],
        capture_output=True,
        text=True,
        timeout=15,
    )
    assert (done.returncode, done.stderr) == (0, "")
    wait_until(lambda: not transactions(servers))


def test_ctrl_c_stops_whoever_waits_for_rows(servers, shards):
    reader = dss.stream("SELECT 1 AS x, pg_sleep(30)::text AS s", shards)
    with (
        pytest.raises(KeyboardInterrupt),
        interrupt_when(lambda: len(transactions(servers)) == 4),
    ):
        reader.read_next_batch()
    del reader


def test_ctrl_c_while_a_shard_waits_for_a_lock(servers, shards):
    with servers.session("s2") as cursor:
        cursor.execute("LOCK TABLE st_rows")
        with pytest.raises(KeyboardInterrupt), interrupt_when(lambda: transactions(servers)):
            dss.stream("SELECT * FROM st_rows", shards)
        check_that_sessions_are_left_well(servers, shards)


def test_another_thread_may_read_and_two_streams_at_once(shards):
    found = []
    readers = [dss.stream(LARGE, shards, batch_size="1 MiB") for _ in range(2)]
    thread = threading.Thread(target=lambda: found.append(readers[0].read_all().num_rows))
    thread.start()
    found.append(readers[1].read_all().num_rows)
    thread.join(20)
    assert found == [80_000, 80_000]


@pytest.mark.parametrize("kind", ["postgresql", "sqlite"])
def test_many_streams_leak_nothing(servers, tmp_path, kind):
    topology = own_shards(servers) if kind == "postgresql" else sqlite_shards(tmp_path)

    def held():
        return len(os.listdir("/proc/self/fd"))

    for number in range(60):
        if number == 10:
            wait_until(lambda: not any(pool._busy for pool in pools_of(topology)))
            fds, threads = held(), threading.active_count()
        reader = dss.stream("SELECT id FROM st_rows", topology, batch_size=[1, "1 MiB"][number % 2])
        if number % 3:
            assert reader.read_all().num_rows == 200
        else:
            reader.read_next_batch()
        del reader
    wait_until(lambda: not any(pool._busy for pool in pools_of(topology)))
    wait_until(lambda: threading.active_count() <= threads + 1)
    assert held() <= fds + 8  # another connection a shard, while the one before is closed


def sqlite_shards(directory):
    import sqlite3

    for number in range(2):
        with sqlite3.connect(directory / f"{number}.db") as connection:
            connection.execute("CREATE TABLE st_rows (id INTEGER)")
            connection.executemany(
                "INSERT INTO st_rows VALUES (?)", [(i,) for i in range(number, 200, 2)]
            )
        connection.close()
    shards = {
        f"s{n}": {"driver": "sqlite", "database": str(directory / f"{n}.db")} for n in range(2)
    }
    return dss.Topology.from_mapping({"shards": shards})


def test_other_databases_stream_too(tmp_path):
    table = dss.stream("SELECT id FROM st_rows WHERE id < ?", sqlite_shards(tmp_path), (9,))
    assert sorted(table.read_all()["id"].to_pylist()) == list(range(9))


def test_dropping_it_stops_the_workers_backends(servers, shards, client):
    reader = dss.stream("SELECT 1 AS x, pg_sleep(60)::text AS s", shards, scheduler=client)
    wait_until(lambda: len(transactions(servers)) == 4)
    del reader
    wait_until(lambda: not transactions(servers))


def test_a_worker_that_is_lost_is_an_error_or_read_again(servers, client):
    topology = own_shards(servers)
    sql = "SELECT id, pg_sleep(0.02)::text AS s FROM st_rows"
    reader = dss.stream(sql, topology, scheduler=client)
    wait_until(lambda: len(transactions(servers)) >= 3)
    victim = next(iter(client.scheduler_info()["workers"]))
    pid = client.run(os.getpid, workers=[victim])[victim]
    os.kill(pid, 9)
    assert sorted(reader.read_all()["id"].to_pylist()) == list(range(200))
    client.wait_for_workers(2)


def test_an_asynchronous_client_is_refused_with_the_remedy(shards):
    async def run():
        async with Client(processes=False, asynchronous=True, dashboard_address=None, n_workers=1):
            with pytest.raises(dss.ConfigurationError, match="asynchronous.*scheduler='threads'"):
                dss.stream("SELECT 1 AS x", shards)
            return dss.stream("SELECT 1 AS x", shards, scheduler="threads").read_all().num_rows

    assert asyncio.run(run()) == 4


def test_limits_for_tasks_do_not_keep_it_from_reading(shards):
    with dask.config.set(num_workers=1):
        assert dss.stream("SELECT id FROM st_rows", shards).read_all().num_rows == 200


@pytest.mark.parametrize("is_plain", [True, False])
def test_a_process_ends_at_once_after_ctrl_c(servers, is_plain):
    """Where a session is encrypted, tasks read; the streams are not closed by then."""
    code = f"""
import signal, time, dask_shardsql as dss
from dask_shardsql.engine.drivers.postgresql_libpq import Session
if not {is_plain}:
    Session.is_plain = False
sql = "SELECT g, pg_sleep(0.05)::text AS s FROM generate_series(1, 1200) AS g"
stream = dss.stream(sql, dss.Topology.from_dsns([{servers.dsns["s1"]!r}]))
signal.signal(signal.SIGINT, signal.default_int_handler)
print("ready", flush=True)
try:
    stream.read_all()
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "ready\n"
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=20)[0] == "interrupted\n"
    finally:
        process.kill()
        process.wait()
