"""TPC-H 1 and 6 written in dask, with and without pushdown, and as SQL with merge="global".

    python tests/benchmarks/dask_tpch.py [--scale 0.1] [--rounds 5]

Money is read as floats, as dask's users do who multiply more of it than decimals have digits for.
In each round every query runs in all ways, one after the other. Printed as Markdown: the bytes that
the client gets (as Arrow holds them), medians of the time that passes, and how much of the time of
the first way that is.
"""

from __future__ import annotations

import argparse
import datetime
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dask

import dask_shardsql as dss
from dask_shardsql.progress import ShardEvent, listen
from dask_shardsql.testing import start_shards
from dask_shardsql.testing.tpch import TPCH_SHARDED, load_tpch

sys.path.insert(0, str(Path(__file__).parents[1]))
from test_merge_tpch import QUERIES

MONEY = dict.fromkeys(["l_quantity", "l_extendedprice", "l_discount", "l_tax"], "float64")


def first(items: Any) -> Any:
    """Return TPC-H 1."""
    items = items[items.l_shipdate <= datetime.date(1998, 9, 2)]
    items = items.assign(disc_price=items.l_extendedprice * (1 - items.l_discount))
    items = items.assign(charge=items.disc_price * (1 + items.l_tax))
    return items.groupby(["l_returnflag", "l_linestatus"], sort=True).agg(
        sum_qty=("l_quantity", "sum"),
        sum_base_price=("l_extendedprice", "sum"),
        sum_disc_price=("disc_price", "sum"),
        sum_charge=("charge", "sum"),
        avg_qty=("l_quantity", "mean"),
        avg_price=("l_extendedprice", "mean"),
        avg_disc=("l_discount", "mean"),
        count_order=("l_quantity", "count"),
    )


def sixth(items: Any) -> Any:
    """Return TPC-H 6."""
    items = items[
        (items.l_shipdate >= datetime.date(1994, 1, 1))
        & (items.l_shipdate < datetime.date(1995, 1, 1))
        & items.l_discount.between(0.05, 0.07)
        & (items.l_quantity < 24)
    ]
    return (items.l_extendedprice * items.l_discount).sum()


def measured(run: Callable[[], object]) -> tuple[float, int]:
    """Return the seconds that pass, and the bytes of what the shards answered."""
    sizes = []

    def hear(event: ShardEvent) -> None:
        if event.state == "finished" and event.part == "answer":
            sizes.append(event.nbytes)

    with listen(hear):
        started = time.perf_counter()
        run()
        seconds = time.perf_counter() - started
    return seconds, sum(sizes)


def main() -> None:
    """Run all, and print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--scale", type=float, default=0.1)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    with start_shards(4, sharded=TPCH_SHARDED) as servers:
        load_tpch(servers, options.scale)
        items = dss.read_sharded_table("lineitem", servers.topology, types=MONEY)

        def in_dask(query: Any, *, pushdown: bool) -> Any:
            with dask.config.set({"shardsql.pushdown": pushdown}):
                return query(items).compute()

        print("| Q | way | bytes | s | of the time without |")
        print("|---|---|---|---|---|")
        for number, query in ((1, first), (6, sixth)):
            ways: dict[str, Callable[[], object]] = {
                "dask, pushdown off": lambda query=query: in_dask(query, pushdown=False),
                "dask": lambda query=query: in_dask(query, pushdown=True),
                'SQL, merge="global"': lambda number=number: dss.collect(
                    QUERIES[number], servers.topology, merge="global"
                ),
            }
            found: dict[str, list[tuple[float, int]]] = {name: [] for name in ways}
            for _ in range(options.rounds + 1):
                for name, run in ways.items():
                    found[name].append(measured(run))
            seconds = {n: statistics.median(s for s, _ in runs[1:]) for n, runs in found.items()}
            for name, runs in found.items():
                share = seconds[name] / seconds["dask, pushdown off"]
                size = runs[-1][1]
                print(f"| {number} | {name} | {size:,} | {seconds[name]:.3f} | {share:.3f} |")


if __name__ == "__main__":
    main()
