"""What the library costs per shard: a query that returns one row, and a graph of 1,000 shards.

    python tests/benchmarks/overhead.py [--rounds 100]

One server with 64 databases stands for 64 shards. Every round runs the same query in each of the
ways, one after the other, in an order that changes: psycopg2 in a thread pool (open connections,
a thread for each shard, ``BEGIN; SELECT; COMMIT`` and ``fetchall``), and ``collect``. Printed as
Markdown: median and 95th percentile in milliseconds, and the ratio of the medians.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import dask
import psycopg2
from distributed import Client
from psycopg2.extensions import make_dsn

import dask_shardsql as dss
from dask_shardsql.testing import start_shards

SQL = "SELECT id, name FROM points WHERE id = %s"


def measure(ways, rounds):
    """Return the seconds of each way in every round, interleaved."""
    seconds = {name: [] for name in ways}
    for name in ways:
        ways[name]()
    order = list(ways)
    for _ in range(rounds):
        random.shuffle(order)
        for name in order:
            started = time.perf_counter()
            ways[name]()
            seconds[name].append(time.perf_counter() - started)
    return seconds


def psycopg2_way(dsns, stack):
    """psycopg2 as users write it: a thread and an open connection for each shard."""
    connections = [psycopg2.connect(dsn) for dsn in dsns]
    for connection in connections:
        stack.callback(connection.close)
    pool = stack.enter_context(ThreadPoolExecutor(min(len(dsns), 32)))

    def ask(connection):
        with connection, connection.cursor() as cursor:
            cursor.execute(SQL, (1,))
            return cursor.fetchall()

    def run():
        rows = [row for part in pool.map(ask, connections) for row in part]
        assert len(rows) == len(dsns)

    return run


def library_way(topology, **options):
    def run():
        assert dss.collect(SQL, topology, (1,), **options).num_rows == len(topology.shards)

    return run


def line(name, shards, seconds, base):
    ordered = sorted(seconds)
    median = statistics.median(ordered)
    p95 = ordered[int(len(ordered) * 0.95) - 1]
    extra = (median - base) / shards * 1000
    ratio = median / base
    print(
        f"| {shards} | {name} | {median * 1e3:.2f} | {p95 * 1e3:.2f} | {ratio:.2f} | {extra:.3f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=100)
    rounds = parser.parse_args().rounds
    with start_shards(1, reference=False, max_connections=400) as servers, ExitStack() as stack:
        dsns = []
        for number in range(64):
            name = f"shard{number}"
            servers.execute(f"CREATE DATABASE {name}")
            dsns.append(make_dsn(servers.dsns["s1"], dbname=name))
            connection = psycopg2.connect(dsns[-1])
            with connection, connection.cursor() as cursor:
                cursor.execute("CREATE TABLE points (id int PRIMARY KEY, name text)")
                cursor.execute("INSERT INTO points SELECT g, 'n' || g FROM generate_series(1, 9) g")
            connection.close()
        print("| shards | way | median ms | p95 ms | ratio | ms more per shard |")
        print("|---|---|---|---|---|---|")
        for shards in (4, 16, 64):
            topology = dss.Topology.from_dsns(dsns[:shards])
            ways = {
                "psycopg2 in threads": psycopg2_way(dsns[:shards], stack),
                "collect": library_way(topology),
                "collect, check_schema=False": library_way(topology, check_schema=False),
            }
            seconds = measure(ways, rounds)
            base = statistics.median(seconds["psycopg2 in threads"])
            for name in ways:
                line(name, shards, seconds[name], base)
        thousand = dss.Topology.from_dsns([dsns[0]] * 1000)
        with dask.config.set({"shardsql.check-schema": False}):
            built, lowered = [], []
            for _ in range(5):
                started = time.perf_counter()
                ddf = dss.read_sharded_sql("SELECT id FROM points", thousand)
                built.append(time.perf_counter() - started)
                started = time.perf_counter()
                tasks = len(ddf.optimize().__dask_graph__())
                lowered.append(time.perf_counter() - started)
        print(
            f"\n{tasks:,} shards: the DataFrame took {statistics.median(built) * 1e3:.0f} ms to "
            f"build (one description), its graph {statistics.median(lowered) * 1e3:.0f} ms"
        )
        submit(thousand)


def submit(topology):
    """Print how long it takes until a scheduler knows every task; what runs of it is cancelled."""

    def known(dask_scheduler):
        return len(dask_scheduler.tasks)

    with Client(n_workers=2, threads_per_worker=1, dashboard_address=None) as client:
        dss.collect("SELECT 1 AS x", topology, shards=["s1"])
        seconds = []
        for _ in range(5):
            ddf = dss.read_sharded_sql(
                "SELECT id FROM points", topology, check_schema=False, scheduler="threads"
            )
            started = time.perf_counter()
            future = client.compute(ddf)
            while client.run_on_scheduler(known) < len(topology.shards):
                time.sleep(0.001)
            seconds.append(time.perf_counter() - started)
            client.cancel(future, force=True)
            del future
            while client.run_on_scheduler(known):
                time.sleep(0.01)
        print(f"and {statistics.median(seconds) * 1e3:.0f} ms to be known to a scheduler")


if __name__ == "__main__":
    main()
