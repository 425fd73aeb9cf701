"""Reading a whole sharded table: time, client CPU and peak memory, each way in its own process.

    python tests/benchmarks/bulk.py [--scale 0.1] [--rounds 5] [--money numeric|double|both]
        [--ways NAME,NAME] [--topology shards.toml] [--output file.md]

TPC-H lineitem over four shards, into one result. The limit is four psql that throw the bytes of a
binary COPY away. The ways are this library's and those of its peers that are installed
(``pip install 'dask_shardsql[benchmark]'``); others are left out, with the reason. All run
interleaved, round by round, and every result is compared with the shards' own sums. Printed as
Markdown: medians and ratios.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import shlex
import statistics
import subprocess
import sys
from decimal import Decimal
from pathlib import Path

from bulk_peers import MONEY
from bulk_ways import LIMIT, WAYS
from shards import ask, find_psql, logins, say, tpch_shards

import dask_shardsql as dss

TABLES = {"numeric": "lineitem", "double": "lineitem_double"}
_SECONDS_A_RUN = 1800


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(epilog=f"ways: {', '.join(WAYS)}")
    parser.add_argument("--scale", type=float, default=0.1, help="TPC-H's scale factor")
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds, after one more")
    parser.add_argument(
        "--slow-rounds", type=int, help="in how many of them the slow ways take part (all)"
    )
    parser.add_argument("--money", choices=(*TABLES, "both"), default="numeric")
    parser.add_argument("--ways", help="names, with commas between them (all)")
    parser.add_argument("--topology", type=Path, help="servers that run and hold the data already")
    parser.add_argument("--output", type=Path, help="write the Markdown to this file as well")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    found = parser.parse_args()
    found.names = found.ways.split(",") if found.ways else list(WAYS)
    unknown = [name for name in found.names if name not in WAYS]
    if unknown:
        parser.error(f"unknown ways: {', '.join(unknown)}; there are {', '.join(WAYS)}")
    found.names = [name for name in found.names if name != LIMIT]
    return found


def shown_command(given: argparse.Namespace) -> str:
    words = ["python", "tests/benchmarks/bulk.py"]
    for name in ("scale", "rounds", "slow_rounds", "money", "ways", "topology"):
        value = getattr(given, name)
        if value is not None and not (name == "scale" and given.topology):
            shown = value.name if isinstance(value, Path) else f"{value}"
            words += [f"--{name.replace('_', '-')}", shown]
    return shlex.join(words)


def make_double(login) -> None:
    """Create lineitem_double where it is missing: lineitem with its money in floats."""
    if ask(login, "SELECT 1 WHERE to_regclass('lineitem_double') IS NOT NULL"):
        return
    names = ask(
        login,
        "SELECT attname FROM pg_attribute WHERE attrelid = 'lineitem'::regclass AND attnum > 0 "
        "AND NOT attisdropped ORDER BY attnum",
    )
    columns = ", ".join(f"{n}::float8 AS {n}" if n in MONEY else n for (n,) in names)
    ask(
        login,
        f"CREATE TABLE lineitem_double AS SELECT {columns} FROM lineitem",
        "ALTER TABLE lineitem_double ADD PRIMARY KEY (l_orderkey, l_linenumber)",
        "VACUUM ANALYZE lineitem_double",
    )


def sums(topology: dss.Topology, table: str) -> dict:
    """Rows, the sum of l_orderkey and that of l_extendedprice, from the shards themselves."""
    question = f"SELECT count(*), sum(l_orderkey), sum(l_extendedprice::numeric) FROM {table}"
    rows, keys, price = zip(*(ask(each, question)[0] for each in logins(topology)), strict=True)
    return {"rows": sum(rows), "keys": int(sum(keys)), "price": sum(price)}


def problem_of(found: dict, expected: dict) -> str | None:
    """Why the run is not to be timed: left out, failed, or with wrong data."""
    for kind in ("skip", "failure"):
        if kind in found:
            return f"{'skipped' if kind == 'skip' else 'failed'}: {found[kind]}"
    for key, value in expected.items():
        if key not in found:  # psql threw the rows away
            continue
        got = Decimal(found[key]) if key == "price" else found[key]
        close = key == "price" and not found["exact"] and math.isclose(got, value, rel_tol=1e-9)
        if got != value and not close:
            return f"WRONG: {key} {got}, the shards say {value}"
    return None


def run(name: str, table: str, topology: Path) -> dict:
    command = [sys.executable, __file__, "--child", name, table, str(topology)]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=_SECONDS_A_RUN
        )
    except subprocess.TimeoutExpired:
        return {"failure": f"no end after {_SECONDS_A_RUN} s"}
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        last = (done.stderr.strip().splitlines() or [""])[-1]
        return {"failure": f"exit status {done.returncode} {last}"}
    return json.loads(lines[-1])


def measure(given: argparse.Namespace, table: str, topology: Path, expected: dict):
    """Return the runs of each way, and why others have none."""
    runs: dict[str, list[dict]] = {name: [] for name in (LIMIT, *given.names)}
    problems: dict[str, str] = {}
    slow_rounds = given.rounds if given.slow_rounds is None else given.slow_rounds
    for number in range(given.rounds + 1):
        for name in (LIMIT, *random.sample(given.names, len(given.names)), LIMIT):
            # the first round warms the servers up
            if name in problems or (WAYS[name].slow and not 0 < number <= slow_rounds):
                continue
            found = run(name, table, topology)
            problem = problem_of(found, expected)
            if problem:
                problems[name] = problem
                del runs[name]
                say(f"{table}, {name}: {problem}")
                continue
            say(f"{table}, round {number} of {given.rounds}, {name}: {found['seconds']:.3f} s")
            if number:
                runs[name].append(found)
    return {name: found for name, found in runs.items() if found}, problems


def medians(runs: list[dict]) -> dict:
    numbers = ("seconds", "cpu", "peak", "worker_peak", "start")
    return {k: statistics.median(run[k] for run in runs) for k in numbers if k in runs[0]}


def rows_of(runs: dict[str, list[dict]]):
    """Yield the table's rows, as lists of texts."""
    found = {name: medians(each) for name, each in runs.items()}
    for name, median in found.items():

        def ratio(base, key, median=median):
            return f"{median[key] / found[base][key]:.2f}" if base in found else "-"

        last = runs[name][-1]
        peak, share, money = "-", "-", "-"
        if "nbytes" in last:
            peak = f"{median['peak']:.0f}"
            if "worker_peak" in median:
                peak += f", worker {median['worker_peak']:.0f}"
            most = max(median["peak"], median.get("worker_peak", 0))
            share = f"{most / (last['nbytes'] / 2**20):.2f}"
            money = last["money"]
        title = WAYS[name].title
        if name == LIMIT and not find_psql():
            title = title.replace("psql", "psycopg2 processes")
        yield [
            title,
            f"{median['seconds']:.3f}",
            ratio(LIMIT, "seconds"),
            f"{median['cpu']:.3f}",
            ratio("adbc", "cpu"),
            *(peak, share, money, str(len(runs[name]))),
        ]


