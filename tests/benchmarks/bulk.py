"""Reading a whole sharded table: time, client CPU and peak memory, each way in its own process.

    python tests/benchmarks/bulk.py [--scale 0.1] [--rounds 5]

TPC-H lineitem over four shards, money as exact numeric. The ways run interleaved; printed as
Markdown: medians, and ratios to psycopg2.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor

import pandas as pd

SQL = "SELECT * FROM lineitem"


def with_psycopg2(topology):
    """A thread and a connection for each shard, fetchall, one DataFrame."""
    import psycopg2

    def read(shard):
        keywords = dict(shard.primary.keywords)
        keywords |= {key: secret.reveal() for key, secret in shard.primary.secrets}
        with psycopg2.connect(**keywords) as connection, connection.cursor() as cursor:
            cursor.execute(SQL)
            names = [column.name for column in cursor.description]
            return pd.DataFrame(cursor.fetchall(), columns=names)

    with ThreadPoolExecutor(len(topology.shards)) as pool:
        return pd.concat(pool.map(read, topology.shards), ignore_index=True)


def with_collect(topology):
    """One Arrow table."""
    import dask_shardsql as dss

    return dss.collect(SQL, topology)


def with_read_sharded_sql(topology):
    """One pandas DataFrame through dask's threads."""
    import dask_shardsql as dss

    return dss.read_sharded_sql(SQL, topology).compute()


WAYS = {
    "psycopg2 in threads, fetchall, pandas": with_psycopg2,
    "collect": with_collect,
    "read_sharded_sql(...).compute()": with_read_sharded_sql,
}


def child(way: str, path: str) -> None:
    import dask_shardsql as dss

    topology = dss.Topology.from_toml(path)
    dss.collect("SELECT 1 AS x", topology)  # imports are not what is measured
    before = resource.getrusage(resource.RUSAGE_SELF)
    started = time.perf_counter()
    rows = len(WAYS[way](topology))
    seconds = time.perf_counter() - started
    after = resource.getrusage(resource.RUSAGE_SELF)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    peak = (after.ru_maxrss - before.ru_maxrss) / 1024
    print(json.dumps({"rows": rows, "seconds": seconds, "cpu": cpu, "peak": peak}))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--scale", type=float, default=0.1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--child", nargs=2)
    options = parser.parse_args()
    if options.child:
        child(*options.child)
        return
    from dask_shardsql.testing import start_shards
    from dask_shardsql.testing.tpch import TPCH_SHARDED, load_tpch

    found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    with (
        tempfile.TemporaryDirectory() as directory,
        start_shards(4, sharded=TPCH_SHARDED, reference=False) as servers,
    ):
        load_tpch(servers, scale=options.scale)
        path = servers.write_toml(f"{directory}/shards.toml")
        for _ in range(options.rounds + 1):
            for way in WAYS:
                command = [sys.executable, __file__, "--child", way, str(path)]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                found[way].append(json.loads(done.stdout))
    base = {}
    print(f"{found['collect'][0]['rows']:,} rows, 16 columns, 4 shards\n")
    print("| way | s | CPU s | peak MiB | time ratio | CPU ratio | peak ratio |")
    print("|---|---|---|---|---|---|---|")
    for way, runs in found.items():
        median = {
            key: statistics.median(run[key] for run in runs[1:])  # the first warms the servers up
            for key in ("seconds", "cpu", "peak")
        }
        base = base or median
        ratios = " | ".join(f"{median[key] / base[key]:.2f}" for key in median)
        print(
            f"| {way} | {median['seconds']:.2f} | {median['cpu']:.2f} | {median['peak']:.0f} | "
            f"{ratios} |"
        )


if __name__ == "__main__":
    main()
