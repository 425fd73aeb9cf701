"""TPC-H's queries over four shards with merge="global", and in one database that has all rows.

    python tests/benchmarks/merge.py [--scale 0.1] [--rounds 5] [--queries 1,6]

Orders and lineitem are sharded by the order's key. In each round every query runs in both ways, one
after the other. Printed as Markdown: how it is answered, the bytes that went from server to server,
medians of the time that passes, and the CPU time that all servers' processes took, with the ratios.
The servers share this machine's cores, so that four shards cannot be faster than one.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import dask_shardsql as dss
from dask_shardsql.testing import start_shards
from dask_shardsql.testing.tpch import TPCH_SHARDED, load_tpch

sys.path.insert(0, str(Path(__file__).parents[1]))
from test_merge_tpch import QUERIES

_TICKS = os.sysconf("SC_CLK_TCK")


def servers_cpu() -> float:
    """Return the CPU seconds of this process's servers so far, of processes that ended too."""
    found: dict[int, tuple[int, int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(") ")[2].split()
        except OSError:
            continue
        found[int(stat.parent.name)] = int(fields[1]), sum(map(int, fields[11:15]))
    total = 0
    for process, (parent, ticks) in found.items():
        if process != os.getpid():
            while parent in found and parent != os.getpid():
                parent = found[parent][0]
            total += ticks if parent == os.getpid() else 0
    return total / _TICKS


def timed(run: Callable[[], object]) -> tuple[float, float]:
    """Return the seconds that pass, and those of the servers' CPUs."""
    cpu, started = servers_cpu(), time.perf_counter()
    run()
    return time.perf_counter() - started, servers_cpu() - cpu


def main() -> None:
    """Run all, and print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--scale", type=float, default=0.1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--queries", default=",".join(map(str, QUERIES)))
    options = parser.parse_args()
    chosen = [int(number) for number in options.queries.split(",")]
    with start_shards(4, sharded=TPCH_SHARDED) as servers:
        load_tpch(servers, options.scale)
        print(
            "| Q | way | bytes moved | one, s | shards, s | ratio | one, CPU s | shards | ratio |"
        )
        print("|---|---|---|---|---|---|---|---|---|")
        for number in chosen:
            sql = QUERIES[number]
            one: list[tuple[float, float]] = []
            many: list[tuple[float, float]] = []
            for _ in range(options.rounds + 1):
                one.append(timed(lambda sql=sql: dss.collect(sql, servers.reference)))
                many.append(
                    timed(lambda sql=sql: dss.collect(sql, servers.topology, merge="global"))
                )
            found = dss.explain(sql, servers.topology, merge="global", analyze=True)
            moved = sum(part["bytes"] for part in found.actual if part["part"] == "partial")
            seconds = [statistics.median(wall for wall, _ in way[1:]) for way in (one, many)]
            cpu = [statistics.mean(used for _, used in way[1:]) for way in (one, many)]
            ratios = [after / max(before, 1e-9) for before, after in (seconds, cpu)]
            print(
                f"| {number} | {found.strategy} ({found.reason}) | {moved:,} | {seconds[0]:.3f} | "
                f"{seconds[1]:.3f} | {ratios[0]:.2f} | {cpu[0]:.2f} | {cpu[1]:.2f} | "
                f"{ratios[1]:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