def caption(given, money, topology, expected, runs) -> str:
    login = logins(topology)[0]
    ((version, columns),) = ask(
        login,
        "SELECT current_setting('server_version'), count(*) FROM pg_attribute "
        f"WHERE attrelid = '{TABLES[money]}'::regclass AND attnum > 0 AND NOT attisdropped",
    )
    sized = [name for name in ("collect", *runs) if name in runs and "nbytes" in runs[name][0]]
    size = f", {runs[sized[0]][0]['nbytes'] / 2**20:.1f} MiB as Arrow" if sized else ""
    kind = {"numeric": "exact numeric", "double": "double precision"}[money]
    parts = [
        f"TPC-H lineitem over {len(topology.shards)} shards, money as {kind}: "
        f"{expected['rows']:,} rows, {columns} columns{size}; PostgreSQL {version}; "
        f"medians over {given.rounds} interleaved {'round' if given.rounds == 1 else 'rounds'}, "
        "in as many runs as the last column says; "
        f"{os.cpu_count()} cores for client and servers; `{shown_command(given)}`."
    ]
    if LIMIT in runs and find_psql():
        start = statistics.median(found["start"] for found in runs[LIMIT]) * 1e3
        parts.append(
            f"psql's time includes {start:.0f} ms for its start and login; connectorx, polars and "
            "dask log in for each query as well, the other ways keep their connections."
        )
    elif LIMIT in runs:
        parts.append(
            "There is no psql here: the limit is a Python process a shard whose psycopg2 copies "
            "to /dev/null."
        )
    parts.append(
        "CPU is the client's, with its worker processes; peak is the memory above that before the "
        "query, of the client (and of the larger worker), and its ratio is to the size of the "
        "way's own result as Arrow."
    )
    return " ".join(parts)


def report(given, money: str, path: Path) -> str:
    topology = dss.Topology.from_toml(path)
    table = TABLES[money]
    expected = sums(topology, table)
    runs, problems = measure(given, table, path, expected)
    head = ["way", "s (median)", "ratio to psql", "client CPU s", "CPU ratio to ADBC"]
    head += ["peak MiB", "peak / result", "l_extendedprice is", "runs"]
    lines = [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows_of(runs))]
    left_out = [
        f"- {way.title}: {problems[name]}" for name, way in WAYS.items() if name in problems
    ]
    text = [caption(given, money, topology, expected, runs), "\n".join(lines)]
    return "\n\n".join(text + (["Not in the table:\n\n" + "\n".join(left_out)] if left_out else []))


def main() -> None:
    given = options()
    if given.child:
        import bulk_child

        bulk_child.run(*given.child)
        return
    with tpch_shards(given.topology, given.scale) as path:
        kinds = list(TABLES) if given.money == "both" else [given.money]
        if "double" in kinds:
            for login in logins(dss.Topology.from_toml(path)):
                make_double(login)
        text = "\n\n".join(report(given, money, path) for money in kinds) + "\n"
    print(text, end="")
    if given.output:
        given.output.write_text(text)


if __name__ == "__main__":
    main()
