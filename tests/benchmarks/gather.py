"""A whole table through a scheduler: ``collect``, ``compute()``, and the parts they are made of.

    python tests/benchmarks/gather.py [--scale 0.1] [--rounds 5] [--topology shards.toml]

TPC-H lineitem over four shards; a scheduler and two workers, each a process of its own. What cannot
be avoided is to make the partitions on the workers, and to move them to the client: the partitions
as DataFrames there (``persist``), and then their Arrow tables gathered over TCP. A client gathers
through the scheduler unless it was made with ``direct_to_workers=True``. All ways run in every
round, in an order that changes. Printed as Markdown: medians, and ratios to the sum of both parts.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import time
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

import dask
import pyarrow as pa
from distributed import Client, futures_of, wait
from distributed.deploy.subprocess import SubprocessCluster
from shards import ask, logins, say, tpch_shards

import dask_shardsql as dss
from dask_shardsql import union

SQL = "SELECT * FROM lineitem"


def parts(topology, client):
    """Return the seconds that making the partitions takes, and moving them."""
    started = time.perf_counter()
    made = dss.read_sharded_sql(SQL, topology).persist()
    wait(made)
    seconds = [time.perf_counter() - started]
    tables = client.map(pa.Table.from_pandas, futures_of(made), pure=False)
    wait(tables)
    started = time.perf_counter()
    moved = client.gather(tables)
    seconds.append(time.perf_counter() - started)
    return seconds, sum(map(len, moved))


def collect(topology):
    return len(dss.collect(SQL, topology))


def collect_over_tcp(topology):
    """As from workers on another host."""
    with mock.patch.object(union, "offered_memory", nullcontext):
        return collect(topology)


def compute(topology):
    return len(dss.read_sharded_sql(SQL, topology).compute())


def compute_over_tcp(topology):
    with mock.patch.object(union, "offered_memory", nullcontext):
        return compute(topology)


def compute_by_dask(topology):
    (frame,) = dask.compute(dss.read_sharded_sql(SQL, topology))
    return len(frame)


WAYS = {
    "**dss.collect**, shared memory": (collect, False),
    "**dss.collect**, TCP": (collect_over_tcp, False),
    "**dss.collect**, TCP, direct_to_workers": (collect_over_tcp, True),
    "**dss.read_sharded_sql**().compute(), shared memory": (compute, False),
    "**dss.read_sharded_sql**().compute(), TCP": (compute_over_tcp, False),
    "dask.compute() of it, together with others": (compute_by_dask, False),
    "dask.compute() of it, direct_to_workers": (compute_by_dask, True),
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--scale", type=float, default=0.1, help="TPC-H's scale factor")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--topology", type=Path, help="servers that run and hold the data already")
    given = parser.parse_args()
    names = ["make", "move", *WAYS]
    seconds: dict[str, list[float]] = {name: [] for name in names}
    with (
        tpch_shards(given.topology, given.scale) as path,
        SubprocessCluster(n_workers=2, threads_per_worker=2, dashboard_address=":0") as cluster,
        Client(cluster) as client,
        Client(cluster, direct_to_workers=True, set_as_default=False) as direct,
    ):
        topology = dss.Topology.from_toml(path)
        expected = sum(
            ask(login, "SELECT count(*) FROM lineitem")[0][0] for login in logins(topology)
        )
        for number in range(given.rounds + 1):  # the first one warms up
            found = {}
            for name in random.sample(names[1:], len(names) - 1):
                if name == "move":
                    (found["make"], found["move"]), rows = parts(topology, client)
                else:
                    way, is_direct = WAYS[name]
                    with direct.as_current() if is_direct else nullcontext():
                        started = time.perf_counter()
                        rows = way(topology)
                        found[name] = time.perf_counter() - started
                if rows != expected:
                    raise SystemExit(f"error: {name} gave {rows} rows, not {expected}")
                say(f"round {number}, {name}: {found[name]:.2f} s")
            for name in found if number else ():
                seconds[name].append(found[name])
    medians = {name: statistics.median(found) for name, found in seconds.items()}
    both = medians["make"] + medians["move"]
    data = f"--topology {given.topology.name}" if given.topology else f"--scale {given.scale:g}"
    print(
        f"`{SQL}`, {expected:,} rows over {len(topology.shards)} shards; a scheduler and two "
        "workers, each a process; "
        f"medians of {given.rounds} interleaved rounds; {os.cpu_count()} cores for all; "
        f"`python tests/benchmarks/gather.py {data} --rounds {given.rounds}`.\n"
    )
    print("| way | s (median) | ratio |\n| --- | --- | --- |")
    titles = {"make": "make the partitions", "move": "move them to the client, over TCP"}
    for name, median in medians.items():
        print(f"| {titles.get(name, name)} | {median:.2f} | {median / both:.2f} |")


if __name__ == "__main__":
    main()
