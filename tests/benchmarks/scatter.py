"""One row by its primary key, asked of every shard at once: psycopg2 in threads and ``collect``.

    python tests/benchmarks/scatter.py [--scale 0.01] [--rounds 300] [--topology shards.toml]

TPC-H orders over four shards; the key is a parameter, another one in each round. psycopg2 has a
thread and an open connection for each shard, both kept; by default it begins a transaction, and is
told to commit, as ``collect`` does. All ways run in every round, in an order
that changes. Printed as Markdown: medians, 95th percentiles and ratios of the medians, of the time
that passes and of this process's CPU time.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psycopg2
from shards import Login, ask, logins, tpch_shards

import dask_shardsql as dss

SQL = "SELECT * FROM orders WHERE o_orderkey = %s"
_WARM_UP = 20

Ask = Callable[[int], list[int]]  # an order's key -> the keys of the rows that came back


@contextmanager
def psycopg2_way(shards: list[Login], autocommit: bool) -> Iterator[Ask]:
    with ExitStack() as stack:
        connections = [psycopg2.connect(login.dsn) for login in shards]
        for connection in connections:
            stack.callback(connection.close)
            connection.autocommit = autocommit
        pool = stack.enter_context(ThreadPoolExecutor(len(connections)))

        def ask_one(connection, key):
            with connection.cursor() as cursor:
                cursor.execute(SQL, (key,))
                rows = cursor.fetchall()
            if not autocommit:
                connection.commit()
            return rows

        def run(key):
            parts = pool.map(ask_one, connections, [key] * len(connections))
            return [row[0] for part in parts for row in part]

        yield run


def collect_way(topology: dss.Topology, **options) -> Ask:
    def run(key):
        table = dss.collect(SQL, topology, (key,), **options)
        return table.column("o_orderkey").to_pylist()

    return run


def measure(ways: dict[str, Ask], keys: list[int], rounds: int) -> dict[str, list[tuple]]:
    """Return the (seconds, CPU seconds) of each way in every round."""
    found: dict[str, list[tuple]] = {name: [] for name in ways}
    for number in range(-_WARM_UP, rounds):
        key = random.choice(keys)  # noqa: S311 - which order is asked for is no secret
        for name in random.sample(list(ways), len(ways)):
            cpu, started = time.process_time(), time.perf_counter()
            answer = ways[name](key)
            seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
            if answer != [key]:
                raise SystemExit(f"error: {name} found the orders {answer}, not the one {key}")
            if number >= 0:
                found[name].append((seconds, cpu))
    return found


def line(name: str, runs: list[tuple], base: list[tuple]) -> str:
    cells = [name]
    for values, of in zip(zip(*runs, strict=True), zip(*base, strict=True), strict=True):
        median = statistics.median(values)
        p95 = statistics.quantiles(values, n=20)[-1]
        ratio = median / statistics.median(of)
        cells += [f"{median * 1e3:.2f}", f"{p95 * 1e3:.2f}", f"{ratio:.2f}"]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--scale", type=float, default=0.01, help="TPC-H's scale factor")
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--topology", type=Path, help="servers that run and hold the data already")
    given = parser.parse_args()
    with tpch_shards(given.topology, given.scale) as path, ExitStack() as stack:
        topology = dss.Topology.from_toml(path)
        shards = logins(topology)
        some = "SELECT o_orderkey FROM orders ORDER BY random() LIMIT 100"
        keys = [key for login in shards for (key,) in ask(login, some)]
        ways = {
            "psycopg2 in threads": stack.enter_context(psycopg2_way(shards, False)),
            "psycopg2 in threads, autocommit": stack.enter_context(psycopg2_way(shards, True)),
            "**dss.collect**": collect_way(topology),
            "**dss.collect**, check_schema=False": collect_way(topology, check_schema=False),
        }
        found = measure(ways, keys, given.rounds)
        ((version,),) = ask(shards[0], "SHOW server_version")
    data = f"--topology {given.topology.name}" if given.topology else f"--scale {given.scale:g}"
    print(
        f"`{SQL}` on {len(shards)} shards: one row in all; PostgreSQL {version}; {given.rounds} "
        f"interleaved rounds after {_WARM_UP} more; {os.cpu_count()} cores for client and servers; "
        f"`python tests/benchmarks/scatter.py {data} --rounds {given.rounds}`.\n"
    )
    print("| way | ms (median) | ms (p95) | ratio | CPU ms (median) | CPU ms (p95) | CPU ratio |")
    print("|---|---|---|---|---|---|---|")
    base = next(iter(found.values()))
    for name, runs in found.items():
        print(line(name, runs, base))


if __name__ == "__main__":
    main()
